"""Plain Python references to modules that an edit replaced or removed: rewired, or reported.

`self.blocks = [self.a, self.b]` is invisible to torch: after `self.a` was replaced, the list would go on calling the
old module without a word. References are rewired in attributes, lists, dicts, tuples, sets, bound methods, partials
and closures. Anything else that refers to the old module is reported.
"""

from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from functools import partial
from operator import itemgetter
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset, Sampler

from modsurg.structure.module_state import HOOKS
from modsurg.surgery.changes import Change
from modsurg.surgery.journal import Journal
from modsurg.tree.walk import Tree, parents

PLAIN = frozenset({int, float, bool, str, bytes, complex, type(None), type, torch.dtype, torch.device, torch.Size})
_STANDARD = frozenset(nn.Module().__dict__)
_hooks_of = itemgetter(*HOOKS)
_APART = (Optimizer, LRScheduler, DataLoader, Dataset, Sampler)  # data, and what follows an edit by itself
_DEPTH, _OBJECT = 24, 8  # how deep containers may be nested, an object counting for several


def rewire(tree: Tree, changes: Sequence[Change], journal: Journal) -> list[str]:
    """Change the references of the model to modules that were replaced, wherever that is possible.

    Args:
        tree: The model before the edit.
        changes: Those of one verb.
        journal: Takes note of what is changed.

    Returns:
        Warnings that name the other references, and weights that were tied to one that left.
    """
    whole = [change for change in changes if _is_whole(tree, change)]
    swaps = {id(change.old): change.new for change in whole if change.new is not None}
    gone = _find_gone(tree, changes)
    left = {key: f'"{path}", which left the model' for key, path in gone.items()}
    fresh = {id(module) for new in swaps.values() for module in (new.modules() if new._modules else (new,))}
    search = Search(swaps, left, tree.paths.keys() | fresh)
    inside = {id(m) for change in whole if change.old is not None for m in _subtree(change.old)}
    for key, paths in tree.paths.items():
        if key not in inside and key not in gone:
            search.module(tree.modules[paths[0]], paths[0])
    for key, new in swaps.items():
        if not any(id(module) == key for module in _subtree(new)):
            search.hooks(new, tree.paths[key][0])
    search.apply(journal)
    untied = [] if all(change.kind == "remove" for change in changes) else _warn_of_ties(tree, gone, inside)
    return search.warnings + untied


def warn_of_untied(tree: Tree, changes: Iterable[Change]) -> list[str]:
    """Warn of references in the parents of edited paths, where the module has other paths too and stays there."""
    owners: dict[str, dict[int, str]] = {}
    for change in changes:
        for path in () if _is_whole(tree, change) else change.paths:
            held = owners.setdefault(path.rpartition(".")[0], {})
            held.setdefault(id(change.old), f'the module that was at "{path}" too')
    warnings = []
    for owner, held in owners.items():
        search = Search({}, held, tree.paths)
        search.attributes(tree.modules[owner], owner)
        warnings += search.warnings
    return warnings


def _is_whole(tree: Tree, change: Change) -> bool:
    return change.old is not None and len(change.paths) == len(tree.paths[id(change.old)])


def _subtree(module: nn.Module) -> Iterable[nn.Module]:
    return module.modules() if module._modules else (module,)


def _find_gone(tree: Tree, changes: Sequence[Change]) -> dict[int, str]:
    """Find modules and parameters that left without a successor: `id` -> the path where they were."""
    edited: dict[int, set[str]] = {}
    for change in changes:
        edited.setdefault(id(change.old), set()).update(change.paths)
    whole = [change for change in changes if len(edited[id(change.old)]) == len(tree.paths[id(change.old)])]
    gone: dict[int, str] = {}
    stayed: set[int] = set()
    paths = {path for change in whole for path in change.paths}
    for change in whole:
        assert change.old is not None
        for name, module in (
            change.old.named_modules(prefix=change.paths[0])
            if change.old._modules
            else ((change.paths[0], change.old),)
        ):
            gone[id(module)] = name
            named = ((id(p), f"{name}.{leaf}") for leaf, p in module._parameters.items() if p is not None)
            gone.update(named)
        for module in _subtree(change.new) if change.new is not None else ():
            stayed.add(id(module))
            stayed.update(map(id, module._parameters.values()))
    elsewhere = (key for key in gone if key not in stayed and _is_elsewhere(tree, key, paths))
    for key in [*stayed.intersection(gone), *elsewhere]:
        del gone[key]
    return gone


def _is_elsewhere(tree: Tree, key: int, edited: Container[str]) -> bool:
    paths = tree.paths.get(key, ())
    return len(paths) > 1 and any(
        path not in edited and not any(owner in edited for owner in parents(path)) for path in paths
    )


