"""One call of `fit`: its epochs, the batches of each, and what follows a step, an epoch and the end."""

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from modsurg.checkpoints.formats.remote import path_in
from modsurg.checkpoints.rng import seed
from modsurg.errors import BatchError, TrainingError, counted
from modsurg.surgery.parameters import unfreeze
from modsurg.training import checkpointing, distributed
from modsurg.training.accumulation import GradientWindow
from modsurg.training.batches import describe, move
from modsurg.training.best_weights import BEST, BestWeights, choose_target
from modsurg.training.data import ResumableLoader, generators, length
from modsurg.training.distributed_data import split_training
from modsurg.training.error_messages import EXPECTED, check_scalar, explain_backward
from modsurg.training.evaluation import compute_loss, evaluate
from modsurg.training.history import NO_RESULT, History
from modsurg.training.loader_checks import check_loader
from modsurg.training.metrics import Meter
from modsurg.training.nan_checks import LossCheck, check_weights
from modsurg.training.progress_display import ProgressDisplay
from modsurg.training.samples import batch_lengths, count_samples
from modsurg.training.schedules import check_schedules, check_steps
from modsurg.training.state import RunOptions, Runtime, TrainingState
from modsurg.training.stopping import StopRequest, stop_on_signals
from modsurg.training.tensorboard import EVERY, TensorBoard
from modsurg.training.validation import check_count, check_number, check_parameters

_AGREE_EVERY = 16


