"""What can be seen before the first step: options, loaders, schedules and an optimizer that can't work."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import nn
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, Dataset, IterableDataset

from modsurg.errors import BatchError, DeviceError, TrainingError, counted, listed, warn
from modsurg.training import distributed as processes
from modsurg.training.data import length
from modsurg.training.history import NO_RESULT
from modsurg.training.metrics import is_object
from modsurg.tree.selection import select

if TYPE_CHECKING:
    from modsurg.training.run import Run
    from modsurg.training.trainer import Trainer


def check_options(trainer: "Trainer") -> None:
    """Refuse what no run can be made with.

    Raises:
        TrainingError: With the line that mends it.
    """
    model, optimizer, loss = trainer.model, trainer.optimizer, trainer.loss
    if not isinstance(model, nn.Module):
        raise TrainingError(f"model is {_kind(model)}: pass the nn.Module.")
    if not hasattr(optimizer, "param_groups") or not hasattr(optimizer, "step"):
        raise TrainingError(f"optimizer is {_kind(optimizer)}: torch.optim.AdamW(model.parameters()).")
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        kind = type(optimizer).__name__
        raise TrainingError(f"{kind} needs a closure, which runs a batch many times: {kind} in a loop of your own.")
    if isinstance(loss, type) or not callable(loss):
        raise TrainingError(f"loss is {_kind(loss)}: loss=nn.CrossEntropyLoss(), or a function of (output, target).")
    options = loss.keywords if isinstance(loss, partial) else {}
    if options.get("reduction", getattr(loss, "reduction", None)) == "sum":
        text = 'the loss adds up its batch (reduction="sum"), and the trainer needs the mean, whatever the batch size'
        raise TrainingError(f'{text}. Try: reduction="mean".')
    if trainer.samples is not None and (isinstance(trainer.samples, type) or not callable(trainer.samples)):
        text = f"samples is {_kind(trainer.samples)}, not a function of the batch"
        raise TrainingError(f"{text}. Try: samples=lambda batch: len(batch[1]).")
    split_schedulers(trainer.scheduler, optimizer)
    check_count("accumulate", trainer.accumulate, 1, "a step takes at least one batch, accumulate=1.")
    check_count("keep", trainer.keep, 0, "how many files, keep=0 for none.")
    check_count("save_every", trainer.save_every, 1, "how many steps, save_every=None for none.")
    check_count("seed", trainer.seed, 0, "a whole number, seed=0.")
    if trainer.strategy not in get_args(processes.Strategy):
        raise TrainingError(f'strategy={trainer.strategy!r}: one of "ddp", "fsdp".')
    if trainer.clip_norm is not None and not (
        isinstance(trainer.clip_norm, Real | torch.Tensor) and trainer.clip_norm > 0
    ):
        raise TrainingError(f"clip_norm={trainer.clip_norm!r}: a norm is greater than 0, clip_norm=1.0.")
    if trainer.precision == "fp16" and any(p.dtype is torch.float16 for p in model.parameters()):
        raise TrainingError('precision="fp16" trains weights of float32, and the model has float16: model.float().')
    if trainer.average is not None and _shapes(getattr(trainer.average, "module", None)) != _shapes(model):
        raise TrainingError("average is no AveragedModel of this model: AveragedModel(model).")


def as_functions(name: str, given: Any) -> tuple[Callable[..., object], ...]:
    """Give the functions of `on_step` or `on_epoch`: one, several or none, each of which takes the trainer.

    Raises:
        TrainingError: Something that can't be called with the trainer alone.

    Example:
        >>> len(as_functions("on_step", [print, repr]))
        2
    """
    functions = tuple(given) if isinstance(given, list | tuple) else () if given is None else (given,)
    for function in functions:
        if isinstance(function, type) or not callable(function):
            fix = f"{name}=lambda trainer: print(trainer.step), or a list of such functions"
            raise TrainingError(f"{name} is {_kind(function)}, not a function. Try: {fix}.")
        try:
            takes = inspect.signature(function)
        except (TypeError, ValueError):  # a function of C says nothing of its arguments
            continue
        try:
            takes.bind(object())
        except TypeError as error:
            called = getattr(function, "__name__", type(function).__name__)
            text = f"{name} is called with the trainer alone, and {called} takes {takes} ({error})"
            raise TrainingError(f"{text}. Try: {name}=lambda trainer: print(trainer.step).") from None
    return functions


def check_count(name: str, value: object, least: int, what: str) -> None:
    """Refuse a number of things that is no number, or too few.

    Raises:
        TrainingError: With `what` it is.
    """
    if value is not None and (not isinstance(value, Integral) or int(value) < least):
        raise TrainingError(f"{name}={value!r}: {what}")


def check_number(name: str, value: object) -> None:
    """Refuse what is not a number of at least 0.

    Raises:
        TrainingError: With what was given.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not float(value) >= 0:
        raise TrainingError(f"{name}={value!r}: it must be a number, 0 or more.")


