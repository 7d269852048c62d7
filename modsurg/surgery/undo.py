"""Taking an edit back: exactly, with what came later kept, or not at all.

At the commit it is noted how the edit left what it touched. An undo compares that with what is there now. A part that
was edited again, or that holds other tensors, is named and nothing changes. What the user did to a part without
editing it (training, a mode, a dtype, a flag) is carried over to what comes back.
"""

from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils.weak import WeakTensorKeyDictionary

from modsurg.errors import UndoError
from modsurg.surgery.changes import Change
from modsurg.surgery.journal import Journal
from modsurg.surgery.resize.axes import Axes, put_back
from modsurg.surgery.resize.values import Resized
from modsurg.tree.eval_lock import held, mode
from modsurg.tree.walk import Tree, last, walk

_last_edits: MutableMapping[torch.Tensor, object] = WeakTensorKeyDictionary()
"""The last edit that touched a tensor. A later freeze of a frozen tensor leaves no other trace."""


class Follower(Protocol):
    """What follows an edit beside the model: its optimizers."""

    def find_conflict(self) -> str | None:
        """What was changed since in a way that can't be undone."""


@dataclass(slots=True)
class _TensorState:
    """A touched tensor as the edit left it.

    Attributes:
        tensor: The tensor.
        places: Its names in the model, each with the module and the `_parameters` or `_buffers` that hold it.
        shape: Its shape; None before its first forward.
        dtype: Its dtype.
        grad: Its gradient.
        grad_version: Counts the writes into that.
        trains: Its `requires_grad`.
        summed: A copy, where channels were summed or positions resampled: the new values do not tell the old ones.
        earlier: The edit that had touched it before.
    """

    tensor: torch.Tensor
    places: list[tuple[str, nn.Module, dict[str, Any]]]
    shape: torch.Size | None
    dtype: torch.dtype
    grad: torch.Tensor | None
    grad_version: int
    trains: bool
    summed: torch.Tensor | None
    earlier: object


@dataclass(slots=True)
class _Children:
    """The children of one module before an edit (none of a new module) and after it.

    Attributes:
        path: Where the module is.
        parent: The module.
        before: Its children before the edit.
        after: Those that the edit left.
    """

    path: str
    parent: nn.Module
    before: dict[str, nn.Module | None]
    after: dict[str, nn.Module | None]

    def find_kept(self) -> dict[str, nn.Module | None]:
        """The children as they are now that this edit did not change; none if it changed the order or the names."""
        if list(self.before) != list(self.after):
            return {}
        return {name: child for name, child in self.parent._modules.items() if self.before[name] is self.after[name]}

    def find_conflict(self, now: Tree) -> str | None:
        """The first child that the edit changed and that was changed since, or the module itself."""
        here, prefix = self.parent._modules, f"{self.path}." if self.path else ""
        if id(self.parent) not in now.paths:
            return f'"{self.path}"'
        same_names = list(self.before) == list(self.after) == list(here)
        for name in {**self.after, **here}:
            mine = not same_names or self.before[name] is not self.after[name]
            if mine and (name not in here or name not in self.after or here[name] is not self.after[name]):
                return f'"{prefix}{name}"'
        return None if list(here) == list(self.after) else f'the order in "{self.path}"'


