"""What is seen of a run: one progress bar, plain lines where there is no terminal, and TensorBoard."""

import copy
import os
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from modsurg.errors import TrainingError, warn
from modsurg.training import sketches
from modsurg.training.history import NO_RESULT

if TYPE_CHECKING:
    from modsurg.training.trainer import Trainer

_BETWEEN_LINES = 10.0
_BETWEEN_FRAMES = 0.1


class Screen:
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


class Board:
    """TensorBoard's files in a directory; `writer` is torch's own SummaryWriter, open to anyone."""

    def __init__(self, directory: str | os.PathLike[str], purge_step: int | None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise TrainingError('log_dir= needs TensorBoard: pip install "modsurg[tensorboard]".') from error
        try:
            self.writer: Any = SummaryWriter(os.fspath(directory), purge_step=purge_step)
        except OSError as error:
            raise TrainingError(f"log_dir can't be made: {error}.") from error

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write numbers under their tags."""
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step)

    def epoch(self, row: Mapping[str, float]) -> None:
        """Write the row of an epoch; the tags `accuracy/train` and `accuracy/val` make one group."""
        values = {"samples_per_second": row["samples_per_second"]}
        for name in row.keys() - {"loss", *NO_RESULT}:
            values[f"{name[4:]}/val" if name.startswith("val_") else f"{name}/train"] = row[name]
        self.scalars(values, int(row["step"]))

    def graph(self, model: nn.Module, example: torch.Tensor) -> None:
        """Draw the model's graph, traced on a copy in eval mode, so that neither it nor the random states change."""
        try:
            with torch.random.fork_rng(), torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.writer.add_graph(copy.deepcopy(model).eval(), example)
        except Exception as error:  # any failure of a trace is the same to the run: there is no graph
            text = f"TensorBoard gets no graph of {type(model).__name__}: torch.jit.trace failed ({error!r:.200})."
            warn(text)

    def pictures(self, images: Any, output: Any, target: Any, names: Sequence[str], step: int) -> None:
        """Show pictures with what was predicted and what it is; `names` are the classes. Other batches are left out."""
        if sketches.are_pictures(images, output, target):
            self.writer.add_figure("predictions", sketches.pictures(images, output, target, names), step)

    def histograms(self, model: nn.Module, step: int) -> None:
        """Show how the weights and their gradients are spread."""
        for name, parameter in model.named_parameters():
            self.writer.add_histogram(f"weights/{name}", parameter.detach().float(), step)
            if parameter.grad is not None:
                self.writer.add_histogram(f"gradients/{name}", parameter.grad.float(), step)

    def close(self, trainer: "Trainer") -> None:
        """Write what the run was made with beside what came out, if it came to its end, and what is buffered."""
        if len(trainer.history) and not trainer.stopping:
            group, options = trainer.optimizer.param_groups[0], ("precision", "accumulate", "clip_norm", "seed")
            values = {name: getattr(trainer, name) for name in options}
            values |= {"lr": group.get("initial_lr", group["lr"]), "weight_decay": group.get("weight_decay", 0)}
            values |= {"optimizer": type(trainer.optimizer).__name__, "scheduler": "+".join(_names(trainer.schedulers))}
            plain = {name: v if isinstance(v, bool | int | float | str) else str(v) for name, v in values.items()}
            results = {f"final/{name}": v for name, v in trainer.history[-1].items() if name not in NO_RESULT}
            self.writer.add_hparams(plain, results, run_name=".", global_step=trainer.step)
        self.writer.close()


def _terminal() -> bool:
    """Whether what is printed is seen in a terminal; what a user put in the place of stdout may not know."""
    return bool(getattr(sys.stdout, "isatty", bool)())


def _names(schedulers: Mapping[str, Any]) -> list[str]:
    return [type(one).__name__ for one in schedulers.values()]


def _row(values: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())


def _clock(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