def named_metrics(given: Any) -> dict[str, Any]:
    """The metrics by name.

    Raises:
        TrainingError: No function, two of one name, or the name of another column.

    Example:
        >>> list(named_metrics(nn.functional.l1_loss)), list(named_metrics([nn.L1Loss()]))
        (['l1_loss'], ['l1loss'])
    """
    if isinstance(given, Mapping):
        pairs = list(given.items())
    else:
        listed = [given] if callable(given) or is_object(given) or isinstance(given, str) else list(given)
        pairs = [(_name(metric).lower(), metric) for metric in listed]
    for name, metric in pairs:
        if isinstance(metric, type) or not (callable(metric) or is_object(metric)):
            fix = 'metrics={"accuracy": lambda output, target: output.argmax(1) == target}'
            raise TrainingError(f"metric {name} is {_kind(metric)}: {fix}.")
    named = dict(pairs)
    if len(named) < len(pairs) or set(named) & {"loss", *NO_RESULT}:
        names = ", ".join(name for name, _ in pairs)
        raise TrainingError(f'metrics are called {names}: each needs a name of its own, metrics={{"accuracy": f}}.')
    return named


def split_schedulers(given: Any, optimizer: object = None) -> dict[str, Any]:
    """Which scheduler steps when: `{"step": ..., "epoch": ...}`, either may be missing.

    A mapping says it itself. A bare `OneCycleLR` or `CyclicLR`, which count batches, steps with the optimizer, also
    inside a SequentialLR or ChainedScheduler; any other steps once an epoch.

    Raises:
        TrainingError: No scheduler, or one of another optimizer.

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
        >>> list(split_schedulers(torch.optim.lr_scheduler.StepLR(optimizer, 3)))
        ['epoch']
        >>> list(split_schedulers(torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)))
        ['step']
    """
    if given is None:
        return {}
    if isinstance(given, Mapping):
        schedulers = dict(given)
    else:
        by_step = any(isinstance(one, OneCycleLR | CyclicLR) for one in _chain(given))
        schedulers = {"step" if by_step else "epoch": given}
    if set(schedulers) - {"step", "epoch"}:
        raise TrainingError(f'scheduler={{{", ".join(map(repr, given))}}}: the keys are "step" and "epoch".')
    for when, one in schedulers.items():
        if isinstance(one, type) or not hasattr(one, "step"):
            raise TrainingError(f"scheduler is {_kind(one)}: torch.optim.lr_scheduler.StepLR(optimizer, 10).")
        if when == "step" and isinstance(one, ReduceLROnPlateau):
            raise TrainingError('ReduceLROnPlateau waits for an epoch\'s value: scheduler={"epoch": ...}.')
        if optimizer is not None and not _shared(getattr(one, "optimizer", optimizer), optimizer):
            raise TrainingError(f"{type(one).__name__} is of another optimizer: make it from this trainer's.")
    return schedulers


def check_loader(loader: Any, name: str, *, again: bool = True) -> None:
    """Refuse what gives no batches, what is known to be empty, and what can't be iterated `again`.

    Raises:
        BatchError: With the fix.
    """
    _check_data(loader, name)
    if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
        raise BatchError(f"{name} is a {type(loader).__name__}, which gives no batches: pass a DataLoader or a list.")
    if again and isinstance(loader, Iterator):
        raise BatchError(f"{name} is an iterator, which lasts for one epoch: pass the loader itself, or list({name}).")
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        raise BatchError(f"{name} is a dataset, which gives no batches: DataLoader({name}, batch_size=64).")
    if length(loader) == 0:
        hint = ""
        if isinstance(loader, DataLoader) and loader.drop_last and (samples := length(loader.dataset)):
            make = counted(samples, "sample makes", "samples make")
            hint = f" (drop_last=True, and {make} no batch of {loader.batch_size})"
        raise BatchError(f"{name} is empty{hint}: it must give at least one batch.")


