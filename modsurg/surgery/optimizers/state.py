"""What an optimizer remembers of each parameter, when parameters leave, enter or change their shape."""

from collections.abc import Collection, MutableMapping, Set
from functools import partial
from typing import Any

import torch
from torch.optim import LBFGS, SGD, Adagrad, Optimizer

from modsurg.surgery.journal import Journal
from modsurg.surgery.resize.axes import Axes, Reshaped, factor, like, new_shape, overlay, resized

State = MutableMapping[Any, Any]


def states(optimizer: Optimizer) -> list[State]:
    """The state of an optimizer, and that of one that it wraps and shares its groups with."""
    found = [optimizer.state, *(inner.state for inner in wrapped(optimizer))]
    return list({id(state): state for state in found}.values())


def wrapped(optimizer: object) -> list[Any]:
    """Optimizers that stand in the attributes of another one."""
    return [value for value in vars(optimizer).values() if hasattr(value, "param_groups") and value is not optimizer]


def keep(optimizer: Optimizer, changed: Collection[int], journal: Journal) -> None:
    """Take note of which parameter has which entry; what the others learn later is not taken back.

    Args:
        optimizer: Its state is about to change.
        changed: `id` of the parameters that are about to enter or to be resized: what they have learnt later no longer
            fits when this is undone.
        journal: Takes the note.
    """
    for number, state in enumerate(states(optimizer)):
        journal.on_undo(partial(_restore, optimizer, number, state, list(state.items()), changed))


def forget(optimizer: Optimizer, parameter: torch.Tensor) -> None:
    """Drop what the optimizer remembers of a parameter that has left."""
    for state in states(optimizer):
        state.pop(parameter, None)


def begin(optimizer: Optimizer, group: dict[str, Any], parameter: torch.Tensor) -> None:
    """Give a parameter that has entered a group, or trains from now on, the state without which a step would fail.

    Adagrad's constructor makes state; fused SGD can't step parameters with momentum and new ones at once.
    """
    if isinstance(optimizer, SGD) and group.get("fused"):
        buffers = (optimizer.state.get(p, {}).get("momentum_buffer") for p in group["params"])
        if any(buffer is not None for buffer in buffers):
            optimizer.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}
    if isinstance(optimizer, Adagrad):
        start = optimizer.defaults["initial_accumulator_value"]
        value = complex(start, start) if parameter.is_complex() else start
        device = parameter.device if optimizer.defaults.get("fused") else None
        optimizer.state[parameter] = {
            "step": torch.tensor(0.0, dtype=torch.float32, device=device),
            "sum": torch.full_like(parameter, value, memory_format=torch.preserve_format),
        }


def restart(optimizer: Optimizer, journal: Journal) -> str | None:
    """Forget a history that runs over all parameters at once; returns what is to be said of it."""
    if not isinstance(optimizer, LBFGS):
        return None
    journal.keep_attr(optimizer, "_numel_cache")
    optimizer._numel_cache = None
    if not optimizer.state:
        return None
    optimizer.state.clear()
    return "the history over all parameters no longer fits, so it begins anew"


def resize_state(optimizer: Optimizer, group: dict[str, Any], shape: Reshaped, journal: Journal) -> str | None:
    """Resize what the optimizer remembers of a resized parameter; returns what is to be said of it.

    Tensors of the parameter's shape, and factored ones with a number for each row or column, keep what overlaps; step
    counts stay. An entry with anything else in it begins anew.
    """
    for number, state in enumerate(states(optimizer)):
        entry = state.get(shape.tensor)
        if not entry:
            continue
        changed = {}
        for key, value in entry.items():
            if isinstance(value, (list, tuple, dict)):
                del state[shape.tensor]
                return f"{key} is a {type(value).__name__}, which is not understood, so its state begins anew"
            if isinstance(value, torch.Tensor) and value.ndim and key != "step":
                fitting = factor(shape.axes, value.shape, str(key))
                if fitting is None:
                    del state[shape.tensor]
                    return f"{key} is {tuple(value.shape)}, which is not understood, so its state begins anew"
                changed[key] = _resized(str(key), value, fitting, shape.tensor, optimizer.defaults | group)
        journal.on_undo(partial(_resize_back, optimizer, number, shape.tensor, list(entry.items())))
        entry.update(changed)
    return None


def _resized(
    key: str, value: torch.Tensor, axes: Axes, parameter: torch.Tensor, options: dict[str, Any]
) -> torch.Tensor:
    """New places begin as the optimizer begins: at zero, but for three."""
    if key == "ax" and parameter.shape == new_shape(axes):  # ASGD: the average of the parameter itself
        new = parameter.detach().clone(memory_format=torch.contiguous_format)
        overlay(value, new, axes)
        return like(new, value)
    if key == "step_size":  # Rprop
        return resized(value, axes, float(options["lr"]))
    if key == "sum":  # Adagrad
        return resized(value, axes, float(options.get("initial_accumulator_value", 0.0)))
    return resized(value, axes)


def _restore(
    optimizer: Optimizer, number: int, kept: State, items: list[tuple[Any, Any]], changed: Collection[int]
) -> None:
    """Into the state as it is now: after a `load_state_dict` it is another object, with newer entries."""
    state = states(optimizer)[number]
    known = {id(parameter) for parameter, _ in items}
    later = [(p, entry) for p, entry in state.items() if id(p) not in known and id(p) not in changed]
    if isinstance(optimizer, LBFGS):  # one history over all
        later = []
    if isinstance(optimizer, SGD):
        lost = _without_momentum(optimizer, known, {id(p) for p, _ in later})
        later = [(p, entry) for p, entry in later if id(p) not in lost]
    if state is not kept:
        items = [(p, state.get(p, entry)) for p, entry in items]
    _refill(state, items + later)


def _without_momentum(optimizer: SGD, known: Set[int], later: Set[int]) -> set[int]:
    """`id` of those that begin anew so that a fused step is possible: all have momentum in it or none has; see `begin`.

    They are in a group in which none had momentum before, and one that comes back has none now.
    """
    fused = ({id(p) for p in group["params"]} for group in optimizer.param_groups if group.get("fused"))
    return set().union(*(members for members in fused if not members & known and not members <= later))


def _resize_back(optimizer: Optimizer, number: int, parameter: torch.Tensor, items: list[tuple[Any, Any]]) -> None:
    entry = states(optimizer)[number].get(parameter)
    if entry is not None:
        _refill(entry, items)


def _refill(mapping: State, items: list[tuple[Any, Any]]) -> None:
    mapping.clear()
    mapping.update(items)
