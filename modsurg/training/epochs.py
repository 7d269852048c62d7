"""One epoch under way: its batches, one after another, and the step for each."""

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from modsurg.errors import BatchError, TrainingError
from modsurg.training import distributed as processes
from modsurg.training.batches import describe, move
from modsurg.training.error_messages import EXPECTED, check_scalar, explain, measured
from modsurg.training.metrics import Meter
from modsurg.training.samples import Samples, batch_lengths, count_samples

if TYPE_CHECKING:
    from modsurg.training.run import Run


class Epoch:
    """Iterate over it for batches that are on the device; call `step` with the loss of each.

    Attributes:
        number: Counted from 1.
        batch: The number of the batch, from 1; 0 before the first.
        moved: The last batch whose gradients are in the weights.
        meter: Sums of loss and metrics so far.
        row: What the history holds of it, once the batches are through.
        dropped: Whether the loader gave batches after `moved`, which come again when the run goes on.
    """

    def __init__(self, run: "Run", meter: Meter) -> None:
        self.run = run
        self.trainer = run.trainer
        self.window = run.window
        self.number = run.trainer.epoch + 1
        self.batch = self.moved = run.trainer.position.batch
        self.meter = meter
        self.row: dict[str, float] = {}
        self.seconds = 0.0
        self.complete = False
        self.closed = False
        self.dropped = False
        self._current: Any = None
        self._before = meter.samples

    def __iter__(self) -> Iterator[Any]:
        trainer, device = self.trainer, self.trainer.place
        if self.closed:
            raise TrainingError(f"epoch {self.number} is over: go through its batches once.")
        start = time.perf_counter()
        batches = self.run.open(self)
        if self.batch:
            start = time.perf_counter()  # what was seen before an interruption had to be skipped first
        try:
            for taken in batches:
                batch = move(taken, device)
                self.batch += 1
                self._current = batch
                if batch_lengths(batch) == (0,):
                    text = f"{self}: the batch {describe(batch)} holds no sample: leave it out of the loader."
                    raise BatchError(text)
                if trainer.world > 1 and trainer.wrapped != processes.trained(trainer.model):
                    trainer.prepare()  # DDP waits for the gradients of what trained when it was made
                yield batch
                if self.run.due and self.window.held == 0 and not trainer.stopping:
                    self.run.keep()
                if trainer.stopping and self.window.held == 0:
                    break
            else:
                self.complete = True
        finally:
            self.seconds = time.perf_counter() - start
        self.close()

    def forward(self, batch: Any) -> tuple[torch.Tensor, Any, Any]:
        """What `fit` does with a batch before `step`: loss, output and target, in the trainer's precision.

        Raises:
            BatchError: The model or the loss can't take the batch; the message names it and the fix.
        """
        return measured(self.trainer, self.trainer.runner, batch, self, look=self.batch == 1)

    def step(
        self,
        loss: torch.Tensor,
        output: Any = None,
        target: Any = None,
        *,
        samples: float | torch.Tensor | None = None,
    ) -> bool:
        """Backward; and when the window of `accumulate` batches is full, the optimizer's step and all that follows.

        Args:
            loss: A scalar, the mean over the batch.
            output: For the metrics, with `target`; without it they are left out.
            target: What the metrics compare with.
            samples: What the batch weighs, where it is not the number of its samples or its parts disagree.

        Returns:
            Whether the optimizer moved the weights.

        Raises:
            NonFiniteError: The loss is NaN or infinite; the weights are those of the last good step.
            TrainingError: Not between the batches of the epoch; backward failed.
        """
        trainer = self.trainer
        if not self.batch or self._current is None:
            text = f"{self}: the epoch gave no batch for this step: for inputs, target in epoch: epoch.step(...)."
            raise TrainingError(text)
        check_scalar(loss, self)
        said: Samples | float | torch.Tensor | None = trainer.samples if samples is None else samples
        try:
            weight = count_samples(self._current, output, said)
        except BatchError as error:
            raise BatchError(f"{self}: {error}") from error.__cause__
        trainer.watch.check(loss.detach(), trainer.step, self)
        joined = trainer.world > 1 and not trainer.sharded
        if joined:
            processes.check_forward(trainer.runner, self)
        try:
            full = self.window.backward(loss, weight)
        except EXPECTED as error:
            raise explain(error, trainer, self, None) from error
        if joined:
            processes.check_gradients(trainer.model, self)
        self.meter.add(loss, weight, output, target, self)
        if full:
            self.run.move(self)
            self.moved = self.batch
        if time.perf_counter() >= trainer.screen.next_look:
            trainer.watch.look()
            values = self.meter.means() | {"lr": trainer.optimizer.param_groups[0]["lr"]}
            trainer.screen.show(self.batch, self.fresh, values)
        return full

    def close(self) -> None:
        """End it: the last window, validation, schedule, files. Done by itself when the batches are through."""
        if self.closed:
            return
        self.closed = True
        if self.interrupted:
            self._go_back()
        elif self.window.held:
            self.run.move(self)
            for function in self.run.on_step:
                function(self.trainer)
        if self.complete and self.batch == 0:
            raise BatchError(f"epoch {self.number}: the train loader gave no batch; it must give at least one.")
        self.run.close(self)

    @property
    def fresh(self) -> float:
        """How many samples this process has seen of the epoch."""
        return self.meter.samples - self._before

    @property
    def interrupted(self) -> bool:
        """Whether the run was stopped before its last batch. A loop body that leaves early only shortens the epoch."""
        return bool(self.trainer.stopping) and not self.complete

    def _go_back(self) -> None:
        """To the last step: a loop body may have left with batches that made none."""
        self.window.drop()
        self.meter.drop()
        self.dropped = self.batch != self.moved
        self.batch = self.moved

    def __str__(self) -> str:
        return f"epoch {self.number}, batch {self.batch} (step {self.trainer.step + 1})"