def _check_data(loader: Any, name: str) -> None:
    """Refuse the data itself, of which each row would become a batch."""
    if isinstance(loader, Mapping | str | bytes):
        text = f"{name} is a {type(loader).__name__}, which gives its parts and not batches"
        raise BatchError(f"{text}. Try: a DataLoader, or a list of batches.")
    if _is_array(loader):
        text = f"is a {type(loader).__name__}, of which each row would be a batch"
    elif isinstance(loader, tuple | list) and _is_table(loader):
        text = (
            f"is a {type(loader).__name__} of {counted(len(loader), 'array', 'arrays')}, each of which would be a batch"
        )
    else:
        return
    fix = "DataLoader(TensorDataset(x, y), batch_size=32), of tensors x and y, or a list of batches"
    raise BatchError(f"{name} {text}. Try: {fix}.")


def _is_array(value: object) -> bool:
    return hasattr(value, "shape") and hasattr(value, "__getitem__") and not isinstance(value, Dataset | DataLoader)


def _is_table(loader: Sequence[Any]) -> bool:
    """Whether a sequence holds the columns of a dataset; a list of equal tensors is a list of batches."""
    if not loader or not all(_is_array(part) for part in loader):
        return False
    kinds = {(str(part.dtype), part.ndim) for part in loader if isinstance(part, torch.Tensor)}
    lengths = {len(part) if part.ndim else 0 for part in loader}
    return isinstance(loader, tuple) or not kinds or (len(kinds) > 1 and len(lengths) == 1)