def _warn_of_ties(tree: Tree, gone: Mapping[int, str], inside: Container[int]) -> list[str]:
    """Warn of weights that stay and were tied to one that left."""
    if all(key in tree.paths for key in gone):
        return []
    tied: dict[int, str] = {}
    for key, paths in tree.paths.items():
        module = tree.modules[paths[0]]
        for name, parameter in module._parameters.items() if key not in inside and key not in gone else ():
            if id(parameter) in gone:
                tied.setdefault(id(parameter), f"{paths[0]}.{name}" if paths[0] else name)
    return [
        f'"{gone[key]}" was tied to "{name}" and no longer is. Tie it again if they are still one weight: '
        f"parent.weight = other.weight."
        for key, name in tied.items()
    ]


class Search:
    """Goes through one attribute after another and collects the changes, before any is made.

    Args:
        swaps: The new module for `id(old)`.
        gone: What left without a successor: `id` of module or parameter -> how a warning calls it.
        tree: `id` of modules that are searched on their own.
    """

    def __init__(self, swaps: Mapping[int, nn.Module], gone: Mapping[int, str], tree: Container[int]) -> None:
        self.warnings: list[str] = []
        self._swaps, self._gone, self._tree = swaps, gone, tree
        self._pending: list[Callable[[Journal], None]] = []
        self._done: dict[int, tuple[int, object, object]] = {}
        self._slots: dict[type, list[str]] = {}

    def module(self, module: nn.Module, path: str) -> None:
        """Search the attributes and hooks of a module."""
        self.attributes(module, path)
        self.hooks(module, path)

    def attributes(self, module: nn.Module, path: str) -> None:
        """Search the attributes of a module, but for those that every module has."""
        more = vars(module).keys() - _STANDARD if len(vars(module)) > len(_STANDARD) else ()
        for name in more if len(more) < 2 else [name for name in vars(module) if name in more]:
            value = module.__dict__[name]
            if type(value) not in PLAIN:
                self._attribute(module, name, value, f"{path}.{name}" if path else name, _DEPTH)
        for name, value in self._slots_of(module):
            self._report(value, f"{path}.{name}" if path else name, module, _DEPTH)

    def hooks(self, module: nn.Module, path: str) -> None:
        """Search the hooks of a module."""
        for name in HOOKS if any(_hooks_of(module.__dict__)) else ():
            if hooks := module.__dict__[name]:
                self.swap(hooks, f"{path} ({name.strip('_').replace('_', ' ')})")

    def apply(self, journal: Journal) -> None:
        """Make the changes that were collected."""
        for change in self._pending:
            change(journal)

    def swap(self, value: Any, where: str, depth: int = _DEPTH) -> Any:
        """Return what `value` becomes; what can be changed in place is changed by `apply`."""
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
            self._done[key] = (depth, value, self._search(value, where, depth - 1))
        return self._done[key][2]

    def _search(self, value: Any, where: str, depth: int) -> Any:
        if isinstance(value, tuple | frozenset):
            return self._rebuild(value, where, depth)
        if isinstance(value, MethodType):
            return self._method(value, where, depth)
        if isinstance(value, partial):
            return self._partial(value, where, depth)
        if isinstance(value, nn.Module):
            self._outside(value, where)
        elif isinstance(value, list):
            self._items(value, enumerate(list.__iter__(value)), where, depth)
        elif isinstance(value, dict):
            for key in dict.keys(value):
                self._report(key, where, value, depth)
            self._items(value, dict.items(value), where, depth)
        elif isinstance(value, set):
            self._set(value, where, depth)
        elif isinstance(value, FunctionType):
            for cell in value.__closure__ or ():
                self._cell(cell, where, depth)
            defaults = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
            self._report(defaults, f"{where} (default)", value, depth)
            self._items(vars(value), vars(value).items(), where, depth)
        else:
            self._object(value, where, depth - _OBJECT)
        return value

    def _attribute(self, owner: object, name: str, value: object, where: str, depth: int) -> None:
        new = self.swap(value, where, depth)
        if new is not value:
            self._pending.append(partial(_set_attribute, owner, name, new))

    def _items(self, holder: Any, items: Iterable[tuple[Any, Any]], where: str, depth: int) -> None:
        for key, value in list(items):
            if not _is_plain(value):
                named = f"{key!r:.50}" if _is_plain(key) else type(key).__name__
                new = self.swap(value, f"{where}[{named}]", depth)
                if new is not value:
                    self._pending.append(partial(_set_item, holder, key, new, value))

    def _rebuild(self, value: Any, where: str, depth: int) -> Any:
        kind = tuple if isinstance(value, tuple) else frozenset
        elements = list(kind.__iter__(value))
        new = [self.swap(element, f"{where}[{i}]", depth) for i, element in enumerate(elements)]
        if all(a is b for a, b in zip(elements, new, strict=True)):
            return value
        try:
            made: Any = kind.__new__(type(value), new)
            made.__dict__.update(vars(value)) if hasattr(made, "__dict__") else None
        except TypeError:  # a tuple of C with fields of its own
            self._warn(where, value)
            return value
        return made

    def _set(self, value: set[Any], where: str, depth: int) -> None:
        elements = list(set.__iter__(value))
        new = [self.swap(element, f"{where} (a set)", depth) for element in elements]
        if any(a is not b for a, b in zip(elements, new, strict=True)):
            self._pending.append(partial(_refill, value, new, elements))

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
        args = self._rebuild(value.args, where, depth)
        keywords = {name: self.swap(v, f"{where}.{name}", depth) for name, v in value.keywords.items()}
        same = func is value.func and args is value.args
        if same and all(keywords[name] is v for name, v in value.keywords.items()):
            return value
        return partial(func, *args, **keywords)

    def _outside(self, module: nn.Module, where: str) -> None:
        """Report a module of another model that shares a module with this one: that model may mean to keep it."""
        for name, inner in _outer_modules(module, self._tree):
            if id(inner) in self._swaps or id(inner) in self._gone:
                self.warnings.append(
                    f'"{where}.{name}" is still the old module: {type(module).__name__} is not part of the model and '
                    "was left as it was; edit it too if it should follow."
                )

    def _cell(self, cell: CellType, where: str, depth: int) -> None:
        try:
            value = cell.cell_contents
        except ValueError:  # empty
            return
        new = self.swap(value, f"{where} (closure)", depth)
        if new is not value:
            self._pending.append(partial(_set_cell, cell, new, value))

    def _object(self, value: object, where: str, depth: int) -> None:
        """Rewire the attributes of an object; report what else it holds: elements, and slots."""
        attributes = getattr(value, "__dict__", None)
        for name, inner in list(attributes.items()) if isinstance(attributes, dict) else ():
            self._attribute(value, name, inner, f"{where}.{name}", depth)
        for name, inner in self._slots_of(value):
            self._report(inner, f"{where}.{name}", value, depth)
        if isinstance(value, Collection):
            self._report(value, where, value, depth)

    def _report(self, held: Any, where: str, holder: object, depth: int) -> None:
        """The one check for references that are not rewired: warn if `held` or an element of it is an old module."""
        elements = held if isinstance(held, Collection) and not _is_plain(held) else [held]
        for element in elements:
            if type(element) not in PLAIN and self.swap(element, where, depth) is not element:
                self._warn(where, holder)

    def _warn(self, where: str, holder: object) -> None:
        self.warnings.append(
            f'"{where}" (a {type(holder).__name__}) still holds the old module, and can\'t be given the new one; '
            "make it again."
        )

    def _slots_of(self, value: object) -> list[tuple[str, Any]]:
        kind = type(value)
        if kind not in self._slots:
            declared = [vars(base).get("__slots__", ()) for base in kind.__mro__]
            names = [name for each in declared for name in ([each] if isinstance(each, str) else each)]
            self._slots[kind] = [name for name in names if name not in ("__dict__", "__weakref__")]
        found = []
        for name in self._slots[kind]:
            slot: Any = getattr(kind, name, None)
            if hasattr(slot, "__get__") and hasattr(slot, "__set__"):
                try:
                    found.append((name, slot.__get__(value)))
                except AttributeError:  # empty
                    continue
        return found


