"""What can be seen before the first step: options, and an optimizer that can't work."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from numbers import Integral, Real
from typing import Any, get_args

import torch
from torch import nn

from modsurg.errors import DeviceError, TrainingError, counted, listed, warn
from modsurg.training.distributed import Strategy
from modsurg.training.history import NO_RESULT
from modsurg.training.metrics import is_object
from modsurg.training.schedules import describe_kind
from modsurg.training.state import TrainingState
from modsurg.tree.selection import select_parameters


def check_parts(model: Any, optimizer: Any, loss: Any, precision: str, average: Any) -> None:
    """Refuse what no run can be made with.

    Raises:
        TrainingError: With the line that mends it.
    """
    if not isinstance(model, nn.Module):
        raise TrainingError(f"model is {describe_kind(model)}: pass the nn.Module.")
    if not hasattr(optimizer, "param_groups") or not hasattr(optimizer, "step"):
        raise TrainingError(f"optimizer is {describe_kind(optimizer)}: torch.optim.AdamW(model.parameters()).")
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        kind = type(optimizer).__name__
        raise TrainingError(f"{kind} needs a closure, which runs a batch many times: {kind} in a loop of your own.")
    if isinstance(loss, type) or not callable(loss):
        fix = "loss=nn.CrossEntropyLoss(), or a function of (output, target)"
        raise TrainingError(f"loss is {describe_kind(loss)}: {fix}.")
    options = loss.keywords if isinstance(loss, partial) else {}
    if options.get("reduction", getattr(loss, "reduction", None)) == "sum":
        text = 'the loss adds up its batch (reduction="sum"), and the trainer needs the mean, whatever the batch size'
        raise TrainingError(f'{text}. Try: reduction="mean".')
    if precision == "fp16" and any(p.dtype is torch.float16 for p in model.parameters()):
        raise TrainingError('precision="fp16" trains weights of float32, and the model has float16: model.float().')
    if average is not None and _shapes(getattr(average, "module", None)) != _shapes(model):
        raise TrainingError("average is not an AveragedModel of this model: AveragedModel(model).")


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse options of a Trainer that are out of range.

    Raises:
        TrainingError: With the line that mends it.
    """
    samples, clip_norm = options["samples"], options["clip_norm"]
    if samples is not None and (isinstance(samples, type) or not callable(samples)):
        text = f"samples is {describe_kind(samples)}, not a function of the batch"
        raise TrainingError(f"{text}. Try: samples=lambda batch: len(batch[1]).")
    check_count("accumulate", options["accumulate"], 1, "a step takes at least one batch, accumulate=1.")
    check_count("keep", options["keep"], 0, "how many files, keep=0 for none.")
    check_count("save_every", options["save_every"], 1, "how many steps, save_every=None for none.")
    check_count("seed", options["seed"], 0, "a whole number, seed=0.")
    if options["strategy"] not in get_args(Strategy):
        raise TrainingError(f'strategy={options["strategy"]!r}: one of "ddp", "fsdp".')
    if clip_norm is not None and not (isinstance(clip_norm, Real | torch.Tensor) and float(clip_norm) > 0):
        raise TrainingError(f"clip_norm={clip_norm!r}: a norm is greater than 0, clip_norm=1.0.")


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
            raise TrainingError(f"{name} is {describe_kind(function)}, not a function. Try: {fix}.")
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
    """Refuse a number of things that is not a whole number, or too small.

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
    """Give the metrics by name.

    Raises:
        TrainingError: Not a function, two of one name, or the name of another column.

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
            raise TrainingError(f"metric {name} is {describe_kind(metric)}: {fix}.")
    named = dict(pairs)
    if len(named) < len(pairs) or set(named) & {"loss", *NO_RESULT}:
        names = ", ".join(name for name, _ in pairs)
        raise TrainingError(f'metrics are called {names}: each needs a name of its own, metrics={{"accuracy": f}}.')
    return named


def check_parameters(state: TrainingState, device: torch.device, thaw: Mapping[int, Any]) -> None:
    """Refuse an optimizer of another model, and warn of parameters that would not train.

    Raises:
        DeviceError: A parameter is on another device.
        TrainingError: The optimizer holds no parameter of the model.
        NoMatchError: Something to thaw that is not there.
    """
    if not isinstance(thaw, Mapping) or not all(isinstance(epoch, Integral) for epoch in thaw):
        raise TrainingError(f'thaw={thaw!r}: epoch -> what, thaw={{2: "layer4.**"}}.')
    parameters = dict(state.model.named_parameters())
    for name, parameter in parameters.items():
        if parameter.device.type != device.type:
            fix = f"model.to({str(device)!r})"
            raise DeviceError(f"{name} is on {parameter.device}, the trainer on {device}: {fix}.")
    held = {id(p) for group in state.optimizer.param_groups for p in group["params"]}
    ours = {id(p) for p in parameters.values() if p.requires_grad}
    thawed = {id(p) for where in thaw.values() for p in select_parameters(state.model, where).values()}
    for those, fix in (
        (ours, "modsurg.sync(optimizer, model), or freeze them"),
        (thawed - ours, "make it of model.parameters(); what is frozen does not move until it is thawed"),
    ):
        missing = [name for name, p in parameters.items() if id(p) in those - held]
        if missing:
            are = "is" if len(missing) == 1 else "are"
            warn(f"{listed(missing, 3)} {are} in no optimizer and will not train: {fix}.")
    known = {id(p) for p in parameters.values()}
    loss = {id(p) for p in state.loss.parameters()} if isinstance(state.loss, nn.Module) else set()
    foreign = held - known - loss
    if foreign and not held & known:
        raise TrainingError("the optimizer holds no parameter of this model: make it from model.parameters().")
    if foreign:
        some = counted(len(foreign), "parameter in the optimizer is", "parameters in the optimizer are")
        warn(f"{some} not the model's: modsurg.sync(optimizer, model).")


def _shapes(module: Any) -> dict[str, Any] | None:
    if not isinstance(module, nn.Module):
        return None
    return {name: getattr(p, "shape", None) for name, p in module.named_parameters()}


def _name(metric: Any) -> str:
    return metric if isinstance(metric, str) else getattr(metric, "__name__", type(metric).__name__)