class TrainingLoop:
    """The epochs of one `fit`. It owns the progress of the run while it goes on.

    Attributes:
        epoch: The one under way, or the last.
        board: TensorBoard, in the process that writes.
        edits: How many edits the file records from which the run went on.
    """

    def __init__(
        self,
        state: TrainingState,
        runtime: Runtime,
        options: RunOptions,
        train_loader: Iterable[Any],
        val_loader: Iterable[Any] | None,
        stop: StopRequest,
        display: ProgressDisplay,
    ) -> None:
        check_loader(train_loader, "train_loader")
        if val_loader is not None:
            check_loader(val_loader, "val_loader")
        check_count("epochs", options.epochs, 1, "train for at least one epoch.")
        check_count("patience", options.patience, 1, "how many epochs to wait, patience=None for no end.")
        check_number("min_delta", options.min_delta)
        self.state, self.runtime, self.options = state, runtime, options
        self.progress, self.stop, self.display = state.progress, stop, display
        self.val_loader = val_loader
        split = split_training(train_loader, options.seed or 0) if runtime.world > 1 else train_loader
        self.loader = ResumableLoader(split)
        state.generators = generators(train_loader, val_loader)
        state.options["batches in an epoch"] = length(train_loader)
        self.end = options.epochs
        self.target, self.lower = choose_target(options.best, options.metrics, validated=val_loader is not None)
        together = runtime.world > 1 and (options.accumulate > 1 or options.samples is not None)
        everywhere = runtime.device if together else None
        self.window = GradientWindow(state.optimizer, options.accumulate, options.clip_norm, state.scaler, everywhere)
        self.losses = LossCheck(runtime.device)
        self.epoch: Epoch | None = None
        self.board: TensorBoard | None = None
        self.edits = 0
        self.due = self._improved = False
        self._stopped = ""
        self._best: BestWeights | None = None

    def epochs(self, history: History) -> Iterator["Epoch"]:
        """Give the epochs from where the run is; see `Trainer.epochs`."""
        self._begin()
        with contextlib.ExitStack() as stack:
            stack.callback(self._end, history)
            stack.enter_context(stop_on_signals(self.stop))
            self._open_board()
            while self.progress.epoch < self.end and not self._is_over():
                if self.progress.rest is None:
                    self._thaw()
                self.epoch = self._make_epoch()
                yield from self._give_epoch(self.epoch)
            self.stop.agree(self.runtime.device)
            if self.options.restore_best and not self.stop.reason:
                best = self._best or BestWeights.read(self.state, self.options.checkpoint_dir)
                if told := BestWeights.restore(best, self.state):
                    self.display.line(told)

    def open_batches(self, epoch: "Epoch") -> Iterator[Any]:
        """Give the batches of an epoch, from where an interrupted run left it."""
        rest = self.progress.rest
        if rest is None:
            batches = self.loader.begin(epoch.number - 1)
        else:
            batches = self.loader.resume(epoch.number - 1, epoch.batch, rest["states"], rest["loader"])
        self.display.begin(epoch.number, self.end, epoch.batch, len(self.loader))
        return batches

    def make_step(self, epoch: "Epoch") -> None:
        """Let the optimizer move the weights, and do all that follows a step."""
        state, step = self.state, self.progress.step + 1
        self.window.step()
        epoch.meter.keep()
        epoch.stepped = epoch.batch
        self.progress.step = step
        if state.average is not None:
            state.average.update_parameters(state.model)
        if "step" in state.schedulers:
            self._step_scheduler("step", epoch)
        if self.runtime.world > 1 and step % _AGREE_EVERY == 0:
            self.stop.agree(self.runtime.device)
        if self.board is not None and step % EVERY == 0:
            self._log_step(self.board, epoch.meter)
        if self.options.save_every and step % self.options.save_every == 0:
            self.due = True

    def after_step(self) -> None:
        """Call the functions of `on_step`."""
        for function in self.options.on_step:
            function()

    def end_epoch(self, epoch: "Epoch") -> None:
        """Validate, schedule and note down an epoch whose batches are through; write files if it was interrupted."""
        self.display.close()
        self.losses.read()
        self.stop.agree(self.runtime.device)
        if epoch.interrupted:
            self.write_files()
            return
        row = self._make_row(epoch)
        scheduler = self.state.schedulers.get("epoch")
        if scheduler is not None:
            plateau = isinstance(scheduler, ReduceLROnPlateau)
            self._step_scheduler("epoch", epoch, *[row[self.target]] if plateau else [])
        self.progress.rows.append(row)
        value = row[self.target] if self.lower else -row[self.target]
        self._improved = self.progress.end_epoch(value, self.options.min_delta)
        if self._improved and self.options.restore_best:
            self._best = BestWeights.copy(self.state)
        self.display.end(row)
        if self.board is not None:
            if self.progress.step % EVERY:
                self._log_step(self.board, epoch.meter)
            self.board.add_epoch(row)
        self.due = True

    def write_files(self) -> None:
        """Write the files, when all that follows a step or an epoch is done: a run that goes on does not repeat it."""
        self.due = False
        if self.options.checkpoint_dir is not None:
            if self.board is not None:
                self.board.writer.flush()  # what the file counts as done is seen on the board
            check_weights(self.state.model, self.progress.step)
            self.record_position()
            checkpointing.rotate(
                self.state,
                self.runtime,
                self.options.checkpoint_dir,
                improved=self._improved,
                numbered=self.options.keep,
            )
        self._improved = False

    def write_best(self) -> None:
        """Write `best` before an edit, if the epoch that has just ended was it: an edited model is not measured."""
        if self._improved and self.options.checkpoint_dir is not None and not self.runtime.sharded:
            self.record_position()
            checkpointing.save(self.state, self.runtime, path_in(self.options.checkpoint_dir, BEST))
            self._improved = False

    def record_position(self) -> None:
        """Bring the progress up to date with the epoch under way.

        Raises:
            TrainingError: Between the batches of one step, whose gradients no file holds.
        """
        epoch = self.epoch
        if epoch is None or not epoch.opened:
            return
        if epoch.row or not epoch.batch:
            self.progress.batch, self.progress.rest = 0, None
            return
        if self.window.held:
            held = counted(self.window.held, "gradient waits", "gradients wait")
            raise TrainingError(f"{epoch}: {held} for a step; save from on_step.")
        self.progress.batch = epoch.batch
        position = None if epoch.dropped else self.loader.position()
        self.progress.rest = {"states": self.loader.states, "loader": position} | epoch.meter.state()

    def _begin(self) -> None:
        options, progress = self.options, self.progress
        self.stop.clear()
        file = checkpointing.find_checkpoint(options.checkpoint_dir, options.resume, sharded=self.runtime.sharded)
        if file is None:
            if options.resume is True:
                name = f"{checkpointing.LAST} in {options.checkpoint_dir}"
                self.display.line(f"no {name} yet: the run begins with its first step")
            progress.restart()
            self.end += progress.epoch if options.resume is False else 0
            if options.seed is not None and progress.step == 0:
                seed(options.seed + distributed.rank())
        else:
            self.edits = checkpointing.resume_run(self.state, self.runtime, file, options.trust)
            text = f"going on from {file}: epoch {progress.epoch + 1}, step {progress.step}"
            if progress.epoch >= self.end:
                done = counted(progress.epoch, "finished epoch", "finished epochs")
                text = f"nothing to do: {file} has {done}, step {progress.step}, and epochs={self.end} counts them all"
            self.display.line(text)
        progress.set_target(self.target)
        self._check()
        self.window.drop()  # gradients that somebody left behind are not this run's
        if not self.state.model.training:
            self.state.model.train()

    def _check(self) -> None:
        """Look at what can be seen before the first step."""
        state, epochs = self.state, self.end - self.progress.epoch
        check_parameters(state, self.runtime.device, self.options.thaw)
        check_schedules(state.schedulers, state.optimizer, self.target, lower=self.lower, epochs=epochs)
        batches = length(self.loader.loader)
        if batches is not None:
            seen, accumulate = self.progress.batch, self.options.accumulate
            check_steps(state.schedulers, epochs=epochs, batches=batches, seen=seen, accumulate=accumulate)

    def _open_board(self) -> None:
        if self.options.log_dir is None or distributed.rank() != 0:
            return
        step = self.progress.step
        again = self.options.resume is not False or step > 0
        first = step + (self.progress.rest is None)  # an epoch under way may have ended before the run was killed
        self.board = TensorBoard(self.options.log_dir, first if again else None)

    def _make_epoch(self) -> "Epoch":
        meter, rest = Meter(self.options.metrics), self.progress.rest
        if self.board is not None:
            self.board.begin_epoch()
        if rest is not None:
            meter.load(rest, f"epoch {self.progress.epoch + 1}")
            if self.board is not None and self.progress.step % EVERY == 0:
                self._log_step(self.board, meter)  # which the new writer took off
        return Epoch(self, meter)

    def _give_epoch(self, epoch: "Epoch") -> Iterator["Epoch"]:
        """Give an epoch to the loop body, and see to what follows it."""
        try:
            yield epoch
        except GeneratorExit:  # the body was left; its last epoch is kept if the batches were through
            if epoch.row and self.due:
                self.write_files()
            raise
        epoch.close()
        try:
            for function in self.options.on_epoch if epoch.row else ():
                function()
        finally:
            if self.due:
                self.write_files()

    def _make_row(self, epoch: "Epoch") -> dict[str, float]:
        state, options = self.state, self.options
        row = epoch.row
        row |= {"epoch": epoch.number, "step": self.progress.step} | epoch.meter.results(self.runtime.device)
        if self.val_loader is not None:
            model = state.model if state.average is None else state.average
            means = evaluate(state, self.runtime, self.val_loader, model, options.metrics, options.samples)
            row |= {f"val_{name}": value for name, value in means.items()}
        row["lr"] = state.optimizer.param_groups[0]["lr"]
        row |= {"seconds": epoch.seconds, "samples_per_second": epoch.samples / max(epoch.seconds, 1e-9)}
        missing = [name for name in ("loss", self.target) if name not in row]
        if missing:
            names = ", ".join(name for name in row if name not in NO_RESULT)
            text = f"epoch {epoch.number}: no {missing[0]}: epoch.step(loss, output, target) gives it"
            raise TrainingError(f"{text}; there are {names}.")
        return row

    def _step_scheduler(self, when: str, epoch: "Epoch", *value: float) -> None:
        """Step a scheduler. Some refuse to go past their end, which is not foreseen for a loader without a length."""
        try:
            self.state.schedulers[when].step(*value)
        except ValueError as error:
            kind, steps = type(self.state.schedulers[when]).__name__, self.progress.step
            text = f"{epoch}: {kind} can't go on: {error}"
            raise TrainingError(f"{text}. Try: {kind}(..., total_steps=...) with more than {steps} steps.") from error

    def _log_step(self, board: TensorBoard, meter: Meter) -> None:
        meter.read()
        board.add_step(self.progress.step, meter.samples, meter.sums["loss"], self.state.optimizer.param_groups)

    def _is_over(self) -> bool:
        stale, patience = self.progress.stale, self.options.patience
        if patience is not None and stale >= patience and not self.stop.reason:
            self._stopped = f"{self.target} did not get better for {stale} epochs"
        return bool(self.stop.reason or self._stopped)

    def _thaw(self) -> None:
        done = self.progress.epoch - self.progress.start
        for epoch, where in sorted(self.options.thaw.items()):
            if epoch <= done:
                unfreeze(self.state.model, where)

    def _end(self, history: History) -> None:
        """Say why the run ended early, whichever way it ended: a stop may come in the last validation or on_epoch."""
        self.display.close()
        history.stopped = self.stop.reason or self.stop.wanted or self._stopped
        if history.stopped:
            told = f"stopped at step {self.progress.step} ({history.stopped.replace('SIGINT', 'Ctrl-C')})"
            hint = checkpointing.resume_hint(self.options.checkpoint_dir, sharded=self.runtime.sharded)
            self.display.line(f"{told}{hint if self.stop.reason else ''}")
        if self.board is not None:
            self.board.close()
            self.board = None
        self.window.drop()
        if self.epoch is not None and self.epoch.opened:
            if self.epoch.stepped == self.epoch.batch:
                self.record_position()
            else:  # a batch of it is lost
                self.progress.batch, self.progress.rest = 0, None
        self.loader.close()