def _outer_modules(module: nn.Module, tree: Container[int]) -> Iterator[tuple[str, nn.Module]]:
    """Every module below `module` that can be reached without going through one of the tree."""
    waiting, seen = [("", module)], {id(module)}
    while waiting:
        path, outer = waiting.pop()
        for name, inner in outer.named_children():
            if id(inner) not in seen:
                seen.add(id(inner))
                yield f"{path}{name}", inner
                if id(inner) not in tree:
                    waiting.append((f"{path}{name}.", inner))


def _is_plain(value: object) -> bool:
    """Whether it can hold no module: a plain value, or a container of nothing else, however many."""
    if type(value) in PLAIN:
        return True
    if isinstance(value, dict):
        return PLAIN.issuperset(map(type, dict.keys(value))) and PLAIN.issuperset(map(type, dict.values(value)))
    kind = next((each for each in (tuple, list, set, frozenset) if isinstance(value, each)), None)
    return kind is not None and PLAIN.issuperset(map(type, kind.__iter__(value)))  # type: ignore[arg-type]


def _set_attribute(owner: Any, name: str, new: object, journal: Journal) -> None:
    journal.keep_attr(owner, name)
    owner.__dict__[name] = new


def _set_item(holder: Any, key: object, new: object, old: object, journal: Journal) -> None:
    if isinstance(holder, list):
        journal.keep_list(holder)
    else:
        journal.on_undo(partial(_put_back, holder, key, new, old))
    holder[key] = new


def _set_cell(cell: CellType, new: object, old: object, journal: Journal) -> None:
    journal.on_undo(partial(setattr, cell, "cell_contents", old))
    cell.cell_contents = new


def _put_back(holder: dict[Any, Any], key: object, new: object, old: object) -> None:
    if holder.get(key) is new:
        holder[key] = old


def _refill(holder: set[Any], new: list[Any], old: list[Any], journal: Journal) -> None:
    journal.on_undo(partial(_fill, holder, old))
    _fill(holder, new)


def _fill(holder: set[Any], elements: list[Any]) -> None:
    holder.clear()
    holder.update(elements)
