"""A pickled module seen as data: its tree and its tensors, whether or not its classes exist here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

from modsurg.checkpoints.formats.torch_save.tensors import Device, Stored
from modsurg.checkpoints.formats.torch_save.unpickler import Made, Name, Ordered, shown
from modsurg.errors import FormatError
from modsurg.structure.encode import Packer
from modsurg.structure.module_state import HOOKS, NORM_HOOKS, UNUSED_HOOKS, is_kept
from modsurg.structure.schema import BESIDE, checked
from modsurg.structure.trust import ENUMS
from modsurg.tree.eval_lock import EvalLock

_SLOTS = ("_parameters", "_buffers", "_modules")
_DEEPEST = 300
_MOST = 1_000_000
# A pickle has torch's own functions as attributes of this class.
_TORCH_FUNCTIONS: Final = "torch._C._VariableFunctionsClass"
_EVAL_LOCK: Final = f"{EvalLock.__module__}.{EvalLock.__qualname__}"
_WRAPPED_HOOK: Final = "torch.nn.modules.module._WrappedHook"


@dataclass(frozen=True, slots=True)
class PickledTree:
    """A pickled module as the data that `structure.build` takes.

    Attributes:
        data: The tree; a value that no file may hold is None in it.
        tensors: The tensors that the tree names, by name.
        problems: Those values, each by its path.
    """

    data: dict[str, Any]
    tensors: Mapping[str, Stored]
    problems: list[str]

    def of_state(self) -> dict[str, Any]:
        """The tree for a file that has the tensors of the state_dict alone; "partial" where that is not all of it."""
        beside = [name for name in self.tensors if name.startswith(BESIDE)]
        if not (beside or self.problems):
            return self.data
        entries = [
            {key: value for key, value in entry.items() if key != "name" or value not in beside}
            for entry in self.data["tensors"]
        ]
        return {**self.data, "tensors": entries, "partial": True}


def is_module(value: object) -> bool:
    """Whether it is what is left of a pickled `nn.Module`."""
    return isinstance(value, Made) and isinstance(value.state, dict) and all(slot in value.state for slot in _SLOTS)


def module_state(root: Made) -> dict[str, Stored]:
    """The state_dict of a pickled module.

    Raises:
        FormatError: It is damaged, or holds itself.
    """
    state: dict[str, Stored] = {}
    stack = [("", root, 0)]
    for _ in range(_MOST):
        if not stack:
            return state
        prefix, module, depth = stack.pop()
        if depth > _DEEPEST:
            break
        passing = module.state.get("_non_persistent_buffers_set", ())
        for slot in ("_parameters", "_buffers"):
            for name, value in _items(module, slot):
                if isinstance(value, Stored) and not (slot == "_buffers" and name in passing):
                    state[prefix + name] = value
        children = [(name, child) for name, child in _items(module, "_modules") if is_module(child)]
        stack.extend((f"{prefix}{name}.", child, depth + 1) for name, child in reversed(children))
    raise FormatError("its modules hold one another without an end")


def module_tree(root: Made) -> PickledTree:
    """The tree of a pickled module, as `structure.describe` would write it of the module itself.

    Raises:
        FormatError: It is damaged, or holds itself.
    """
    return _ModuleReader(root).tree()


class _ModuleReader:
    """Numbers the modules, tensors and values of a pickled module."""

    def __init__(self, root: Made) -> None:
        self._keys = {stored.identity: key for key, stored in reversed(module_state(root).items())}
        self._packer = _PickledPacker(self)
        self._order: list[Made] = []
        self._numbers: dict[int, int] = {}
        self._paths: dict[int, str] = {}
        self._tensors: dict[int, int] = {}
        self._stored: list[Stored] = []
        self._root = self.module(root, "")

    def tree(self) -> PickledTree:
        nodes: list[dict[str, Any]] = []
        while len(nodes) < len(self._order):  # an attribute may bring in a module from outside the tree
            nodes.append(self._node(self._order[len(nodes)]))
        entries: list[dict[str, Any]] = []
        tensors: dict[str, Stored] = {}
        while len(entries) < len(self._stored):  # an attribute of a tensor may be another one
            stored = self._stored[len(entries)]
            name = self._keys.get(stored.identity, f"{BESIDE}{len(entries)}")
            tensors[name] = stored
            entries.append(self._entry(stored, name))
        data = {
            **self._packer.tables(),
            "tensors": entries,
            "modules": nodes,
            "root": self._root,
        }
        return PickledTree(checked(data), tensors, sorted(set(self._packer.problems)))

    def module(self, module: Any, path: str) -> int:
        """The number of a module that was found at `path`; its children are numbered before it."""
        stack = [(module, path)]
        entered: set[int] = set()
        while stack:
            inner, place = stack[-1]
            if id(inner) in self._numbers:
                stack.pop()
            elif id(inner) in entered:
                self._numbers[id(inner)] = len(self._order)
                self._order.append(inner)
            else:
                entered.add(id(inner))
                self._paths[id(inner)] = place
                children = [(child, f"{place}.{name}".strip(".")) for name, child in _items(inner, "_modules")]
                stack += [
                    (child, at) for child, at in reversed(children) if is_module(child) and id(child) not in entered
                ]
        return self._numbers[id(module)]

    def tensor(self, stored: Any, path: str) -> int:
        """The number of a tensor."""
        number = self._tensors.setdefault(id(stored), len(self._stored))
        if number == len(self._stored):
            self._stored.append(stored)
        return number

    def _entry(self, stored: Stored, name: str) -> dict[str, Any]:
        entry: dict[str, Any] = {"name": name, "dtype": str(stored.dtype)[6:], "shape": list(stored.shape)}
        if stored.parameter:
            entry["parameter"] = True
        if stored.requires_grad is not stored.parameter:
            entry["requires_grad"] = stored.requires_grad
        if isinstance(stored.state, dict) and stored.state:
            entry["state"] = self._packer.pack_attributes(stored.state, name)
        return entry

    def _node(self, module: Made) -> dict[str, Any]:
        path = self._paths[id(module)]
        node: dict[str, Any] = {"class": self._packer.name_class(module.maker, path)}
        node["attributes"] = self._attributes(module, path)
        for part, slot in (("parameters", "_parameters"), ("buffers", "_buffers"), ("children", "_modules")):
            found = {name: self._slot(value, f"{path}.{name}".strip("."), slot) for name, value in _items(module, slot)}
            if found:
                node[part] = found
        transient = module.state.get("_non_persistent_buffers_set")
        if isinstance(transient, set) and transient:
            node["transient"] = sorted(map(str, transient))
        hooks = [hook for table in HOOKS for hook in self._hooks(module, table, path)]
        return {**node, "hooks": hooks} if hooks else node

    def _slot(self, value: object, path: str, slot: str) -> int | None:
        if slot == "_modules" and is_module(value):
            return self._numbers[id(value)]
        if slot != "_modules" and isinstance(value, Stored):
            return self.tensor(value, path)
        if value is not None:
            self._packer.refuse(path, describe_value(value), "which no file may hold here")
        return None

    def _attributes(self, module: Made, path: str) -> int | dict[str, Any]:
        held = {name: value for name, value in module.state.items() if type(name) is str and is_kept(name, value)}
        packed = self._packer.share_attributes(held, path)
        weights: Any = held.get("_flat_weights")
        # Recurrent layers pickle without these.
        if type(weights) is list and "_flat_weight_refs" not in held and isinstance(packed, dict):
            numbers = [self.tensor(each, path) if isinstance(each, Stored) else None for each in weights]
            packed["_flat_weight_refs"] = {"list": [{"weakref": number} for number in numbers]}
        return packed

    def _hooks(self, module: Made, table: str, path: str) -> list[list[Any]]:
        found = []
        hooks = module.state.get(table)
        for hook in hooks.values() if isinstance(hooks, dict) else ():
            inner: Any = hook
            if _maker(hook) == _WRAPPED_HOOK and isinstance(hook.state, dict):
                inner = hook.state.get("hook")
            if _maker(inner) in NORM_HOOKS and isinstance(inner.state, dict):
                kind, fields = NORM_HOOKS[_maker(inner)]
                found.append([kind, *(inner.state.get(field) for field in fields)])
            elif _maker(inner) not in UNUSED_HOOKS:
                self._packer.refuse(path or "the model", f"a hook, {describe_value(inner)}", "which no file may hold")
        return found


class _PickledPacker(Packer):
    """Packs what an unpickler left: names and calls in the place of objects."""

    def pack(self, value: object, path: str) -> Any:
        """The value as JSON-able data; see `Packer`."""
        if isinstance(value, Name):
            return self._pack_name(value, path)
        if isinstance(value, Device):
            return {"device": str(value)}
        return super().pack(value, path)

    def pack_attributes(self, held: Mapping[Any, object], path: str) -> dict[str, Any]:
        """The attributes of an object as data; see `Packer`."""
        return super().pack_attributes({str(name): value for name, value in held.items()}, path)

    def name_class(self, maker: object, path: str) -> int:
        """The number of a class or function in the table of names."""
        name = qualified(maker)
        if name is None:
            self.refuse(path, describe_value(maker), "which no file may name")
        return self.names.setdefault(name or "?", len(self.names))

    def _pack_name(self, value: Name, path: str) -> Any:
        constant = vars(torch).get(value.name) if value.module == "torch" else None
        if isinstance(constant, torch.dtype):
            return {"dtype": value.name}
        return {"name": self.name_class(value, path)}

    def _key(self, key: object, path: str) -> Any:
        return self.pack(key, path) if isinstance(key, Name | Device) else super()._key(key, path)

    def _pack_object(self, value: object, path: str) -> Any:
        if isinstance(value, Stored):
            self._marks += 1
            return {"tensor": self._tree.tensor(value, path)}
        if is_module(value):
            self._marks += 1
            return {"module": self._tree.module(value, path)}
        return self._pack_once(value, path)

    def _pack_mutable(self, value: Any, path: str) -> Any:
        if isinstance(value, Ordered):
            return self._pack_ordered(value, path)
        if isinstance(value, Made):
            return self._pack_made(value, path)
        if type(value) in (list, dict, set):
            return super()._pack_mutable(value, path)
        return self.refuse(path, describe_value(value), "which no file may hold")

    def _pack_ordered(self, value: Ordered, path: str) -> Any:
        data = {"class": self.names.setdefault(value.maker.replace(".", ":"), len(self.names))}
        if value.maker.endswith("defaultdict"):
            data["default"] = self.pack(value.default, path)
        return self._with_state({**data, "items": self._pairs(value, path)}, value.state, path)

    def _pack_made(self, made: Made, path: str) -> Any:
        maker, state = _maker(made), made.state
        if maker == "builtins.getattr":
            return self._pack_attribute(made, path)
        if maker == "functools.partial" and isinstance(state, tuple) and len(state) == 4:
            return self._pack_unpickled_partial(state, path)
        if maker == _EVAL_LOCK and isinstance(state, dict) and is_module(state.get("module")):
            return {"eval_lock": [self._tree.module(state["module"], path), self.pack(state.get("mode"), path)]}
        if maker.rpartition(".")[::2] in _ENUMS and len(made.args) == 1:
            return {"enum": [self.name_class(made.maker, path), self.pack(made.args[0], path)]}
        if maker == "collections.deque" and len(made.args) in (0, 2):
            data = {"class": self.name_class(made.maker, path), "base": self._each(made.items, path)}
            return self._with_state(
                {**data, "length": self.pack(made.args[1], path) if made.args else None}, state, path
            )
        if made.called or qualified(made.maker) is None:
            return self.refuse(path, describe_value(made), "which no file may hold")
        data = {"class": self.name_class(made.maker, path), "args": self._each(made.args, path)}
        if made.items:
            data["base"] = self._each(made.items, path)
        if made.pairs:
            data["items"] = [[self._key(key, path), self.pack(item, path)] for key, item in made.pairs]
        return self._with_state(data, state, path)

    def _with_state(self, data: dict[str, Any], state: Any, path: str) -> Any:
        """The data of an object with its attributes; a class with slots has two dicts of them."""
        parts = state if isinstance(state, tuple) else (state,)
        if not all(isinstance(part, dict) or part is None for part in parts):
            return self.refuse(path, f"the state of {shown(data)}", "which is not attributes")
        attributes = {key: value for part in parts for key, value in (part or {}).items()}
        packed = self.pack_attributes(attributes, path)
        return {"object": {**data, "state": packed} if packed else data}

    def _pack_attribute(self, made: Made, path: str) -> Any:
        """A method of a module, or a function of torch or of a class."""
        owner, name = made.args if len(made.args) == 2 else (None, None)
        if is_module(owner) and type(name) is str:
            return {"method": [self._tree.module(owner, path), name]}
        return {"name": self.name_class(made, path)}

    def _pack_unpickled_partial(self, state: tuple[Any, ...], path: str) -> Any:
        function, args, keywords, attributes = state
        if not isinstance(args, tuple) or not isinstance(keywords, dict) or attributes:
            return self.refuse(path, "a partial with attributes", "which no file may hold")
        packed = self.pack_attributes(keywords, path)
        return {"partial": [self.name_class(function, path), self._each(args, path), packed]}


_ENUMS: Final = frozenset(tuple(name.split(":")) for name in ENUMS)


def qualified(maker: object) -> str | None:
    """The name of a class or function as `module:qualname`; None for what is made by a call."""
    inner: list[str] = []
    while isinstance(maker, Made) and _maker(maker) == "builtins.getattr" and len(maker.args) == 2:
        owner, name = maker.args
        if type(name) is not str or len(inner) > 10:
            return None
        inner.insert(0, name)
        maker = owner
    if not isinstance(maker, Name):
        return None
    if str(maker) == _TORCH_FUNCTIONS and inner:
        return f"torch:{'.'.join(inner)}"
    return f"{maker.module}:{'.'.join((maker.name, *inner))}"


def describe_value(value: object) -> str:
    """What a value of a pickle is, for a message."""
    if isinstance(value, Made) and qualified(value.maker) is not None:
        names = ", ".join(shown(arg) for arg in value.args if isinstance(arg, Name))
        given = f" with {names}" if names else ""
        return f"a call of {shown(value.maker)}{given}" if value.called else f"an object of {shown(value.maker)}"
    return shown(value) if isinstance(value, Name) else f"a {type(value).__name__}"


def _maker(value: object) -> str:
    return str(value.maker) if isinstance(value, Made) and isinstance(value.maker, Name) else ""


def _items(module: Made, slot: str) -> list[tuple[str, Any]]:
    found = module.state[slot]
    if not isinstance(found, dict) or not all(type(name) is str for name in found):
        raise FormatError(f"the {slot} of a {shown(module.maker)} are damaged")
    return list(found.items())