class Epoch:
    """Iterate over it for batches that are on the device; call `step` with the loss of each.

    Attributes:
        number: Counted from 1.
        batch: The number of the batch, from 1; 0 before the first.
        stepped: The last batch whose gradients are in the weights.
        meter: Sums of loss and metrics so far.
        row: What the history holds of it, once the batches are through.
        dropped: Whether the loader gave batches after `stepped`, which come again when the run goes on.
    """

    def __init__(self, loop: TrainingLoop, meter: Meter) -> None:
        self.loop, self.meter = loop, meter
        self.number = loop.progress.epoch + 1
        self.batch = self.stepped = loop.progress.batch
        self.row: dict[str, float] = {}
        self.seconds = 0.0
        self.opened = self.complete = self.closed = self.dropped = False
        self._current: Any = None
        self._before = meter.samples

    def __iter__(self) -> Iterator[Any]:
        loop, runtime = self.loop, self.loop.runtime
        if self.closed:
            raise TrainingError(f"epoch {self.number} is over: go through its batches once.")
        start = time.perf_counter()
        batches = loop.open_batches(self)
        self.opened = True
        if self.batch:
            start = time.perf_counter()  # what was seen before an interruption had to be skipped first
        try:
            for given in batches:
                batch = move(given, runtime.device)
                self.batch += 1
                self._current = batch
                if batch_lengths(batch) == (0,):
                    text = f"{self}: the batch {describe(batch)} holds no sample: leave it out of the loader."
                    raise BatchError(text)
                if runtime.world > 1 and runtime.trains != distributed.trainable(loop.state.model):
                    runtime.prepare(loop.state.model)  # DDP waits for the gradients of what trained when it was made
                yield batch
                if loop.due and loop.window.held == 0 and not loop.stop.reason:
                    loop.write_files()
                if loop.stop.reason and loop.window.held == 0:
                    break
            else:
                self.complete = True
        finally:
            self.seconds = time.perf_counter() - start
        self.close()

    def forward(self, batch: Any) -> tuple[torch.Tensor, Any, Any]:
        """Do what `fit` does with a batch before `step`: give loss, output and target, in the trainer's precision.

        Raises:
            BatchError: The model or the loss can't take the batch; the message names it and the fix.
        """
        runtime = self.loop.runtime
        return compute_loss(self.loop.state, runtime, runtime.runner, batch, self, first=self.batch == 1)

    def step(
        self,
        loss: torch.Tensor,
        output: Any = None,
        target: Any = None,
        *,
        samples: float | torch.Tensor | None = None,
    ) -> bool:
        """Run backward; when the window of `accumulate` batches is full, make the step and do all that follows.

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
        loop, model = self.loop, self.loop.state.model
        if self._current is None:
            text = f"{self}: the epoch gave no batch for this step: for inputs, target in epoch: epoch.step(...)."
            raise TrainingError(text)
        check_scalar(loss, self)
        weight = count_samples(self._current, output, loop.options.samples if samples is None else samples, self)
        if weight or loop.runtime.world > 1:
            loop.losses.check(loss.detach(), loop.progress.step, self, model)
        joined = loop.runtime.world > 1 and not loop.runtime.sharded
        if joined:
            distributed.check_forward(loop.runtime.runner, self)
        try:
            full = loop.window.backward(loss, weight)
        except EXPECTED as error:
            raise explain_backward(error, model, self) from error
        if joined:
            distributed.check_gradients(model, self)
        self.meter.add(loss, weight, output, target, self)
        if full:
            loop.make_step(self)
        if time.perf_counter() >= loop.display.next_look:
            loop.losses.read()
            values = self.meter.means() | {"lr": loop.state.optimizer.param_groups[0]["lr"]}
            loop.display.show(self.batch, self.samples, values)
        return full

    def close(self) -> None:
        """End it: the last window, validation, schedule, files. Done by itself when the batches are through."""
        if self.closed:
            return
        self.closed = True
        if self.interrupted:  # back to the last step: a loop body may have left with batches that made none
            self.loop.window.drop()
            self.meter.drop()
            self.dropped = self.batch != self.stepped
            self.batch = self.stepped
        elif self.loop.window.held:
            self.loop.make_step(self)
            self.loop.after_step()
        if self.complete and self.batch == 0:
            raise BatchError(f"epoch {self.number}: the train loader gave no batch; it must give at least one.")
        self.loop.end_epoch(self)

    @property
    def samples(self) -> float:
        """How many samples this process has seen of the epoch."""
        return self.meter.samples - self._before

    @property
    def interrupted(self) -> bool:
        """Whether the run was stopped before its last batch. A loop body that leaves early only shortens the epoch."""
        return bool(self.loop.stop.reason) and not self.complete

    def __str__(self) -> str:
        return f"epoch {self.number}, batch {self.batch} (step {self.loop.progress.step + 1})"
