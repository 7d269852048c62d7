"""What a run was like: one row an epoch."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

from modsurg.errors import TrainingError

NO_RESULT = ("epoch", "step", "lr", "seconds", "samples_per_second")


@dataclass
class History(Sequence[Mapping[str, float]]):
    """The rows of a run, oldest first.

    Attributes:
        rows: For every finished epoch its number (`epoch`, from 1), `step`, `loss`, `val_loss` and the metrics, `lr`,
            `seconds`, `samples_per_second`.
        stopped: Why the run ended before its last epoch; empty if it did not.

    Example:
        >>> history = History([{"epoch": 1, "loss": 0.7}, {"epoch": 2, "loss": 0.5}])
        >>> history["loss"], history[-1]["loss"], len(history)
        ([0.7, 0.5], 0.5, 2)
        >>> print(history)
        epoch  loss
            1   0.7
            2   0.5
    """

    rows: list[dict[str, float]] = field(default_factory=list)
    stopped: str = ""

    @overload
    def __getitem__(self, key: str) -> list[float]: ...
    @overload
    def __getitem__(self, key: int) -> dict[str, float]: ...
    @overload
    def __getitem__(self, key: slice) -> list[dict[str, float]]: ...
    def __getitem__(self, key: str | int | slice) -> Any:
        if not isinstance(key, str):
            return self.rows[key]
        column = [row[key] for row in self.rows if key in row]
        if not column:
            raise KeyError(f"{key!r}; there are {', '.join(self.names)}")
        return column

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, float]]:
        return iter(self.rows)

    def __str__(self) -> str:
        names = self.names
        table = [names, *([_short(row[name]) if name in row else "" for name in names] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(map(str.rjust, line, widths)) for line in table] if self.rows else ["no epoch is finished"]
        return "\n".join(lines + ([f"stopped: {self.stopped}"] if self.stopped else []))

    @property
    def names(self) -> list[str]:
        """The columns."""
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draw every loss and metric over the epochs, training and validation in one panel.

        Args:
            path: Also write the picture there.

        Returns:
            The matplotlib figure.

        Raises:
            TrainingError: matplotlib is not installed, or no epoch is finished.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise TrainingError('history.plot() needs matplotlib: pip install "modsurg[tensorboard]".') from error
        panels = list(dict.fromkeys(name.removeprefix("val_") for name in self.names if name not in NO_RESULT))
        if not panels:
            raise TrainingError("no epoch is finished, so there is nothing to plot yet.")
        figure = Figure(figsize=(4 * len(panels), 3), layout="constrained")
        for panel, axis in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
            for name, label in ((panel, "training"), (f"val_{panel}", "validation")):
                points = [(row["epoch"], row[name]) for row in self.rows if name in row]
                if points:
                    axis.plot(*zip(*points, strict=True), marker=".", label=label)
            axis.set(title=panel, xlabel="epoch")
            axis.legend()
        if path is not None:
            figure.savefig(path)
        return figure


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 or float(value).is_integer() else f"{value:.4g}"
