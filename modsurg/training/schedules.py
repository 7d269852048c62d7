"""Which schedule steps when, and those that can't work."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR, ReduceLROnPlateau, SequentialLR

from modsurg.errors import TrainingError, warn


def split_schedulers(given: Any, optimizer: object = None) -> dict[str, Any]:
    """Say which scheduler steps when: `{"step": ..., "epoch": ...}`, either may be missing.

    A mapping says it itself. A bare `OneCycleLR` or `CyclicLR`, which count batches, steps with the optimizer, also
    inside a SequentialLR or ChainedScheduler; any other steps once an epoch.

    Raises:
        TrainingError: Not a scheduler, or one of another optimizer.

    Example:
        >>> import torch
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
            raise TrainingError(f"scheduler is {describe_kind(one)}: torch.optim.lr_scheduler.StepLR(optimizer, 10).")
        if when == "step" and isinstance(one, ReduceLROnPlateau):
            raise TrainingError('ReduceLROnPlateau waits for an epoch\'s value: scheduler={"epoch": ...}.')
        if optimizer is not None and not _shared(getattr(one, "optimizer", optimizer), optimizer):
            raise TrainingError(f"{type(one).__name__} is of another optimizer: make it from this trainer's.")
    return schedulers


def check_schedules(
    schedulers: Mapping[str, Any], optimizer: Optimizer, target: str, *, lower: bool, epochs: int
) -> None:
    """Refuse schedules that would do nothing in `epochs` epochs, take worse for better, or end too early.

    Raises:
        TrainingError: With the line that works.
    """
    _check_plateau(schedulers.get("epoch"), target, lower=lower)
    _check_epoch_rate(schedulers.get("epoch"), optimizer)
    _check_length(schedulers.get("epoch"), epochs)


def check_steps(schedulers: Mapping[str, Any], *, epochs: int, batches: int, seen: int, accumulate: int) -> None:
    """Refuse a schedule that has fewer steps than are to come, and warn of one that counts something else.

    Of the first epoch, some batches may have been seen already.

    Raises:
        TrainingError: A OneCycleLR is too short.
    """
    windows = -(-batches // accumulate)
    steps = epochs * windows - -(-min(seen, batches) // accumulate)
    if seen == 0:
        _warn_of_batches(schedulers.get("step"), epochs * batches, steps, accumulate)
        _warn_of_steps(schedulers.get("epoch"), epochs, steps)
    _check_length(schedulers.get("step"), steps)


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
    """Refuse a OneCycleLR that is too short."""
    for one, end in _last_steps(scheduler, getattr(scheduler, "last_epoch", 0) + steps):
        if isinstance(one, OneCycleLR) and end > one.total_steps:
            kind, done = type(one).__name__, max(one.last_epoch, 0)  # -1 before a SequentialLR begins with it
            raise TrainingError(
                f"{kind} has {one.total_steps} steps, {done} of them done, and {end - done} are to come: "
                f"{kind}(..., total_steps={end})."
            )


def _last_steps(scheduler: Any, end: int) -> Iterator[tuple[Any, int]]:
    """Give a scheduler and those inside, each with the number of its last step, when the outer one makes step `end`."""
    yield scheduler, end
    parts, to_come = getattr(scheduler, "_schedulers", ()), end - getattr(scheduler, "last_epoch", 0)
    if isinstance(scheduler, SequentialLR):
        starts = [0, *scheduler._milestones]
        for part, first, last in zip(parts, starts, [*starts[1:], end], strict=True):
            yield from _last_steps(part, min(last, end) - first)
    else:
        for part in parts:
            yield from _last_steps(part, part.last_epoch + to_come)


def _shared(one: Any, other: Any) -> bool:
    """Tell whether two optimizers are one, or a wrapper and what it wraps: they hold the same groups."""
    ours = {id(group) for group in getattr(one, "param_groups", ())}
    return one is other or any(id(group) in ours for group in other.param_groups)


def _chain(scheduler: Any) -> Iterator[Any]:
    """Give a scheduler and those inside; SequentialLR and ChainedScheduler have no public name for them."""
    if scheduler is not None:
        yield scheduler
        for inner in getattr(scheduler, "_schedulers", ()):
            yield from _chain(inner)


def describe_kind(value: object) -> str:
    """Name the class of something that was given where something else belongs.

    Example:
        >>> describe_kind(3), describe_kind(int)
        ('a int', 'the class int, not made yet')
    """
    return f"the class {value.__name__}, not made yet" if isinstance(value, type) else f"a {type(value).__name__}"
