"""The trainer: its options, and what can be asked of it."""

import contextlib
import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from modsurg.errors import TrainingError, warn
from modsurg.surgery.api import edit
from modsurg.surgery.edit import Edit
from modsurg.training import checkpointing, distributed, edits, evaluation
from modsurg.training.device import Precision, check_precision, pick_device, place
from modsurg.training.distributed import Strategy
from modsurg.training.history import History
from modsurg.training.loop import Epoch, TrainingLoop
from modsurg.training.metrics import Metric, is_object
from modsurg.training.progress_display import ProgressDisplay
from modsurg.training.samples import Samples
from modsurg.training.schedules import split_schedulers
from modsurg.training.state import RunOptions, Runtime, TrainingState
from modsurg.training.stopping import StopRequest
from modsurg.training.tensorboard import TensorBoard
from modsurg.training.validation import as_functions, check_options, check_parts, named_metrics
from modsurg.tree.selection import Where

Functions: TypeAlias = "Callable[[Trainer], object] | Sequence[Callable[[Trainer], object]] | None"


@dataclass(eq=False, repr=False)
class Trainer:
    """Trains a model: `Trainer(model, optimizer, loss).fit(loader, epochs=3)`.

    A batch is `(inputs, target)`; of a longer tuple the last is the target, and the model gets the others. Of a mapping
    or a dataclass the model gets the fields that its `forward` names, and loss and metrics get `(output, batch)`.

    Attributes:
        model: Trained in place.
        optimizer: Any of torch's, made from the model's parameters.
        loss: `loss(output, target)` gives a scalar, the mean over the batch.
        device: `"auto"` is the accelerator that torch finds, else the CPU; or `"cuda:1"`, `"mps"`, `"cpu"`.
        precision: `"fp32"`; `"bf16"` and `"fp16"` by autocast, the latter with a gradient scaler.
        scheduler: OneCycleLR and CyclicLR step with the optimizer, any other once an epoch. To say it yourself, or
            to give both: `{"step": warmup, "epoch": plateau}`. ReduceLROnPlateau gets the value of `best`,
            and its `mode` has to look the same way.
        metrics: Name -> `metric(output, target)`, or a list of functions. A metric gives the mean over a batch or a
            value for each sample; what is shown is the mean over samples. An object with `update`, `compute` and
            `reset` (torchmetrics, torcheval) is reset before each epoch and evaluation; where `compute` gives a dict,
            each of its entries is a column.
        samples: `samples(batch)` gives what a batch weighs: in the mean loss, in the metrics, in a step of several
            batches. By default the number of its samples, on which input, target and output must agree. It is needed
            for batches whose first size is not the batch, and for a loss that is a mean over something else:
            `samples=lambda batch: (batch[1] != -100).sum()`.
        accumulate: Batches that make one step.
        clip_norm: The largest norm of the gradient.
        log_dir: For TensorBoard.
        checkpoint_dir: For `last.safetensors` and `best.safetensors`, written after each epoch.
        compile: Run the model through torch.compile.
        seed: Seeds python, numpy and torch when a run begins.
        best: The value by which `best` is chosen, patience counts and plateaus are seen: `"val_accuracy"`. Losses and
            errors are better when lower, anything else when higher; `"min:x"` and `"max:x"` say it.
            By default `val_loss`, or `loss` where nothing is validated.
        keep: Besides `last` and `best`, this many of the latest checkpoints, as `step-00001200.safetensors`.
        save_every: Also write `last` every so many steps.
        average: An `AveragedModel` of the model (EMA or SWA): updated after every step, and validated in its place.
        strategy: Under torchrun, `"ddp"` gives every process the model, `"fsdp"` a part of it (FSDP2).
        channels_last: Lay out the weights of 2-d convolutions so that they compute faster.
        progress: Show a progress bar in a terminal, lines elsewhere.
        trust: Packages or classes from which a resumed run may build the modules of an edit.
        history: The rows of all epochs so far, and why the run ended early (`history.stopped`).
        reports: The reports of all edits so far, those included that a resumed run made again: a script that edits
            between two calls of `fit` asks `if not trainer.reports`.

    Example:
        >>> torch.manual_seed(0)
        <torch._C.Generator object at ...>
        >>> x = torch.randn(64, 3)
        >>> batches = list(zip(x.split(16), x.sum(1, keepdim=True).split(16)))
        >>> model = nn.Linear(3, 1)
        >>> trainer = Trainer(model, torch.optim.SGD(model.parameters(), lr=0.3), nn.MSELoss(), progress=False)
        >>> history = trainer.fit(batches, epochs=20)
        >>> history["loss"][-1] < 0.01
        True
    """

    model: nn.Module
    optimizer: Optimizer
    loss: Callable[[Any, Any], torch.Tensor]
    _: KW_ONLY
    device: str | torch.device = "auto"
    precision: Precision = "fp32"
    scheduler: Any = None
    metrics: Mapping[str, Metric] | Sequence[Metric] | Metric = ()
    samples: Samples | None = None
    accumulate: int = 1
    clip_norm: float | None = None
    log_dir: str | os.PathLike[str] | None = None
    checkpoint_dir: str | os.PathLike[str] | None = None
    compile: bool = False
    seed: int | None = None
    best: str | None = None
    keep: int = 0
    save_every: int | None = None
    average: AveragedModel | None = None
    strategy: Strategy = "ddp"
    channels_last: bool = True
    progress: bool = True
    trust: Any = ()

    def __post_init__(self) -> None:
        check_parts(self.model, self.optimizer, self.loss, self.precision, self.average)
        check_options({field.name: getattr(self, field.name) for field in fields(self)})
        device = distributed.local_device(pick_device(self.device))
        world = distributed.join_processes(device)
        if world > 1:
            distributed.check_loss(self.loss, self.optimizer)
        check_precision(device, self.precision)
        sharded = world > 1 and self.strategy == "fsdp"
        self.runtime = Runtime(device, self.precision, world, sharded, self.compile, self.channels_last)
        scaler = torch.GradScaler(device.type) if self.precision == "fp16" else None
        schedulers = split_schedulers(self.scheduler, self.optimizer)
        self._state = TrainingState(self.model, self.optimizer, self.loss, schedulers, scaler, self.average)
        self._state.options |= {"processes": world, "optimizer": checkpointing.group_options(self.optimizer)}
        self.named_metrics = named_metrics(self.metrics)
        self.history = History(self._state.progress.rows)
        self.reports = self._state.reports
        self.display = ProgressDisplay(self.progress and distributed.rank() == 0)
        self._stop = StopRequest(world)
        self._loop: TrainingLoop | None = None
        self._resumed_edits = 0
        place(self.model, device, channels_last=self.channels_last)
        for one in (self.loss, self.average, *self.named_metrics.values()):
            if isinstance(one, nn.Module) or (is_object(one) and hasattr(one, "to")):
                one.to(device)
        if sharded:
            distributed.check_sharding(device, self.precision, self.average)
            distributed.shard(self.model, self.optimizer, device)
        self.runtime.prepare(self.model)

    @property
    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The context of a forward pass in the trainer's precision."""
        return self.runtime.autocast()

    @property
    def runner(self) -> Any:
        """The model as it is to be called in training: compiled with `compile`, data-parallel under torchrun."""
        return self.runtime.runner

    @property
    def board(self) -> TensorBoard | None:
        """TensorBoard during a run with `log_dir`, in the process that writes."""
        return self._loop.board if self._loop is not None else None

    @property
    def state(self) -> TrainingState:
        """What a checkpoint of the run holds."""
        state = self._state
        state.model, state.optimizer, state.loss, state.average = self.model, self.optimizer, self.loss, self.average
        state.schedulers = split_schedulers(self.scheduler, self.optimizer)
        return state

    @property
    def step(self) -> int:
        """How many times the optimizer has moved the weights."""
        return self._state.progress.step

    @property
    def epoch(self) -> int:
        """How many epochs are finished."""
        return self._state.progress.epoch

    def fit(
        self,
        train_loader: Iterable[Any],
        val_loader: Iterable[Any] | None = None,
        epochs: int = 1,
        *,
        resume: bool | str | os.PathLike[str] = False,
        patience: int | None = None,
        restore_best: bool = False,
        min_delta: float = 0.0,
        thaw: Mapping[int, Where] | None = None,
        on_step: Functions = None,
        on_epoch: Functions = None,
    ) -> History:
        """Train for `epochs` epochs more.

        Ctrl-C and SIGTERM finish the step, write `last`, and end the run; `history.stopped` says so, and a script asks
        it before it goes on: `if not history.stopped: ...`.

        Args:
            train_loader: A DataLoader, a list of batches, or anything else that can be iterated again.
            val_loader: Measured after every epoch, in evaluation mode.
            epochs: How many; with `resume`, how many in all: those before the interruption and those of every earlier
                call included.
            resume: Go on from `last` in `checkpoint_dir` where there is one, or from the file given here. The end is
                bit for bit that of the run without the interruption.
            patience: Stop after so many epochs in which `best` did not get better.
            restore_best: When the run is through, or patience ends it, go back to the weights of the best epoch, of
                which a copy is held in memory; the optimizer stays where it is, and `last` in `checkpoint_dir` too.
            min_delta: By how much `best` must get better to count for `patience`.
            thaw: Epoch -> what is unfrozen when so many epochs are finished: `{2: "layer4.**", 4: "**"}`.
            on_step: A function, or several, called with the trainer after each of the optimizer's steps.
            on_epoch: The same after each epoch, before `last` is written; `trainer.history[-1]` is the epoch's row.

        Returns:
            The history of the whole run, earlier calls included.

        Raises:
            BatchError: A loader or a batch that can't be trained on, named, with the fix.
            NonFiniteError: The loss became NaN or infinite; the weights are those of the last good step.
            TrainingError: What else can't work, before the first step where it can be seen.
        """
        stop: dict[str, Any] = {"patience": patience, "restore_best": restore_best, "min_delta": min_delta}
        functions: dict[str, Any] = {"on_step": on_step, "on_epoch": on_epoch}
        loop = self._make_loop(train_loader, val_loader, epochs=epochs, resume=resume, thaw=thaw, **stop, **functions)
        try:
            for epoch in self._run(loop):
                for batch in epoch:
                    if epoch.step(*epoch.forward(batch)):
                        loop.after_step()
        except KeyboardInterrupt:
            if self._stop.reason != "SIGINT":
                raise
            raise KeyboardInterrupt("the second Ctrl-C") from None  # whose traceback is that of fit alone
        return self.history

    def epochs(
        self,
        train_loader: Iterable[Any],
        val_loader: Iterable[Any] | None = None,
        epochs: int = 1,
        *,
        resume: bool | str | os.PathLike[str] = False,
        patience: int | None = None,
        restore_best: bool = False,
        min_delta: float = 0.0,
        thaw: Mapping[int, Where] | None = None,
    ) -> Iterator[Epoch]:
        """The same as `fit`, as a generator, for your own loop body; the arguments are those of `fit`.

        Example:
            >>> model = nn.Linear(3, 1)
            >>> trainer = Trainer(model, torch.optim.SGD(model.parameters()), nn.MSELoss(), progress=False)
            >>> for epoch in trainer.epochs([(torch.ones(4, 3), torch.ones(4, 1))], epochs=2):
            ...     for inputs, target in epoch:
            ...         _ = epoch.step(trainer.loss(model(inputs), target))
            >>> trainer.step
            2
        """
        stop: dict[str, Any] = {"patience": patience, "restore_best": restore_best, "min_delta": min_delta}
        yield from self._run(self._make_loop(train_loader, val_loader, epochs=epochs, resume=resume, thaw=thaw, **stop))

    def evaluate(self, loader: Iterable[Any], model: nn.Module | None = None) -> dict[str, float]:
        """Give the mean loss and metrics over the samples of a loader, in evaluation mode, without gradients.

        Args:
            loader: As in `fit`.
            model: Another model to measure, such as `trainer.average`.

        Example:
            >>> model = nn.Linear(3, 1)
            >>> trainer = Trainer(model, torch.optim.SGD(model.parameters()), nn.MSELoss(), progress=False)
            >>> list(trainer.evaluate([(torch.ones(4, 3), torch.ones(4, 1))]))
            ['loss']
        """
        metrics, epoch = self.named_metrics, self._loop.epoch if self._loop is not None else None
        if epoch is not None and epoch.opened and not epoch.closed:  # the state of its metrics is that of the epoch
            metrics = {name: copy.deepcopy(one) if is_object(one) else one for name, one in metrics.items()}
        model = self.model if model is None else model
        return evaluation.evaluate(self.state, self.runtime, loader, model, metrics, self.samples)

    def predict(self, loader: Any, model: nn.Module | None = None) -> Any:
        """Give the model's outputs for all batches of a loader, or for one tensor of inputs, on the CPU.

        Returns:
            One tensor, joined along the first dimension; a list of the batches' outputs where these are not tensors
            or have different shapes.

        Example:
            >>> model = nn.Linear(3, 1)
            >>> trainer = Trainer(model, torch.optim.SGD(model.parameters()), nn.MSELoss(), progress=False)
            >>> trainer.predict([torch.ones(4, 3), torch.ones(2, 3)]).shape
            torch.Size([6, 1])
        """
        return evaluation.predict(self.state, self.runtime, loader, self.model if model is None else model)

    @contextlib.contextmanager
    def edit(self, example: Any = None) -> Iterator[Edit]:
        """Change the model between two steps; the optimizer, schedulers and averaged weights follow.

        The checkpoints that are written afterwards know the edit, and a run that resumes from them makes it again.

        Args:
            example: See `modsurg.edit`.

        Example:
            >>> model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
            >>> trainer = Trainer(model, torch.optim.SGD(model.parameters()), nn.MSELoss(), progress=False)
            >>> with trainer.edit() as e:
            ...     e.replace("1", nn.GELU)
            >>> print(e.report)
            ~ 1  ReLU -> GELU(approximate='none')
        """
        state, progress = self.state, self._state.progress
        if self._loop is not None:
            self._loop.write_best()
        averaged = edits.averaged_state(state)
        with edit(
            self.model, optimizer=self.optimizer, scheduler=list(state.schedulers.values()), example=example
        ) as e:
            yield e
        edits.follow_edit(state, self.runtime, e.report, averaged)
        recipe = progress.recipes[-1]
        if self._loop is None and recipe is not None and recipe in progress.recipes[: self._resumed_edits]:
            warn("the resumed run has this edit already, and now the model has it twice: if not trainer.reports:")

    def stop(self, reason: str = "trainer.stop()") -> None:
        """End the run after the present step, as Ctrl-C does; `history.stopped` is the reason.

        Several processes agree on it every 16 steps and after each epoch.
        """
        self._stop.request(reason)

    def histograms(self) -> None:
        """Write the spread of weights and gradients to TensorBoard now; from `on_epoch`, for one.

        Raises:
            TrainingError: Without `log_dir`, or while no run is under way.
        """
        if self.board is not None:
            self.board.add_histograms(self.model, self.step)
        elif distributed.rank() == 0:
            raise TrainingError("histograms() writes to TensorBoard during fit: Trainer(..., log_dir=...).")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the whole run to a file from which `fit(resume=path)` goes on.

        From `on_step`, `on_epoch`, between the steps of your own loop, or after `fit`; by all processes together.

        Raises:
            TrainingError: In the middle of a window of `accumulate` batches.
        """
        state = self.state
        if self._loop is not None:
            self._loop.record_position()
        checkpointing.save(state, self.runtime, path)

    def _make_loop(self, train_loader: Iterable[Any], val_loader: Iterable[Any] | None, **asked: Any) -> TrainingLoop:
        for name in ("on_step", "on_epoch"):
            asked[name] = tuple(partial(function, self) for function in as_functions(name, asked.get(name)))
        asked["thaw"] = asked["thaw"] or {}
        same = {field.name: getattr(self, field.name) for field in fields(RunOptions) if hasattr(self, field.name)}
        clip_norm = None if self.clip_norm is None else float(self.clip_norm)
        self._state.options |= {"accumulate": self.accumulate, "clip_norm": clip_norm, "precision": self.precision}
        options = RunOptions(**same | {"metrics": self.named_metrics} | asked)
        return TrainingLoop(self.state, self.runtime, options, train_loader, val_loader, self._stop, self.display)

    def _run(self, loop: TrainingLoop) -> Iterator[Epoch]:
        self._loop = loop
        try:
            yield from loop.epochs(self.history)
        finally:
            self._loop = None
            self._resumed_edits = max(self._resumed_edits, loop.edits)
