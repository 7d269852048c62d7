"""What a terminal shows of a run: one progress bar; elsewhere, plain lines."""

import sys
import time
from collections.abc import Mapping
from typing import Any

_BETWEEN_LINES = 10.0
_BETWEEN_FRAMES = 0.1


class ProgressDisplay:
    """Shows where a run is: a bar in a terminal, else a line now and then and one for each epoch."""

    def __init__(self, on: bool) -> None:
        self.on = on
        self._bar: Any = None
        self._task: Any = None
        self._label, self._done, self._total = "", 0, 0
        self._start = time.perf_counter()
        self._pause = _BETWEEN_FRAMES if on and _terminal() else _BETWEEN_LINES
        self.next_look = self._start + self._pause

    def begin(self, epoch: int, epochs: int, done: int, batches: int) -> None:
        """A new epoch; `batches` is 0 if nobody knows."""
        self._label, self._done, self._total = f"epoch {epoch}/{epochs}", done, batches
        self._start = time.perf_counter()
        if self.on and _terminal():
            self._open()

    def show(self, batch: int, samples: float, values: Mapping[str, float]) -> None:
        """Now at `batch`, after `samples` samples since `begin`."""
        now = time.perf_counter()
        self.next_look = now + self._pause
        rate = samples / max(now - self._start, 1e-9)
        text = f"{_row(values)}  {rate:,.0f} samples/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=batch, text=text, refresh=True)
        elif self.on:
            left = ""
            if self._total and batch > self._done:
                seconds = (now - self._start) / (batch - self._done) * (self._total - batch)
                left = f"  {_clock(seconds)} left"
            self.line(f"{self._label}  batch {batch}{f'/{self._total}' if self._total else ''}  {text}{left}")

    def end(self, row: Mapping[str, float]) -> None:
        """An epoch is over."""
        self.close()
        shown = {name: value for name, value in row.items() if name not in ("epoch", "step", "samples_per_second")}
        seconds = shown.pop("seconds", 0.0)
        self.line(f"{self._label}  {_row(shown)}  {row.get('samples_per_second', 0):,.0f} samples/s  {_clock(seconds)}")

    def line(self, text: str) -> None:
        """One line of text, above the bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        elif self.on and sys.stdout is not None:
            sys.stdout.write(f"{text}\n")
            sys.stdout.flush()

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _open(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), "{task.fields[text]}")
        self._bar = Progress(*columns, TimeRemainingColumn(), auto_refresh=False, transient=True)
        self._task = self._bar.add_task(self._label, total=self._total or None, completed=self._done, text="")
        self._bar.start()


def _terminal() -> bool:
    """Whether what is printed is seen in a terminal; what a user put in the place of stdout may not know."""
    return bool(getattr(sys.stdout, "isatty", bool)())


def _row(values: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())


def _clock(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