class Undo:
    """One committed edit that can be taken back.

    Args:
        before: The model before the edit.
        after: The model after it.
        changes: What the edit did.
        journal: What it touched.
        follower: The optimizers that followed.
    """

    def __init__(
        self, before: Tree, after: Tree, changes: Sequence[Change], journal: Journal, follower: Follower
    ) -> None:
        self._root, self._journal, self._follower = before.root, journal, follower
        self._token = object()
        self._axes: dict[int, list[Axes]] = {}
        self._summed: set[int] = set()
        for resized in (change.detail for change in changes if isinstance(change.detail, Resized)):
            for each in resized.tensors:
                self._axes.setdefault(id(each.tensor), []).append(each.axes)
                if resized.sizes.get("in_channels") == (3, 1) or "image_size" in resized.sizes:
                    self._summed.add(id(each.tensor))
        self._parents = []
        for path, module in after.modules.items():
            kept = journal.dicts.get(id(module._modules))
            if kept is not None or id(module) not in before.paths:
                self._parents.append(_Children(path, module, dict(kept[1] if kept else ()), dict(module._modules)))
        self._lists = [(values, list(values)) for values in journal.lists.values()]
        self._attributes = [(o, n, o.__dict__.get(n)) for o, n in journal.attributes.values() if n not in _FOLLOWED]
        self._owners = {
            id(o): o for o, n in journal.attributes.values() if n == "training" and isinstance(o, nn.Module)
        }
        self._modes = {id(m): mode(m) for m in (*(each.parent for each in self._parents), *self._owners.values())}
        self._tensors = self._read_tensors(after) if journal.tensors else []
        self._fresh = [
            (f"{path}.{name}" if path else name, tensor, _last_edits.get(tensor))
            for path, module in after.modules.items()
            if id(module) not in before.paths
            for name, tensor in module._parameters.items()
            if tensor is not None
        ]
        self._witness = next(((p, p.device, p.dtype) for p in _staying(before, after)), None)

    def run(self) -> None:
        """Take the edit back.

        Raises:
            UndoError: What came later can't be kept; nothing was changed.
        """
        now = walk(self._root)
        if conflict := self._find_conflict(now):
            raise UndoError(f"{conflict} was changed since; undo the later edits first.")
        modes = {key: mode(module) for key, module in self._owners.items()}
        parent_modes = {id(each.parent): mode(each.parent) for each in self._parents}
        later = [
            (s, None if is_lazy(s.tensor) else s.tensor.data, s.tensor.grad, s.tensor.requires_grad)
            for s in self._tensors
        ]
        for each in self._parents:
            if id(each.parent._modules) in self._journal.dicts:
                _, items = self._journal.dicts[id(each.parent._modules)]
                items[:] = (each.before | each.find_kept()).items()
        self._journal.rollback()
        for state, data, grad, trains in later:
            self._carry_tensor(state, data, grad, trains)
            if state.earlier is None:
                del _last_edits[state.tensor]
            else:
                _last_edits[state.tensor] = state.earlier
        for key, module in self._owners.items():
            if modes[key] != self._modes[key]:
                _set_mode(module, modes[key])
        self._adapt_returned(now, parent_modes)

    def _read_tensors(self, after: Tree) -> list[_TensorState]:
        states: dict[int, _TensorState] = {}
        for path, module in after.modules.items():
            for slots in (module._parameters, module._buffers):
                for key, tensor in slots.items():
                    if tensor is None or id(tensor) not in self._journal.tensors:
                        continue
                    if id(tensor) not in states:
                        earlier, _last_edits[tensor] = _last_edits.get(tensor), self._token
                        states[id(tensor)] = _TensorState(
                            tensor,
                            places=[],
                            shape=None if is_lazy(tensor) else tensor.shape,
                            dtype=tensor.dtype,
                            grad=tensor.grad,
                            grad_version=_version(tensor.grad),
                            trains=tensor.requires_grad,
                            summed=tensor.detach().clone() if id(tensor) in self._summed else None,
                            earlier=earlier,
                        )
                    states[id(tensor)].places.append((f"{path}.{key}" if path else key, module, slots))
        return list(states.values())

    def _find_conflict(self, now: Tree) -> str | None:
        for children in self._parents:
            if conflict := children.find_conflict(now):
                return conflict
        for state in self._tensors:
            for name, module, slots in state.places:
                resized = id(state.tensor) in self._axes
                if slots.get(last(name)) is not state.tensor or (resized and id(module) not in now.paths):
                    return f'"{name}"'
            if _last_edits.get(state.tensor) is not self._token or self._is_lost(state):
                return f'"{state.places[0][0]}"'
        for name, tensor, edit in self._fresh:
            if _last_edits.get(tensor) is not edit:
                return f'"{name}"'
        for owner, name, value in self._attributes:
            if not _same(owner.__dict__.get(name), value):
                path = next(iter(now.paths.get(id(owner), [])), type(owner).__name__)
                return f'"{path}.{name}"'
        if any(len(v) != len(left) or any(a is not b for a, b in zip(v, left, strict=True)) for v, left in self._lists):
            return "a list that refers to a replaced module"
        return self._follower.find_conflict()

    def _is_lost(self, state: _TensorState) -> bool:
        """Whether what came later can't be carried over: another shape, or training of what was summed or resampled."""
        tensor = state.tensor
        if is_lazy(tensor) or state.shape is None:
            return False
        summed = state.summed
        return tensor.shape != state.shape or (summed is not None and not torch.equal(summed.to(tensor), tensor))

    def _carry_tensor(
        self, state: _TensorState, data: torch.Tensor | None, grad: torch.Tensor | None, trains: bool
    ) -> None:
        """Give a tensor that is back what came later: trained values, a gradient, a flag."""
        tensor, axes = state.tensor, self._axes.get(id(state.tensor), [])
        if data is not None and id(tensor) in self._journal.memory and state.summed is None:
            if axes:
                values = put_back(data, tensor.data, axes)
            else:  # moved in: as it was, unless it was trained
                moved = tensor.data.to(data.device, state.dtype).to(data.dtype)
                values = tensor.data if torch.equal(moved, data) else data.to(tensor.device, tensor.dtype)
            if not torch.equal(values, tensor.data):
                tensor.data = values
        if grad is not state.grad or _version(grad) != state.grad_version:
            if grad is not None and axes and grad.shape != tensor.shape:
                grad = put_back(grad, torch.zeros_like(tensor), axes)
            tensor.grad = None if grad is None else grad.to(tensor.device, tensor.dtype)
        if trains != state.trains and tensor.requires_grad != trains:
            tensor.requires_grad = trains

    def _adapt_returned(self, gone: Tree, modes: dict[int, bool]) -> None:
        """Give modules that are back the device and dtype, and the mode, that the model was given since."""
        moved: dict[str, Any] = {}
        if self._witness is not None:
            weight, device, dtype = self._witness
            moved = {
                n: new
                for n, old, new in (("device", device, weight.device), ("dtype", dtype, weight.dtype))
                if old != new
            }
        now = walk(self._root)
        for path, module in now.modules.items():
            if path and id(module) not in gone.paths:
                parent = now.parent(path)
                if id(parent) in gone.paths:
                    if moved:
                        module.to(**moved)
                    if id(parent) in modes and modes[id(parent)] != self._modes[id(parent)]:
                        module.train(modes[id(parent)])


def _set_mode(module: nn.Module, training: bool) -> None:
    holder = held(module)
    if holder is not None:
        holder.mode = training
    else:
        module.training = training


def _version(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None or is_lazy(tensor) or tensor.is_inference() else tensor._version


def _same(now: object, left: object) -> bool:
    return now is left or (isinstance(now, int | float | str | tuple) and type(now) is type(left) and now == left)


def _staying(before: Tree, after: Tree) -> Iterator[nn.Parameter]:
    """Floating parameters of modules that are in the model before and after."""
    for module in before.modules.values():
        if module._parameters and id(module) in after.paths:
            own = (p for p in module._parameters.values() if p is not None and not is_lazy(p))
            yield from (p for p in own if p.is_floating_point())


_FOLLOWED = {"training", "train"}  # what the user may set at any time; hooks are handed back one by one
