"""A search through plain Python values for references to modules: changed where they can be, reported where not."""

import gc
import weakref
from collections import deque
from collections.abc import Callable, Container, Iterable, Mapping
from functools import lru_cache, partial
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset, Sampler

from modsurg.surgery.journal import Journal

PLAIN = frozenset({int, float, bool, str, bytes, complex, type(None), type, torch.dtype, torch.device, torch.Size})
_CACHED = type(lru_cache(len))
_FLAT = (tuple, list, set, frozenset, deque)
_APART = (Optimizer, LRScheduler, DataLoader, Dataset, Sampler)  # data, and what follows an edit by itself
_DEPTH, _OBJECT = 24, 8  # so many containers one in another, an object counting for so many of them


class Search:
    """Goes through one attribute after another and notes what has to be changed, before anything is.

    Args:
        journal: Takes note of what is changed.
        swaps: The new module for `id(old)`.
        gone: What left without a successor: `id` of module or parameter -> what to say of it.
        tree: `id` of modules that are looked through on their own.
    """

    def __init__(
        self, journal: Journal, swaps: Mapping[int, nn.Module], gone: Mapping[int, str], tree: Container[int]
    ) -> None:
        self.warnings: list[str] = []
        self._journal, self._swaps, self._gone, self._tree = journal, swaps, gone, tree
        self._pending: list[Callable[[], object]] = []
        self._done: dict[int, tuple[int, object, object]] = {}

    def attribute(self, owner: object, name: str, value: object, where: str, depth: int = _DEPTH) -> None:
        """Look at one attribute of an object."""
        new = self.swap(value, where, depth)
        if new is not value:
            self._pending.append(partial(self._set, owner, name, new))

    def apply(self) -> None:
        """Make the changes that were noted."""
        for change in self._pending:
            change()

    def swap(self, value: Any, where: str, depth: int = _DEPTH) -> Any:
        """What `value` becomes; what can be changed is changed in place, later, by `apply`."""
        if _is_plain(value) or isinstance(value, type | ModuleType):
            return value
        key = id(value)
        if key in self._swaps:
            return self._swaps[key]
        if key in self._gone:
            self.warnings.append(f'"{where}" still holds {self._gone[key]}.')
            return value
        if depth <= 0 or key in self._tree or isinstance(value, (torch.Tensor, *_APART)):
            return value
        known = self._done.get(key)
        if known is None or known[0] < depth:
            self._done[key] = (depth, value, value)  # a value that holds itself stays itself
            self._done[key] = (depth, value, self._searched(value, where, depth - 1))
        return self._done[key][2]

    def _searched(self, value: Any, where: str, depth: int) -> Any:
        if isinstance(value, tuple | frozenset):
            return self._rebuilt(value, where, depth)
        if isinstance(value, MethodType):
            return self._method(value, where, depth)
        if isinstance(value, partial):
            return self._partial(value, where, depth)
        if isinstance(value, weakref.ref):
            return self._weak(value, where, depth)
        if isinstance(value, nn.Module):
            self._outside(value, where)
        elif isinstance(value, list):
            self._in_place(value, enumerate(value), where, depth, partial(self._journal.keep_list, value))
        elif isinstance(value, deque):
            undo = partial(self._journal.on_undo, partial(_refill, value, list(value)))
            self._in_place(value, enumerate(value), where, depth, undo)
        elif isinstance(value, dict):
            self._opaque(value, list(value), where, depth)
            self._in_place(value, value.items(), where, depth)
        elif isinstance(value, set):
            self._set_of(value, where, depth)
        elif isinstance(value, _CACHED):
            self._opaque(value, [value.__wrapped__], where, depth)
        elif isinstance(value, FunctionType):
            self._function(value, where, depth)
        else:
            self._object(value, where, depth - _OBJECT)
        return value

    def _set(self, owner: object, name: str, new: object) -> None:
        if name in getattr(owner, "__dict__", ()):
            self._journal.keep_attr(owner, name)
            owner.__dict__[name] = new
        else:
            self._assign(owner, name, new)

    def _assign(self, owner: object, name: str, new: object) -> None:
        self._journal.on_undo(partial(object.__setattr__, owner, name, getattr(owner, name)))
        object.__setattr__(owner, name, new)

    def _in_place(
        self, holder: Any, items: Any, where: str, depth: int, keep: Callable[[], object] | None = None
    ) -> None:
        for key, value in list(items):
            if _is_plain(value):
                continue
            named = f"{key!r:.50}" if _is_plain(key) else type(key).__name__
            new = self.swap(value, f"{where}[{named}]", depth)
            if new is not value:
                undo = partial(self._journal.on_undo, partial(_put_back, holder, key, new, value))
                self._pending += [keep or undo, partial(holder.__setitem__, key, new)]

    def _rebuilt(self, value: Any, where: str, depth: int) -> Any:
        elements = list(value)
        new = [self.swap(element, f"{where}[{i}]", depth) for i, element in enumerate(elements)]
        if all(a is b for a, b in zip(elements, new, strict=True)):
            return value
        return type(value)(*new) if hasattr(value, "_fields") else type(value)(new)

    def _set_of(self, value: set[Any], where: str, depth: int) -> None:
        elements = list(value)
        new = [self.swap(element, f"{where} (a set)", depth) for element in elements]
        if any(a is not b for a, b in zip(elements, new, strict=True)):
            undo = partial(self._journal.on_undo, partial(_refill, value, elements))
            self._pending += [undo, partial(_refill, value, new)]

    def _method(self, method: MethodType, where: str, depth: int) -> object:
        owner = method.__self__
        if id(owner) in self._gone and id(owner) not in self._swaps:
            self.warnings.append(f'"{where}" is a method of {self._gone[id(owner)]}.')
            return method
        new = self.swap(owner, where, depth)
        if new is owner:
            return method
        bound = getattr(new, method.__name__, None)
        if bound is None:
            self.warnings.append(
                f'"{where}" is still the method {method.__name__} of the old module; {type(new).__name__} has none.'
            )
            return method
        return bound

    def _partial(self, value: "partial[Any]", where: str, depth: int) -> object:
        func = self.swap(value.func, f"{where}.func", depth)
        args = self._rebuilt(value.args, where, depth)
        keywords = {name: self.swap(v, f"{where}.{name}", depth) for name, v in value.keywords.items()}
        same = func is value.func and args is value.args
        if same and all(keywords[name] is v for name, v in value.keywords.items()):
            return value
        return partial(func, *args, **keywords)

    def _weak(self, value: "weakref.ref[Any]", where: str, depth: int) -> object:
        target = value()
        new = self.swap(target, where, depth)
        if new is target:
            return value
        if type(value) is weakref.ref and value.__callback__ is None:
            return weakref.ref(new)
        self._report(where, value)
        return value

    def _outside(self, module: nn.Module, where: str) -> None:
        """Another model that shares a module with this one may mean to keep it."""
        waiting, seen = [(where, module)], {id(module)}
        while waiting:
            above, outer = waiting.pop()
            for name, inner in outer.named_children():
                path = f"{above}.{name}"
                if id(inner) in self._swaps or id(inner) in self._gone:
                    self.warnings.append(
                        f'"{path}" is still the old module: {type(module).__name__} is no part of the model and was '
                        "left as it is; edit it too if it should follow."
                    )
                elif id(inner) not in self._tree and id(inner) not in seen:
                    waiting.append((path, inner))
                seen.add(id(inner))

    def _function(self, function: FunctionType, where: str, depth: int) -> None:
        for cell in function.__closure__ or ():
            self._cell(cell, where, depth)
        for name in ("__defaults__", "__kwdefaults__"):
            value = getattr(function, name)
            new = self.swap(value, f"{where} (default)", depth)
            if new is not value:
                self._pending.append(partial(self._assign, function, name, new))
        self._in_place(vars(function), vars(function).items(), where, depth)

    def _cell(self, cell: CellType, where: str, depth: int) -> None:
        try:
            value = cell.cell_contents
        except ValueError:
            return
        new = self.swap(value, f"{where} (closure)", depth)
        if new is not value:
            undo = partial(setattr, cell, "cell_contents", value)
            self._pending += [partial(self._journal.on_undo, undo), partial(setattr, cell, "cell_contents", new)]

    def _object(self, value: object, where: str, depth: int) -> None:
        attributes = getattr(value, "__dict__", None)
        held = list(attributes.items()) if isinstance(attributes, dict) else []
        names = [name for kind in type(value).__mro__ for name in _slots(kind)]
        held += [(name, getattr(value, name)) for name in names if getattr(value, name, None) is not None]
        for name, inner in held:
            self.attribute(value, name, inner, f"{where}.{name}", depth)
        seen = {id(attributes), *(id(inner) for _, inner in held)}
        self._opaque(value, (each for each in gc.get_referents(value) if id(each) not in seen), where, depth)

    def _opaque(self, holder: object, held: Iterable[object], where: str, depth: int) -> None:
        """Look at what can't be given another reference: an iterator, a key, what a C object holds."""
        for inner in held:
            if type(inner) not in PLAIN and self.swap(inner, where, depth) is not inner:
                self._report(where, holder)

    def _report(self, where: str, holder: object) -> None:
        self.warnings.append(
            f'"{where}" (a {type(holder).__name__}) still holds the old module, and can\'t be given the new one; '
            "make it anew."
        )


def _is_plain(value: object) -> bool:
    """Whether it can hold no module: a plain value, or a container of nothing else, however many."""
    if type(value) in PLAIN:
        return True
    if isinstance(value, dict):
        return PLAIN.issuperset(map(type, value)) and PLAIN.issuperset(map(type, value.values()))
    return isinstance(value, _FLAT) and PLAIN.issuperset(map(type, value))


def _slots(kind: type) -> list[str]:
    declared = vars(kind).get("__slots__", ())
    names = [declared] if isinstance(declared, str) else list(declared)
    return [
        f"_{kind.__name__.lstrip('_')}{name}" if name.startswith("__") and not name.endswith("__") else name
        for name in names
        if name not in ("__dict__", "__weakref__")
    ]


def _put_back(holder: dict[Any, Any], key: object, new: object, old: object) -> None:
    if holder.get(key) is new:
        holder[key] = old


def _refill(holder: Any, elements: list[Any]) -> None:
    holder.clear()
    (holder.update if isinstance(holder, set) else holder.extend)(elements)
