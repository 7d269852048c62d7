"""The curves of a run in TensorBoard."""

import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from modsurg.errors import TrainingError
from modsurg.training.history import NO_RESULT

EVERY = 50


class TensorBoard:
    """TensorBoard's files in a directory.

    Attributes:
        writer: The SummaryWriter of torch, for whatever else is to be seen.
    """

    def __init__(self, directory: str | os.PathLike[str], purge_step: int | None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise TrainingError('log_dir= needs TensorBoard: pip install "modsurg[tensorboard]".') from error
        try:
            self.writer: Any = SummaryWriter(os.fspath(directory), purge_step=purge_step)
        except OSError as error:
            raise TrainingError(f"log_dir can't be made: {error}.") from error
        self._samples = self._total = 0.0

    def begin_epoch(self) -> None:
        """Start the sums of an epoch."""
        self._samples = self._total = 0.0

    def add_step(self, step: int, samples: float, total: float, groups: list[dict[str, Any]]) -> None:
        """Add the mean loss since the last point, from the samples and losses of the epoch so far; and the rates."""
        if samples > self._samples:
            self.writer.add_scalar("loss/train", (total - self._total) / (samples - self._samples), step)
            self._samples, self._total = samples, total
            for number, group in enumerate(groups):
                self.writer.add_scalar(f"lr/{number}", group["lr"], step)

    def add_epoch(self, row: Mapping[str, float]) -> None:
        """Add the row of an epoch; the tags `accuracy/train` and `accuracy/val` make one group."""
        step = int(row["step"])
        self.writer.add_scalar("samples_per_second", row["samples_per_second"], step)
        for name in row.keys() - {"loss", *NO_RESULT}:
            tag = f"{name[4:]}/val" if name.startswith("val_") else f"{name}/train"
            self.writer.add_scalar(tag, row[name], step)

    def add_histograms(self, model: nn.Module, step: int) -> None:
        """Add how the weights and their gradients are spread."""
        for name, parameter in model.named_parameters():
            self.writer.add_histogram(f"weights/{name}", parameter.detach().float(), step)
            if parameter.grad is not None:
                self.writer.add_histogram(f"gradients/{name}", parameter.grad.float(), step)

    def close(self) -> None:
        """Write what is buffered."""
        self.writer.close()
