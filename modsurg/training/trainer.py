"""The trainer: its options and what can be asked of it. What a run does is in `run.py`."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from modsurg.errors import TrainingError
from modsurg.training import checkpointing as keeping
from modsurg.training import distributed as processes
from modsurg.training import edits, evaluation
from modsurg.training.batches import read_signature
from modsurg.training.checkpointing import Position
from modsurg.training.device import Precision, autocast, check_precision, pick_device, place
from modsurg.training.distributed import Strategy
from modsurg.training.epochs import Epoch
from modsurg.training.history import History
from modsurg.training.logs import Board, Screen
from modsurg.training.loop import Watch
from modsurg.training.metrics import Metric, is_object
from modsurg.training.run import Run
from modsurg.training.samples import Samples
from modsurg.training.validation import check_options, named_metrics, split_schedulers
from modsurg.tree.selection import Where

if TYPE_CHECKING:
    from modsurg.surgery.edit import Edit
    from modsurg.surgery.report import Report

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
        progress: Show a progress bar, or lines where there is no terminal.
        trust: Packages or classes from which a resumed run may build the modules of an edit.
        runner: The model as it is to be called in training: compiled with `compile`, data-parallel under torchrun.
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
        check_options(self)
        self.place = processes.local_device(pick_device(self.device))
        self.world = processes.join(self.place)
        if self.world > 1:
            processes.check_loss(self.loss, self.optimizer)
        check_precision(self.place, self.precision)
        self.scaler = torch.GradScaler(self.place.type) if self.precision == "fp16" else None
        self.named_metrics = named_metrics(self.metrics)
        self.position = Position()
        self.history = History()
        self.given_groups = keeping.group_options(self.optimizer)
        self.recipes: list[str | None] = []
        self.reports: list[Report] = []
        self.resumed = 0  # how many of them the file had from which the run went on
        self.generators: list[torch.Generator] = []
        self.stopping = self.wanted = ""
        self.has_targets = False
        self.screen = Screen(self.progress and processes.rank() == 0)
        self.board: Board | None = None
        self.running: Run | None = None
        self.runner: Any = None
        place(self.model, self.place, channels_last=self.channels_last)
        for one in (self.loss, self.average, *self.named_metrics.values()):
            if isinstance(one, nn.Module) or (is_object(one) and hasattr(one, "to")):
                one.to(self.place)
        if self.sharded:
            processes.check_sharding(self.place, self.precision, self.average)
            processes.shard(self.model, self.optimizer, self.place)
        self.prepare()

    @property
    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The context of a forward pass in the trainer's precision."""
        return autocast(self.place, self.precision)

    @property
    def schedulers(self) -> dict[str, Any]:
        """What `scheduler` says: which one steps with the optimizer, which one once an epoch."""
        return split_schedulers(self.scheduler, self.optimizer)

    @property
    def sharded(self) -> bool:
        """Whether each process holds a part of the model only."""
        return self.world > 1 and self.strategy == "fsdp"

    @property
    def step(self) -> int:
        """How many times the optimizer has moved the weights."""
        return self.position.step

    @property
    def epoch(self) -> int:
        """How many epochs are finished."""
        return self.position.epoch

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
        run = Run(self, train_loader, val_loader, epochs, thaw=thaw or {}, **stop, **functions)
        try:
            for epoch in run.epochs(resume):
                for batch in epoch:
                    if epoch.step(*epoch.forward(batch)):
                        for function in run.on_step:
                            function(self)
        except KeyboardInterrupt:
            if self.stopping != "SIGINT":
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
        """The same as `fit`, as a generator, for a loop body of one's own; the arguments are those of `fit`.

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
        run = Run(self, train_loader, val_loader, epochs, thaw=thaw or {}, **stop)
        yield from run.epochs(resume)

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
        return evaluation.evaluate(self, loader, self.model if model is None else model)

    def predict(self, loader: Any, model: nn.Module | None = None) -> Any:
        """Give the model's outputs for all batches of a loader, or for one tensor of inputs, on the CPU.

        Returns:
            One tensor, joined along the first dimension; a list of the batches' outputs where they are no tensors, or
            do not go together.

        Example:
            >>> model = nn.Linear(3, 1)
            >>> trainer = Trainer(model, torch.optim.SGD(model.parameters()), nn.MSELoss(), progress=False)
            >>> trainer.predict([torch.ones(4, 3), torch.ones(2, 3)]).shape
            torch.Size([6, 1])
        """
        return evaluation.predict(self, loader, self.model if model is None else model)

    @contextlib.contextmanager
    def edit(self, example: Any = None) -> Iterator["Edit"]:
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
        from modsurg.surgery.api import edit

        if self.running is not None:
            self.running.keep_best()
        before = edits.averages(self)
        with edit(self.model, optimizer=self.optimizer, scheduler=list(self.schedulers.values()), example=example) as e:
            yield e
        edits.follow(self, e.report, before)
        edits.warn_of_twins(self)

    def stop(self, reason: str = "trainer.stop()") -> None:
        """End the run after the present step, as Ctrl-C does; `history.stopped` is the reason.

        Several processes agree on it every 16 steps and after each epoch.
        """
        self.wanted = reason
        if self.world == 1:
            self.stopping = reason

    def agree(self) -> None:
        """Stop if any process wants to."""
        if self.world > 1 and processes.any_of(bool(self.wanted), self.place):
            self.stopping = self.wanted or "another process was stopped"

    def histograms(self) -> None:
        """Write the spread of weights and gradients to TensorBoard now; from `on_epoch`, for one."""
        if self.board is None:
            raise TrainingError("histograms() writes to TensorBoard during fit: Trainer(..., log_dir=...).")
        self.board.histograms(self.model, self.step)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the whole run to a file from which `fit(resume=path)` goes on.

        From `on_step`, `on_epoch`, between the steps of a loop of one's own, or after `fit`; by all processes together.

        Raises:
            TrainingError: In the middle of a window of `accumulate` batches.
        """
        run = self.running
        keeping.save(self, path, run.left() if run else None, run.batches if run else None)

    def prepare(self) -> None:
        """What has to be made anew when the model is another."""
        runner: nn.Module = self.model
        if self.world > 1 and not self.sharded:
            self.runner = None  # lets go of the wrapper before, and of its hooks
            runner = processes.parallel(self.model, self.place)
        self.wrapped = processes.trained(self.model)
        self.runner = torch.compile(runner) if self.compile else runner
        if runner is not self.model:
            processes.watch(self.runner)
        self.signature = read_signature(self.model)
        self.watch = Watch(self.model, self.place)