def check_run(run: "Run") -> None:
    """Refuse a run that would fail at its end, and warn of parameters that would not train.

    Raises:
        DeviceError: A parameter is on another device.
        TrainingError: A schedule that is too short, an optimizer of another model.
        NoMatchError: Something to thaw that is not there.
    """
    trainer = run.trainer
    for name, parameter in trainer.model.named_parameters():
        if parameter.device.type != trainer.place.type:
            raise DeviceError(
                f"{name} is on {parameter.device}, the trainer on {trainer.place}: model.to({str(trainer.place)!r})."
            )
    if not isinstance(run.thaw, Mapping) or not all(isinstance(epoch, Integral) for epoch in run.thaw):
        raise TrainingError(f'thaw={run.thaw!r}: epoch -> what, thaw={{2: "layer4.**"}}.')
    _check_plateau(run.schedulers.get("epoch"), run.target, lower=run.lower)
    epochs, batches = run.end - trainer.epoch, length(run.feed.loader)
    _check_epoch_rate(run.schedulers.get("epoch"), trainer.optimizer)
    _check_length(run.schedulers.get("epoch"), epochs)
    if batches is not None:
        windows = -(-batches // trainer.accumulate)
        steps = epochs * windows - -(-min(trainer.position.batch, batches) // trainer.accumulate)
        if trainer.position.batch == 0:
            _warn_of_batches(run.schedulers.get("step"), epochs * batches, steps, trainer.accumulate)
            _warn_of_steps(run.schedulers.get("epoch"), epochs, steps)
        _check_length(run.schedulers.get("step"), steps)
    thawed = {
        id(p) for where in run.thaw.values() for m in select(trainer.model, where).modules for p in m.parameters()
    }
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    ours = {id(p) for p in trainer.model.parameters() if p.requires_grad}
    for those, fix in (
        (ours, "modsurg.sync(optimizer, model), or freeze them"),
        (thawed - ours, "make it of model.parameters(); what is frozen does not move until it is thawed"),
    ):
        lost = [name for number, name in names.items() if number in those and number not in held]
        if lost:
            warn(f"{listed(lost, 3)} {'is' if len(lost) == 1 else 'are'} in no optimizer and will not train: {fix}.")
    loss = {id(p) for p in trainer.loss.parameters()} if isinstance(trainer.loss, nn.Module) else set()
    foreign = held - set(names) - loss
    if foreign and not held & set(names):
        raise TrainingError("the optimizer holds no parameter of this model: make it from model.parameters().")
    if foreign:
        some = counted(len(foreign), "parameter in the optimizer is", "parameters in the optimizer are")
        warn(f"{some} not the model's: modsurg.sync(optimizer, model).")


def _check_plateau(scheduler: Any, target: str, *, lower: bool) -> None:
    """Refuse a ReduceLROnPlateau that would take every better value for a worse one."""
    better, mode = ("lower", "min") if lower else ("higher", "max")
    if isinstance(scheduler, ReduceLROnPlateau) and scheduler.mode != mode:
        text = f'ReduceLROnPlateau(mode="{scheduler.mode}") gets {target}, which is better when {better}'
        raise TrainingError(f'{text}: ReduceLROnPlateau(..., mode="{mode}").')


def _check_epoch_rate(scheduler: Any, optimizer: Any) -> None:
    """Refuse a schedule of epochs whose first epoch would train nothing: it counts steps, as a rule."""
    groups = optimizer.param_groups
    begins = scheduler is not None and getattr(scheduler, "last_epoch", 0) == 0
    if begins and all(group["lr"] == 0 for group in groups) and any(group.get("initial_lr") for group in groups):
        text = f"{type(scheduler).__name__} steps once an epoch, so that the whole first epoch has a learning rate of 0"
        raise TrainingError(f'{text}. Try: scheduler={{"step": scheduler}}, if it counts steps.')


def _warn_of_steps(scheduler: Any, epochs: int, steps: int) -> None:
    """Warn of a schedule of epochs that is as long as the run has steps."""
    if steps <= epochs:
        return
    for one in _chain(scheduler):
        values = {name: vars(one).get(name) for name in ("T_max", "T_0", "total_iters")}
        for function in vars(one).get("lr_lambdas", ()):
            values |= getattr(function, "keywords", {})
        found = [name for name, value in values.items() if type(value) is int and value == steps]
        if found:
            text = f"{type(one).__name__} steps once an epoch, {epochs} times, and has {found[0]}={steps}"
            warn(f'{text}, which is the number of steps. Try: scheduler={{"step": scheduler}}.')


def _warn_of_batches(scheduler: Any, batches: int, steps: int, accumulate: int) -> None:
    """Warn of a OneCycleLR that counts batches for steps; a longer one may be meant for several fits."""
    if isinstance(scheduler, OneCycleLR) and scheduler.last_epoch == 0 and batches == scheduler.total_steps > steps:
        warn(
            f"{type(scheduler).__name__} has {batches} steps, one for each batch, and accumulate={accumulate} makes "
            f"{steps} of them, so that the rate would not come down: total_steps={steps}, which is "
            "epochs * ceil(len(loader) / accumulate)"
        )


def _check_length(scheduler: Any, steps: int) -> None:
    """Refuse a OneCycleLR that is too short; inside another scheduler it is not clear which steps will be its own."""
    if not isinstance(scheduler, OneCycleLR):
        return
    kind, done = type(scheduler).__name__, scheduler.last_epoch
    if done + steps > scheduler.total_steps:
        raise TrainingError(
            f"{kind} has {scheduler.total_steps} steps, {done} of them done, and {steps} are to come: "
            f"{kind}(..., total_steps={done + steps})."
        )


def _shared(one: Any, other: Any) -> bool:
    """Whether two optimizers are one, or a wrapper and what it wraps: they hold the same groups."""
    ours = {id(group) for group in getattr(one, "param_groups", ())}
    return one is other or any(id(group) in ours for group in other.param_groups)


def _chain(scheduler: Any) -> Iterator[Any]:
    """A scheduler and those inside; SequentialLR and ChainedScheduler have no public name for them."""
    if scheduler is not None:
        yield scheduler
        for inner in getattr(scheduler, "_schedulers", ()):
            yield from _chain(inner)


def _shapes(module: Any) -> dict[str, Any] | None:
    if not isinstance(module, nn.Module):
        return None
    return {name: getattr(p, "shape", None) for name, p in module.named_parameters()}


def _name(metric: Any) -> str:
    return metric if isinstance(metric, str) else getattr(metric, "__name__", type(metric).__name__)


def _kind(value: object) -> str:
    return f"the class {value.__name__}, not made yet" if isinstance(value, type) else f"a {type(value).__name__}"
