"""One call of `fit`: what happens before its first epoch, between the steps, between the epochs, and at its end."""

import contextlib
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from modsurg.errors import ModsurgWarning, TrainingError
from modsurg.surgery.parameters import unfreeze
from modsurg.training import evaluation, keeping, processes
from modsurg.training.devices import kept_memory
from modsurg.training.epochs import Epoch
from modsurg.training.loaders import Feed, check_loader, length
from modsurg.training.logs import Board
from modsurg.training.loop import Meter, Window, check_length
from modsurg.training.trouble import check_parameters
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
        thaw: Mapping[int, Where],
    ) -> None:
        check_loader(train_loader, "train_loader")
        if val_loader is not None:
            check_loader(val_loader, "val_loader")
        self.trainer = trainer
        self.val_loader = val_loader
        self.feed = Feed(processes.divided(train_loader, trainer.seed or 0) if trainer.world > 1 else train_loader)
        self.total = epochs
        self.schedulers = trainer.schedulers
        self.patience = patience
        self.thaw = thaw
        self.target, self.lower = _target(trainer, val_loader is not None)
        self.window = Window(trainer.optimizer, trainer.accumulate, trainer.clip_norm, trainer.scaler)
        self.epoch: Epoch | None = None
        self.pending: keeping.Interrupted | None = None
        self._logged = (0, 0.0)

    def epochs(self, resume: Any) -> Iterator[Epoch]:
        """The epochs from where the run is; see `Trainer.epochs`."""
        trainer = self.trainer
        self._begin(resume)
        with contextlib.ExitStack() as stack:
            stack.callback(self._end)
            stack.enter_context(kept_memory(trainer.place, on=trainer.keep_memory))
            stack.enter_context(_signals(trainer))
            if trainer.log_dir is not None and processes.rank() == 0:
                trainer.board = Board(trainer.log_dir)
            position = trainer.position
            while position.epoch < position.start + self.total and not self._over():
                self._thaw()
                epoch = self._epoch()
                yield epoch
                epoch.close()

    def open(self, epoch: Epoch) -> Iterator[Any]:
        """The batches of an epoch, from where an interrupted run left it."""
        if self.pending is None:
            return self.feed.begin(epoch.number - 1)
        left, self.pending = self.pending, None
        return self.feed.again(epoch.number - 1, epoch.batch, left.states, left.loader)

    def stepped(self, epoch: Epoch) -> None:
        """The optimizer has moved the weights."""
        trainer = self.trainer
        trainer.position.step += 1
        if trainer.average is not None:
            trainer.average.update_parameters(trainer.model)
        if "step" in self.schedulers:
            self.schedulers["step"].step()
        step = trainer.step
        if trainer.world > 1 and step % _AGREE_EVERY == 0:
            trainer.agree()
        if trainer.board is not None and step % _SCALARS_EVERY == 0:
            self._scalars(trainer.board, epoch)
        if trainer.save_every and step % trainer.save_every == 0 and not trainer.stopping:
            self._save(epoch)

    def close(self, epoch: Epoch) -> None:
        """The batches of an epoch are through, or the run was stopped within it."""
        trainer = self.trainer
        trainer.screen.close()
        trainer.watch.look()
        trainer.agree()
        if epoch.interrupted:
            self._save(epoch)
            return
        row = epoch.row
        row |= {"epoch": epoch.number, "step": trainer.step} | epoch.meter.means(trainer.place)
        if self.val_loader is not None:
            model = trainer.model if trainer.average is None else trainer.average
            row |= {
                f"val_{name}": value for name, value in evaluation.evaluate(trainer, self.val_loader, model).items()
            }
        row["lr"] = trainer.optimizer.param_groups[0]["lr"]
        row["seconds"] = epoch.seconds
        row["samples_per_second"] = epoch.speed
        self._schedule(row)
        trainer.history.rows.append(row)
        improved = trainer.position.advance(row[self.target] if self.lower else -row[self.target])
        trainer.screen.end(row)
        if trainer.board is not None:
            self._report(trainer.board, row)
        self._save(None, improved)

    def left(self) -> keeping.Interrupted | None:
        """What is left of the epoch under way.

        Raises:
            TrainingError: Between the batches of one step, whose gradients no file holds.
        """
        if self.epoch is None or self.epoch.closed or not self.epoch.batch:
            return None
        if self.window.held:
            raise TrainingError(f"{self.epoch}: {self.window.held} gradients wait for their step; save from on_step.")
        return self._left(self.epoch)

    def _begin(self, resume: Any) -> None:
        trainer = self.trainer
        trainer.stopping = trainer.wanted = trainer.history.stopped = ""
        check_parameters(trainer.model, trainer.place)
        file = keeping.find(trainer, resume)
        if file is None:
            trainer.position.restart()
            if trainer.seed is not None and trainer.step == 0:
                _seed(trainer.seed + processes.rank())
        else:
            self.pending = keeping.resume(trainer, file)
            trainer.screen.line(f"going on from {file}: epoch {trainer.epoch + 1}, step {trainer.step}")
        trainer.running = self
        self._check()
        self.window.drop()  # gradients that somebody left behind are not this run's
        if not trainer.model.training:
            trainer.model.train()

    def _check(self) -> None:
        trainer = self.trainer
        if self.total < 1:
            raise TrainingError(f"epochs={self.total}: train for at least one epoch.")
        batches = length(self.feed.loader)
        if batches is not None and trainer.position.batch == 0:
            epochs = trainer.position.start + self.total - trainer.epoch
            check_length(self.schedulers, epochs * -(-batches // trainer.accumulate))
        held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
        names = {id(p): name for name, p in trainer.model.named_parameters()}
        lost = [name for name, p in trainer.model.named_parameters() if p.requires_grad and id(p) not in held]
        if lost:
            _warn(f"{_some(lost)} in no optimizer and will not train: modsurg.sync(optimizer, model), or freeze them.")
        inside = {id(p) for m in (trainer.loss,) if isinstance(m, nn.Module) for p in m.parameters()}
        foreign = [p for group in trainer.optimizer.param_groups for p in group["params"] if id(p) not in names]
        foreign = [p for p in foreign if id(p) not in inside]
        if foreign and not held & set(names):
            raise TrainingError("the optimizer holds no parameter of this model: make it from model.parameters().")
        if foreign:
            _warn(f"{len(foreign)} parameters in the optimizer are not the model's: modsurg.sync(optimizer, model).")

    def _over(self) -> bool:
        trainer = self.trainer
        if not trainer.stopping and self.patience is not None and trainer.position.stale >= self.patience:
            trainer.history.stopped = f"{self.target} did not get better for {trainer.position.stale} epochs"
            return True
        if trainer.stopping:
            trainer.history.stopped = trainer.stopping
        return bool(trainer.stopping)

    def _epoch(self) -> Epoch:
        trainer = self.trainer
        meter = Meter(trainer.named_metrics)
        left = self.pending
        if left is not None:
            meter.samples = left.samples
            meter.sums |= left.sums
        position = trainer.position
        trainer.watch.look()
        trainer.screen.begin(position.epoch + 1, position.start + self.total, position.batch, len(self.feed))
        self._logged = (meter.samples, 0.0)
        self.epoch = Epoch(self, position.epoch + 1, self.window, meter, position.batch)
        return self.epoch

    def _thaw(self) -> None:
        done = self.trainer.position.epoch - self.trainer.position.start
        for epoch, where in sorted(self.thaw.items()):
            if epoch <= done:
                unfreeze(self.trainer.model, where)
        if self.trainer.world > 1 and done in self.thaw:
            self.trainer.prepare()

    def _schedule(self, row: Mapping[str, float]) -> None:
        scheduler = self.schedulers.get("epoch")
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(row[self.target])
        elif scheduler is not None:
            scheduler.step()

    def _scalars(self, board: Board, epoch: Epoch) -> None:
        samples, total = self._logged
        self._logged = (epoch.meter.samples, epoch.meter.read()["loss"])
        rates = {f"lr/{i}": group["lr"] for i, group in enumerate(self.trainer.optimizer.param_groups)}
        recent = (self._logged[1] - total) / max(self._logged[0] - samples, 1)
        board.scalars({"loss": recent, **rates}, self.trainer.step)

    def _report(self, board: Board, row: Mapping[str, float]) -> None:
        trainer = self.trainer
        values = {name: value for name, value in row.items() if name not in ("epoch", "step", "loss", "lr", "seconds")}
        board.scalars({"epoch/loss": row["loss"], **values}, trainer.step)
        evaluation.draw(trainer, board, self.val_loader if self.val_loader is not None else self.feed.loader)

    def _save(self, epoch: Epoch | None, improved: bool = False) -> None:
        trainer = self.trainer
        if trainer.checkpoint_dir is None:
            return
        trainer.watch.check_weights(trainer.step)
        keeping.rotate(trainer, self._left(epoch) if epoch else None, improved)

    def _left(self, epoch: Epoch) -> keeping.Interrupted:
        self.trainer.position.batch = epoch.batch
        return keeping.Interrupted(self.feed.states, self.feed.position(), epoch.meter.samples, epoch.meter.read())

    def _end(self) -> None:
        trainer = self.trainer
        trainer.screen.close()
        if trainer.board is not None:
            if len(trainer.history):
                aside = {"epoch", "step", "lr", "seconds", "samples_per_second"}
                results = {name: value for name, value in trainer.history[-1].items() if name not in aside}
                trainer.board.settings(keeping.settings(trainer), results)
            trainer.board.close()
            trainer.board = None
        trainer.running = None
        self.feed.close()


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
    names = ["loss", *trainer.named_metrics]
    names += [f"val_{name}" for name in names] if validated else []
    if name not in names or how not in ("", "min", "max"):
        raise TrainingError(f"best={trainer.best!r} is not measured; there are {', '.join(names)}.")
    return name, how == "min" if how else name.endswith(("loss", "error", "mse", "mae", "perplexity"))


def _seed(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more} {'is' if len(names) == 1 else 'are'}"


def _warn(text: str) -> None:
    warnings.warn(text, ModsurgWarning, stacklevel=6)
