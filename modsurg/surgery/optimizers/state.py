"""What an optimizer remembers of each parameter, when parameters leave, enter or change their shape, and back again."""

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import LBFGS, SGD, Adagrad, Optimizer

from modsurg.surgery.optimizers.groups import NamedParameters, rewrite_group
from modsurg.surgery.resize.axes import Axes, Reshaped, factor, like, new_shape, overlay, put_back, resized

State = MutableMapping[Any, Any]


@dataclass(slots=True)
class _ResizedEntry:
    """What was kept for a resized parameter.

    Attributes:
        parameter: The parameter.
        entry: Its entry, None if it had none.
        items: What was in it before.
        axes: How each of its tensors was resized, one after another.
        reset: Whether it was dropped.
    """

    parameter: torch.Tensor
    entry: dict[str, Any] | None
    items: dict[str, Any]
    axes: dict[str, list[Axes]]
    reset: bool = False


class OptimizerJournal:
    """What an edit changed in one optimizer, to be taken back without what came later.

    Args:
        optimizer: About to change.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._before = [list(group["params"]) for group in optimizer.param_groups]
        self._names = [list(group.get("param_names", ())) for group in optimizer.param_groups]
        self._after: list[list[Any]] | None = None
        self._entries: NamedParameters = {}
        self._orders = [list(state) for state in states(optimizer)]
        self._forgotten: list[tuple[int, Any, Any]] = []
        self._started: list[tuple[Any, dict[str, Any]]] = []
        self._resized: list[dict[int, _ResizedEntry]] = [{} for _ in self._orders]
        self._cache = getattr(optimizer, "_numel_cache", None)

    def seal(self, entries: NamedParameters) -> None:
        """Note the groups as the edit left them, and the names that the parameters have now."""
        self._after, self._entries = [list(group["params"]) for group in self.optimizer.param_groups], entries

    def forget(self, parameter: torch.Tensor) -> None:
        """Drop what the optimizer remembers of a parameter that has left."""
        for number, state in enumerate(states(self.optimizer)):
            if parameter in state:
                self._forgotten.append((number, parameter, state.pop(parameter)))

    def start(self, group: dict[str, Any], parameter: torch.Tensor) -> None:
        """Give a parameter that enters a group, or trains from now on, the state without which a step would fail."""
        if start_entry(self.optimizer, group, parameter):
            entry = self.optimizer.state[parameter]
            self._started.append((parameter, entry))

    def restart(self) -> str | None:
        """Drop a history that runs over all parameters at once; returns what is to be said of it."""
        if not isinstance(self.optimizer, LBFGS):
            return None
        self.optimizer._numel_cache = None
        if not self.optimizer.state:
            return None
        for parameter in list(self.optimizer.state):
            self.forget(parameter)
        return "the history over all parameters does not match the new ones, so it was reset"

    def resize(self, group: dict[str, Any], shape: Reshaped) -> str | None:
        """Resize what the optimizer remembers of a resized parameter; returns what is to be said of it.

        Tensors of the parameter's shape, and factored ones with a number for each row or column, keep the same places;
        step counts stay. An entry with anything else in it is reset.
        """
        for number, state in enumerate(states(self.optimizer)):
            entry = state.get(shape.tensor)
            fresh = _ResizedEntry(shape.tensor, entry, dict(entry or {}), {})
            known = self._resized[number].setdefault(id(shape.tensor), fresh)
            if not entry:
                continue
            changed = {}
            for key, value in entry.items():
                axes = factor(shape.axes, value.shape, str(key)) if _is_sized(key, value) else None
                if axes is not None:
                    changed[key] = _resize(str(key), value, axes, shape.tensor, self.optimizer.defaults | group)
                    known.axes.setdefault(key, []).append(axes)
                elif _is_sized(key, value) or isinstance(value, (list, tuple, dict)):
                    what = tuple(value.shape) if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
                    del state[shape.tensor]
                    known.reset = True
                    return f"{key} is {what}, which can't be resized, so its state was reset"
            entry.update(changed)
        return None

    def find_conflict(self) -> str | None:
        """Whether groups that the edit left are gone."""
        if len(self.optimizer.param_groups) < len(self._before):
            return f"param_groups of {type(self.optimizer).__name__}"
        return None

    def undo(self, now: NamedParameters) -> None:
        """Take the edit back: what left returns, what entered leaves; the rest stays as it is.

        Args:
            now: The parameters of the model, which is as it was before the edit.
        """
        before = {id(p) for params in self._before for p in params}
        after = before if self._after is None else {id(p) for params in self._after for p in params}
        entered = after - before
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]} - entered
        for number, (group, params) in enumerate(zip(self.optimizer.param_groups, self._before, strict=False)):
            if self._after is None or _same(group["params"], self._after[number]):
                group["params"][:] = params
                if "param_names" in group:
                    group["param_names"][:] = self._names[number]
                continue
            back = [now[id(p)] for p in params if id(p) not in held and id(p) in now]
            rewrite_group(group, back, entered, self._entries, now)
        for group in self.optimizer.param_groups[len(self._before) :]:
            rewrite_group(group, (), entered, self._entries, now)
        self._undo_state(entered)

    def _undo_state(self, entered: set[int]) -> None:
        optimizer = self.optimizer
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if isinstance(optimizer, LBFGS):
            optimizer._numel_cache = None if optimizer.state else self._cache
        for parameter, entry in self._started:
            if optimizer.state.get(parameter) is entry and not entry.get("step", entry.get("momentum_buffer")).any():
                del optimizer.state[parameter]
        for number, (state, order) in enumerate(zip(states(optimizer), self._orders, strict=False)):
            if isinstance(optimizer, LBFGS) and state:
                state.clear()
                continue
            for parameter in [p for p in state if id(p) in entered]:
                del state[parameter]
            for known in self._resized[number].values():
                _undo_resize(state, known)
            for place, parameter, entry in self._forgotten:
                if place == number and id(parameter) in held:
                    state.setdefault(parameter, entry)
            _sort(state, order, optimizer)
        known_before = {id(parameter) for parameter in self._orders[0]}
        for group in optimizer.param_groups:
            if any(p in optimizer.state and id(p) not in known_before for p in group["params"]):
                for parameter in (p for p in group["params"] if p.requires_grad and p not in optimizer.state):
                    start_entry(optimizer, group, parameter)


def states(optimizer: Optimizer) -> list[State]:
    """The state of an optimizer, and that of one that it wraps and shares its groups with."""
    found = [optimizer.state, *(inner.state for inner in find_wrapped(optimizer))]
    return list({id(state): state for state in found}.values())


def find_wrapped(optimizer: object) -> list[Any]:
    """Optimizers in the attributes of another one."""
    return [value for value in vars(optimizer).values() if hasattr(value, "param_groups") and value is not optimizer]


def start_entry(optimizer: Optimizer, group: dict[str, Any], parameter: torch.Tensor) -> bool:
    """Make the state without which a step would fail; returns whether any was made.

    Adagrad's constructor makes state; fused SGD can't step parameters with momentum and new ones at once.
    """
    if isinstance(optimizer, SGD) and group.get("fused"):
        buffers = (optimizer.state.get(p, {}).get("momentum_buffer") for p in group["params"])
        if any(buffer is not None for buffer in buffers):
            optimizer.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}
            return True
    if isinstance(optimizer, Adagrad):
        start = optimizer.defaults["initial_accumulator_value"]
        value = complex(start, start) if parameter.is_complex() else start
        device = parameter.device if optimizer.defaults.get("fused") else None
        optimizer.state[parameter] = {
            "step": torch.tensor(0.0, dtype=torch.float32, device=device),
            "sum": torch.full_like(parameter, value, memory_format=torch.preserve_format),
        }
        return True
    return False


def _is_sized(key: str, value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0 and key != "step"


def _resize(
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


def _undo_resize(state: State, known: _ResizedEntry) -> None:
    """Bring an entry back; what was learnt since of the places that were kept, and step counts, stay."""
    entry = state.get(known.parameter)
    if known.entry is None:
        state.pop(known.parameter, None)
    elif entry is None or known.reset:
        known.entry.clear()
        known.entry.update(known.items)
        state[known.parameter] = known.entry
    else:
        for key, axes in known.axes.items():
            old = known.items[key]
            back = put_back(entry[key], old, axes) if isinstance(entry.get(key), torch.Tensor) else old
            entry[key] = old if torch.equal(back, old) else back


def _sort(state: State, order: Sequence[Any], optimizer: Optimizer) -> None:
    """Put the entries into the order of the groups, if they were in it; else those that are new follow."""
    ranks = {id(p): rank for rank, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    known = [ranks[id(p)] for p in order if id(p) in ranks]
    if known == sorted(known):
        items = sorted(state.items(), key=lambda item: ranks.get(id(item[0]), len(ranks)))
    else:
        places = {id(p): place for place, p in enumerate(order)}
        items = sorted(state.items(), key=lambda item: places.get(id(item[0]), len(places)))
    state.clear()
    state.update(items)


def _same(one: Sequence[Any], two: Sequence[Any]) -> bool:
    return len(one) == len(two) and all(a is b for a, b in zip(one, two, strict=True))
