"""One call of `fit`: what happens before its first epoch, between the steps, between the epochs, and at its end."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import ReduceLROnPlateau

from modsurg.checkpoints.rng import seed
from modsurg.errors import TrainingError, counted
from modsurg.surgery.parameters import unfreeze
from modsurg.training import checkpointing as keeping
from modsurg.training import distributed as processes
from modsurg.training import evaluation
from modsurg.training import validation as checks
from modsurg.training.data import ResumableLoader, generators, length
from modsurg.training.epochs import Epoch
from modsurg.training.history import NO_RESULT
from modsurg.training.logs import Board
from modsurg.training.loop import Window
from modsurg.training.metrics import Meter, MetricSums, metric_columns
from modsurg.tree.selection import Where

if TYPE_CHECKING:
    from modsurg.training.trainer import Trainer

_SCALARS_EVERY = 50
_AGREE_EVERY = 16


class Run:
    """The epochs of one `fit`."""

    def __init__(
        self,
        trainer: "Trainer",
        train_loader: Iterable[Any],
        val_loader: Iterable[Any] | None,
        epochs: int,
        *,
        patience: int | None,
        restore_best: bool,
        min_delta: float,
        thaw: Mapping[int, Where],
        on_step: Any = None,
        on_epoch: Any = None,
    ) -> None:
        checks.check_loader(train_loader, "train_loader")
        if val_loader is not None:
            checks.check_loader(val_loader, "val_loader")
        checks.check_count("epochs", epochs, 1, "train for at least one epoch.")
        checks.check_count("patience", patience, 1, "how many epochs to wait, patience=None for no end.")
        checks.check_number("min_delta", min_delta)
        self.trainer = trainer
        self.val_loader = val_loader
        self.feed = ResumableLoader(
            processes.divided(train_loader, trainer.seed or 0) if trainer.world > 1 else train_loader
        )
        self.batches = length(train_loader)
        trainer.generators = generators(train_loader, val_loader)
        self.asked = self.end = epochs
        self.schedulers = trainer.schedulers
        self.patience = patience
        self.restore_best = restore_best
        self.min_delta = min_delta
        self._best: keeping.BestWeights | None = None
        self.thaw = thaw
        self.on_step = checks.as_functions("on_step", on_step)
        self.on_epoch = checks.as_functions("on_epoch", on_epoch)
        self.target, self.lower = _target(trainer, val_loader is not None)
        everywhere = trainer.place if trainer.world > 1 else None
        self.window = Window(trainer.optimizer, trainer.accumulate, trainer.clip_norm, trainer.scaler, everywhere)
        self.epoch: Epoch | None = None
        self.pending: dict[str, Any] | None = None
        self.due = self._improved = False
        self._logged = (0.0, 0.0)

    def epochs(self, resume: Any) -> Iterator[Epoch]:
        """The epochs from where the run is; see `Trainer.epochs`."""
        trainer, position = self.trainer, self.trainer.position
        self._begin(resume)
        with contextlib.ExitStack() as stack:
            stack.callback(self._end)
            stack.enter_context(_signals(trainer))
            if trainer.log_dir is not None and processes.rank() == 0:
                again = resume is not False or trainer.step > 0
                first = trainer.step + (self.pending is None)  # an epoch under way may have ended before the kill
                trainer.board = Board(trainer.log_dir, first if again else None)
            while position.epoch < self.end and not self._over():
                if self.pending is None:
                    self._thaw()
                meter, self._logged = Meter(trainer.named_metrics), (0.0, 0.0)
                if self.pending is not None:
                    sums = MetricSums(self.pending["sums"], self.pending["seen"], self.pending.get("objects", {}))
                    meter.load(sums, f"epoch {position.epoch + 1}")
                    if trainer.board is not None and trainer.step % _SCALARS_EVERY == 0:
                        self._scalars(trainer.board, meter)  # which the new writer took off
                trainer.watch.look()
                self.epoch = Epoch(self, meter)
                yield from self._lent(self.epoch)
            trainer.agree()
            if self.restore_best and not trainer.stopping:
                keeping.restore_best(trainer, self._best, self.target)

    def open(self, epoch: Epoch) -> Iterator[Any]:
        """The batches of an epoch, from where an interrupted run left it."""
        if self.pending is None:
            batches = self.feed.begin(epoch.number - 1)
        else:
            batches = self.feed.again(epoch.number - 1, epoch.batch, self.pending["states"], self.pending["loader"])
            self.pending = None
        self.trainer.screen.begin(epoch.number, self.end, epoch.batch, len(self.feed))
        return batches

    def move(self, epoch: Epoch) -> None:
        """Let the optimizer move the weights, and all that follows a step."""
        trainer = self.trainer
        self.window.step()
        epoch.meter.keep()
        trainer.position.step += 1
        if trainer.average is not None:
            trainer.average.update_parameters(trainer.model)
        if "step" in self.schedulers:
            self._schedule("step", epoch)
        step = trainer.step
        if trainer.world > 1 and step % _AGREE_EVERY == 0:
            trainer.agree()
        if trainer.board is not None and step % _SCALARS_EVERY == 0:
            self._scalars(trainer.board, epoch.meter)
        if trainer.save_every and step % trainer.save_every == 0:
            self.due = True

    def close(self, epoch: Epoch) -> None:
        """The batches of an epoch are through, or the run was stopped within it."""
        trainer = self.trainer
        trainer.screen.close()
        trainer.watch.look()
        trainer.agree()
        if epoch.interrupted:
            self.keep()
            return
        self.pending = None
        row = epoch.row
        row |= {"epoch": epoch.number, "step": trainer.step} | epoch.meter.results(trainer.place)
        if self.val_loader is not None:
            model = trainer.model if trainer.average is None else trainer.average
            means = evaluation.evaluate(trainer, self.val_loader, model)
            row |= {f"val_{name}": value for name, value in means.items()}
        row["lr"] = trainer.optimizer.param_groups[0]["lr"]
        row |= {"seconds": epoch.seconds, "samples_per_second": epoch.fresh / max(epoch.seconds, 1e-9)}
        missing = [name for name in ("loss", self.target) if name not in row]
        if missing:
            text = f"epoch {epoch.number}: no {missing[0]}: epoch.step(loss, output, target) gives it"
            raise TrainingError(f"{text}; there are {', '.join(name for name in row if name not in NO_RESULT)}.")
        scheduler = self.schedulers.get("epoch")
        if scheduler is not None:
            self._schedule("epoch", epoch, *[row[self.target]] if isinstance(scheduler, ReduceLROnPlateau) else [])
        trainer.history.rows.append(row)
        value = row[self.target] if self.lower else -row[self.target]
        self._improved = trainer.position.advance(value, self.min_delta)
        if self._improved and self.restore_best:
            self._best = keeping.BestWeights(trainer)
        trainer.screen.end(row)
        if trainer.board is not None:
            if trainer.step % _SCALARS_EVERY:
                self._scalars(trainer.board, epoch.meter)
            trainer.board.epoch(row)
            evaluation.draw(trainer, trainer.board, self.feed.loader if self.val_loader is None else self.val_loader)
        self.due = True

    def keep(self) -> None:
        """Write the files, when all that follows a step or an epoch is done: a run that goes on does not repeat it."""
        self.due = False
        if self.trainer.checkpoint_dir is not None:
            if self.trainer.board is not None:
                self.trainer.board.writer.flush()  # what the file counts as done is seen on the board
            self.trainer.watch.check_weights(self.trainer.step)
            keeping.rotate(self.trainer, self.left(), self._improved, self.batches)
        self._improved = False

    def keep_best(self) -> None:
        """Write `best` before an edit, if the epoch that has just ended was it: an edited model is not measured."""
        if self._improved and self.trainer.checkpoint_dir is not None and not self.trainer.sharded:
            keeping.save(self.trainer, Path(self.trainer.checkpoint_dir, keeping.BEST), self.left(), self.batches)
            self._improved = False

    def left(self) -> dict[str, Any] | None:
        """What is left of the epoch under way: random states at its beginning, the loader's position, sums so far.

        Raises:
            TrainingError: Between the batches of one step, whose gradients no file holds.
        """
        if self.pending is not None:
            return self.pending
        epoch = self.epoch
        if epoch is None or epoch.row or not epoch.batch:
            self.trainer.position.batch = 0
            return None
        if self.window.held:
            held = counted(self.window.held, "gradient waits", "gradients wait")
            raise TrainingError(f"{epoch}: {held} for a step; save from on_step.")
        self.trainer.position.batch = epoch.batch
        place = {"states": self.feed.states, "loader": None if epoch.dropped else self.feed.position()}
        return place | vars(epoch.meter.state())

    def _lent(self, epoch: Epoch) -> Iterator[Epoch]:
        """Give an epoch to the loop, and see to what follows it."""
        try:
            yield epoch
        except GeneratorExit:  # the loop was left; its last epoch is kept if the batches were through
            if epoch.row and self.due:
                self.keep()
            raise
        epoch.close()
        try:
            for function in self.on_epoch if epoch.row else ():
                function(self.trainer)
        finally:
            if self.due:
                self.keep()

    def _begin(self, resume: Any) -> None:
        trainer = self.trainer
        trainer.stopping = trainer.wanted = trainer.history.stopped = ""
        file = keeping.find(trainer, resume)
        if file is None:
            if resume is True:
                trainer.screen.line(
                    f"no {keeping.LAST} in {trainer.checkpoint_dir} yet: the run begins with its first step"
                )
            trainer.position.restart()
            self.end = self.asked + (trainer.epoch if resume is False else 0)
            if trainer.seed is not None and trainer.step == 0:
                seed(trainer.seed + processes.rank())
        else:
            self.pending = keeping.resume(trainer, file, self.batches)
            if trainer.epoch < self.end:
                text = f"going on from {file}: epoch {trainer.epoch + 1}, step {trainer.step}"
            else:
                done = counted(trainer.epoch, "finished epoch", "finished epochs")
                text = f"nothing to do: {file} has {done}, step {trainer.step}, and epochs={self.end} counts them all"
            trainer.screen.line(text)
        trainer.position.aim(self.target)
        trainer.running = self
        checks.check_run(self)
        self.window.drop()  # gradients that somebody left behind are not this run's
        if not trainer.model.training:
            trainer.model.train()

    def _over(self) -> bool:
        trainer, stale = self.trainer, self.trainer.position.stale
        if self.patience is not None and stale >= self.patience and not trainer.stopping:
            trainer.history.stopped = f"{self.target} did not get better for {stale} epochs"
        return bool(trainer.stopping or trainer.history.stopped)

    def _say_why(self) -> None:
        """Say why the run ended early, whichever way it ended: a stop may come in the last validation or on_epoch."""
        trainer = self.trainer
        trainer.history.stopped = trainer.stopping or trainer.wanted or trainer.history.stopped
        if trainer.history.stopped:
            reason = "Ctrl-C" if trainer.history.stopped == "SIGINT" else trainer.history.stopped
            told = f"stopped at step {trainer.step} ({reason})"
            trainer.screen.line(f"{told}{keeping.way_on(trainer) if trainer.stopping else ''}")

    def _thaw(self) -> None:
        done = self.trainer.position.epoch - self.trainer.position.start
        for epoch, where in sorted(self.thaw.items()):
            if epoch <= done:
                unfreeze(self.trainer.model, where)

    def _schedule(self, when: str, epoch: Epoch, *value: float) -> None:
        """Step a scheduler. Some refuse to go past their end, which is not foreseen for a loader without a length."""
        try:
            self.schedulers[when].step(*value)
        except ValueError as error:
            kind, steps = type(self.schedulers[when]).__name__, self.trainer.step
            text = f"{epoch}: {kind} can't go on: {error}"
            raise TrainingError(f"{text}. Try: {kind}(..., total_steps=...) with more than {steps} steps.") from error

    def _scalars(self, board: Board, meter: Meter) -> None:
        meter.read()
        if meter.samples == self._logged[0]:
            return
        (samples, total), self._logged = self._logged, (meter.samples, meter.sums["loss"])
        rates = {f"lr/{i}": group["lr"] for i, group in enumerate(self.trainer.optimizer.param_groups)}
        recent = (meter.sums["loss"] - total) / max(meter.samples - samples, 1)
        board.scalars({"loss/train": recent, **rates}, self.trainer.step)

    def _end(self) -> None:
        trainer = self.trainer
        trainer.screen.close()
        self._say_why()
        if trainer.board is not None:
            trainer.board.close(trainer)
            trainer.board = None
        self.window.drop()
        self.feed.close()
        epoch = self.epoch
        if self.pending is None and (epoch is None or epoch.row or epoch.moved != epoch.batch):
            trainer.running, trainer.position.batch = None, 0  # no epoch is under way, or a batch of it is lost


@contextlib.contextmanager
def _signals(trainer: "Trainer") -> Iterator[None]:
    """Let the first Ctrl-C or SIGTERM end the run after the step; the second Ctrl-C ends it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    process = os.getpid()

    def handle(number: int, frame: object) -> None:
        if os.getpid() != process:  # a worker that was forked from here: only its parent says when it ends
            return
        if trainer.stopping and number == signal.SIGINT:
            raise KeyboardInterrupt
        trainer.stop(signal.Signals(number).name)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _target(trainer: "Trainer", validated: bool) -> tuple[str, bool]:
    """The name of the value that says what is best, and whether lower is better."""
    default = "val_loss" if validated else "loss"
    how, _, name = (trainer.best or default).rpartition(":")
    columns, may_be_more = metric_columns(trainer.named_metrics)
    names = ["loss", *columns]
    names += [f"val_{name}" for name in names] if validated else []
    if (name not in names and not may_be_more) or how not in ("", "min", "max"):
        raise TrainingError(f"best={trainer.best!r} is not measured; there are {', '.join(names)}.")
    return name, how == "min" if how else name.endswith(("loss", "error", "mse", "mae", "perplexity"))
