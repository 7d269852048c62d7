"""Plain Python references to modules (a list, a dict, a bound method, a closure): rewired, or reported.

`self.blocks = [self.a, self.b]` is invisible to torch: after `self.a` was replaced, the list would go on calling the
old module without a word.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from modsurg.surgery.steps import Step

_STANDARD = frozenset(nn.Module().__dict__)
_LAST = list(nn.Module().__dict__)[-1]
_PLAIN = frozenset({int, float, bool, str, bytes, complex, type(None), type, torch.dtype, torch.device, torch.Size})
_DEPTH = 4


def rewire(step: Step, swaps: dict[int, nn.Module], gone: dict[int, str], *, ties: bool = True) -> None:
    """Find what else in the model refers to modules that were replaced or that left.

    Args:
        step: Its tree is the model before the edit.
        swaps: The new module for `id(old)`: references to the old one are changed to it.
        gone: What left without a successor, `id` of module or parameter -> its path: references to it are reported.
        ties: Whether a weight that stays is reported when it was tied to one that left.
    """
    search = _Search(step, swaps, gone)
    inside = {id(module) for module in _subtrees(step, swaps)}
    tied: dict[int, str] = {}
    modules = step.tree.modules
    weights = ties and any(key not in step.tree.paths for key in gone)
    for key, paths in step.tree.paths.items():
        if key in inside:
            continue
        module = modules[paths[0]]
        for name, value in _own_attributes(module):
            search.attribute(module, name, value, f"{paths[0]}.{name}" if paths[0] else name)
        for name, parameter in module._parameters.items() if weights and module._parameters else ():
            if id(parameter) in gone and id(parameter) not in tied and not _left(step, paths, gone):
                tied[id(parameter)] = f"{paths[0]}.{name}" if paths[0] else name
    search.apply()
    step.warnings += [
        f'"{gone[key]}" was tied to "{path}" and no longer is. Tie it again if they are still one weight: '
        f"parent.weight = other.weight."
        for key, path in tied.items()
    ]


def _own_attributes(module: nn.Module) -> list[tuple[str, Any]]:
    """What stands in `__dict__` besides plain values and the slots of `nn.Module.__init__`, which mostly come first."""
    attributes = module.__dict__
    size = len(_STANDARD)
    if len(attributes) <= size:
        return []
    behind = size if next(islice(attributes, size - 1, None)) == _LAST else 0
    if _PLAIN.issuperset(map(type, islice(attributes.values(), behind, None))):
        return []
    return [item for item in attributes.items() if type(item[1]) not in _PLAIN and item[0] not in _STANDARD]


def _subtrees(step: Step, swaps: dict[int, nn.Module]) -> Iterator[nn.Module]:
    for key in swaps:
        module = step.tree.modules[step.tree.paths[key][0]]
        yield from module.modules() if module._modules else (module,)


def _left(step: Step, paths: list[str], gone: dict[int, str]) -> bool:
    return id(step.tree.modules[paths[0]]) in gone


class _Search:
    """Goes through one attribute after another and notes what has to be changed, before anything is."""

    def __init__(self, step: Step, swaps: dict[int, nn.Module], gone: dict[int, str]) -> None:
        self.step, self.swaps, self.gone = step, swaps, gone
        self.pending: list[Callable[[], None]] = []

    def attribute(self, owner: object, name: str, value: object, where: str) -> None:
        new = self.swap(value, where, _DEPTH, set())
        if new is not value:
            self.pending.append(partial(self._set, owner, name, new))

    def apply(self) -> None:
        for change in self.pending:
            change()

    def swap(self, value: Any, where: str, depth: int, seen: set[int]) -> Any:
        """What `value` becomes; containers that can be changed are changed in place, later, by `apply`."""
        kind = type(value)
        if kind in _PLAIN or isinstance(value, type | ModuleType):
            return value
        if id(value) in self.swaps:
            return self.swaps[id(value)]
        if id(value) in self.gone:
            self.step.warnings.append(f'"{where}" still holds "{self.gone[id(value)]}", which left the model.')
            return value
        if depth == 0 or id(value) in seen or isinstance(value, nn.Module | torch.Tensor):
            return value
        seen.add(id(value))
        if isinstance(value, list):
            self._in_place(value, enumerate(value), partial(self.step.journal.keep_list, value), where, depth, seen)
        elif isinstance(value, dict):
            self._in_place(value, value.items(), partial(self.step.journal.keep_dict, value), where, depth, seen)
        elif isinstance(value, tuple | frozenset):
            return self._rebuilt(value, where, depth, seen)
        elif isinstance(value, set):
            self._report(value, where)
        elif isinstance(value, MethodType):
            return self._method(value, where)
        elif isinstance(value, partial):
            return self._partial(value, where, depth, seen)
        elif isinstance(value, FunctionType):
            for cell in value.__closure__ or ():
                self._cell(cell, where, depth, seen)
        elif hasattr(value, "__dict__"):
            for name, inner in list(vars(value).items()):
                self.attribute_of(value, name, inner, where, depth, seen)
        return value

    def attribute_of(self, owner: object, name: str, value: object, where: str, depth: int, seen: set[int]) -> None:
        new = self.swap(value, f"{where}.{name}", depth - 1, seen)
        if new is not value:
            self.pending.append(partial(self._set, owner, name, new))

    def _set(self, owner: object, name: str, new: object) -> None:
        self.step.journal.keep_attr(owner, name)
        owner.__dict__[name] = new

    def _in_place(
        self, holder: Any, items: Any, keep: Callable[[], None], where: str, depth: int, seen: set[int]
    ) -> None:
        for key, value in list(items):
            if type(value) in _PLAIN:
                continue
            new = self.swap(value, f"{where}[{key!r}]", depth - 1, seen)
            if new is not value:
                self.pending += [keep, partial(holder.__setitem__, key, new)]

    def _rebuilt(self, value: Any, where: str, depth: int, seen: set[int]) -> Any:
        elements = list(value)
        new = [self.swap(element, f"{where}[{i}]", depth - 1, seen) for i, element in enumerate(elements)]
        if all(a is b for a, b in zip(elements, new, strict=True)):
            return value
        return type(value)(*new) if hasattr(value, "_fields") else type(value)(new)

    def _report(self, value: set[Any], where: str) -> None:
        for element in value:
            if id(element) in self.swaps or id(element) in self.gone:
                self.step.warnings.append(f'"{where}" is a set that still holds a module that left the model.')

    def _method(self, method: MethodType, where: str) -> object:
        new = self.swaps.get(id(method.__self__))
        if new is None:
            if id(method.__self__) in self.gone:
                self.step.warnings.append(f'"{where}" is a method of "{self.gone[id(method.__self__)]}", which left.')
            return method
        bound = getattr(new, method.__name__, None)
        if bound is None:
            self.step.warnings.append(
                f'"{where}" is still the method {method.__name__} of the old module; {type(new).__name__} has none.'
            )
            return method
        return bound

    def _partial(self, value: "partial[Any]", where: str, depth: int, seen: set[int]) -> object:
        func = self.swap(value.func, f"{where}.func", depth - 1, seen)
        args = self._rebuilt(value.args, where, depth, seen)
        keywords = {name: self.swap(v, f"{where}.{name}", depth - 1, seen) for name, v in value.keywords.items()}
        same = func is value.func and args is value.args
        if same and all(keywords[name] is v for name, v in value.keywords.items()):
            return value
        return partial(func, *args, **keywords)

    def _cell(self, cell: CellType, where: str, depth: int, seen: set[int]) -> None:
        try:
            value = cell.cell_contents
        except ValueError:
            return
        new = self.swap(value, f"{where} (closure)", depth - 1, seen)
        if new is not value:
            undo = partial(setattr, cell, "cell_contents", value)
            self.pending += [partial(self.step.journal.on_undo, undo), partial(setattr, cell, "cell_contents", new)]
