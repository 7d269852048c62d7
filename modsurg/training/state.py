"""What a run is made of: the state that a checkpoint holds, and the devices and processes that it runs on."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from modsurg.surgery.report import Report
from modsurg.training.batches import Signature, read_signature
from modsurg.training.device import Precision, autocast
from modsurg.training.distributed import trainable, watch_calls, wrap_in_ddp


@dataclass
class Progress:
    """Where a run is. A checkpoint stores it whole.

    Attributes:
        epoch: Finished epochs.
        batch: Batches seen of the epoch under way.
        step: Steps of the optimizer.
        start: The epoch in which this `fit` began.
        target: The name of the value that says what is best.
        record: Its best so far, lower is better.
        mark: Its best so far by more than `min_delta`, from which patience counts.
        stale: Epochs since then.
        rows: One for each finished epoch.
        recipes: The edits of the model so far, in JSON; None for one that can't be recorded.
        rest: Of the epoch under way the random states at its beginning, the loader's position and the sums; None
            between two epochs.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    start: int = 0
    target: str = ""
    record: float = float("inf")
    mark: float = float("inf")
    stale: int = 0
    rows: list[dict[str, float]] = field(default_factory=list)
    recipes: list[str | None] = field(default_factory=list)
    rest: dict[str, Any] | None = None

    @property
    def position(self) -> dict[str, Any]:
        """The fields that are a number or a name."""
        return {name: value for name, value in vars(self).items() if name not in ("rows", "recipes", "rest")}

    def restart(self) -> None:
        """Begin another `fit` where the last one ended."""
        self.start, self.batch, self.rest, self.stale = self.epoch, 0, None, 0

    def set_target(self, target: str) -> None:
        """Choose the value that says what is best; the record of another value does not count."""
        if target != self.target:
            self.target, self.record, self.mark, self.stale = target, float("inf"), float("inf"), 0

    def end_epoch(self, value: float, min_delta: float) -> bool:
        """Count an epoch with this value; returns whether it is the best so far."""
        self.epoch, self.batch, self.rest = self.epoch + 1, 0, None
        self.stale += 1
        if value < self.mark - min_delta:
            self.mark, self.stale = value, 0
        improved = value < self.record
        self.record = min(value, self.record) if improved else self.record
        return improved


@dataclass
class TrainingState:
    """What a training step changes, and what a checkpoint of a run therefore holds.

    Attributes:
        model: Trained in place.
        optimizer: Moves its parameters.
        loss: A function or a module, which may have a state.
        schedulers: By when they step: `"step"` or `"epoch"`.
        scaler: Of the gradients, in fp16.
        average: The averaged model.
        progress: Where the run is.
        reports: Of the edits so far.
        generators: From which the loaders draw, where they have their own.
        options: Numbers of which a run that goes on is told if they are others.
    """

    model: nn.Module
    optimizer: Optimizer
    loss: Callable[[Any, Any], torch.Tensor]
    schedulers: dict[str, Any]
    scaler: torch.GradScaler | None
    average: AveragedModel | None
    progress: Progress = field(default_factory=Progress)
    reports: list[Report] = field(default_factory=list)
    generators: list[torch.Generator] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)

    def stateful(self, *, sharded: bool) -> dict[str, Any]:
        """Everything with a state, by its name in a file; without the model and its optimizer if they are sharded."""
        found: dict[str, Any] = {"scaler": self.scaler}
        if not sharded:
            found |= {"model": self.model, "optimizer": self.optimizer, "average": self.average}
        found |= {f"scheduler_{when}": scheduler for when, scheduler in self.schedulers.items()}
        if isinstance(self.loss, nn.Module) and self.loss.state_dict():
            found["loss"] = self.loss
        return {name: value for name, value in found.items() if value is not None}

    @property
    def weights(self) -> dict[str, nn.Module]:
        """The modules whose weights are trained or averaged."""
        return {"model": self.model} if self.average is None else {"model": self.model, "average": self.average}


@dataclass
class Runtime:
    """Where a run computes, and how.

    Attributes:
        device: Of this process.
        precision: Of the forward pass.
        world: How many processes there are.
        sharded: Whether each of them has a part of the model only.
        compile: Whether the model runs through torch.compile.
        channels_last: Whether convolutions have that layout.
        runner: The model as it is to be called in training.
        signature: The arguments of its forward.
        trains: Of each parameter, whether it trained when the runner was made.
        has_targets: Whether the last of a tuple is known to be the target.
    """

    device: torch.device
    precision: Precision
    world: int
    sharded: bool
    compile: bool
    channels_last: bool
    runner: Any = None
    signature: Signature = field(default_factory=lambda: Signature(None))
    trains: list[bool] = field(default_factory=list)
    has_targets: bool = False

    def autocast(self) -> AbstractContextManager[object]:
        """Give the context of one forward pass."""
        return autocast(self.device, self.precision)

    def prepare(self, model: nn.Module) -> None:
        """Make the runner of a model that is new or was edited."""
        runner = model
        if self.world > 1 and not self.sharded:
            self.runner = None  # the hooks of the wrapper before go first
            runner = wrap_in_ddp(model, self.device)
        self.trains = trainable(model)
        self.runner = torch.compile(runner) if self.compile else runner
        if runner is not model:
            watch_calls(self.runner)
        self.signature = read_signature(model)

    def runner_of(self, model: nn.Module, own: nn.Module) -> Callable[..., Any]:
        """Give what to call for a model in evaluation: the trainer's `own` may be compiled."""
        return self.runner if model is own and self.world == 1 else model


@dataclass
class RunOptions:
    """What one call of `fit` was asked for; see `Trainer`.

    Attributes:
        on_step: Functions without arguments.
        on_epoch: The same.
    """

    metrics: Mapping[str, Any]
    samples: Any
    accumulate: int
    clip_norm: Any
    best: str | None
    seed: int | None
    checkpoint_dir: Any
    keep: int
    save_every: int | None
    log_dir: Any
    trust: Any
    epochs: int
    resume: Any
    patience: int | None
    restore_best: bool
    min_delta: float
    thaw: Mapping[int, Any]
    on_step: tuple[Callable[[], object], ...]
    on_epoch: tuple[Callable[[], object], ...]
