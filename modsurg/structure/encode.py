"""Python values -> JSON: what modules hold besides tensors and children. `decode` is the way back.

None, numbers and strings are themselves and a tuple is a list, so that `kernel_size` reads `[3, 3]`. Everything else is
an object with one key that says what it is: `{"list": [...]}`, `{"dtype": "float16"}`, `{"name": 4}`. Classes and
functions are numbers in one table of names, so that a reader knows all that a file asks for before it looks at anything
else. A mutable object that is reached twice is written once, and stays one object.
"""

import base64
import contextlib
import functools
import json
import math
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import Any, Protocol

import torch
from torch import nn

from modsurg.errors import FormatError, TrustError
from modsurg.structure.schema import VERSION
from modsurg.structure.trust import CONTAINERS, ENUMS, is_data_class, may_be_value, qualified_name
from modsurg.tree.eval_lock import EvalLock

DEPTH = 60
_REPLACED = "use a subclass; after Accelerate, remove_hook_from_module(model, recurse=True)"
BASES = (OrderedDict, defaultdict, dict, list, deque, tuple, str, bytes, int, float)
_NO_SLOTS = frozenset({"__dict__", "__weakref__"})
_SCALARS = frozenset({type(None), bool, int, str})
_KEYS = frozenset({*_SCALARS, float, bytes, torch.dtype, torch.device})
_LONGEST = 255
# By the descriptors of `type` itself: a metaclass has no say.
_MRO: Any = type.__dict__["__mro__"].__get__
_DICT: Any = type.__dict__["__dict__"].__get__
_KEY_BITS = 60  # of longer ones any number has the same hash
_ATOMS: dict[type, Callable[[Any], dict[str, Any]]] = {
    torch.dtype: lambda value: {"dtype": str(value)[6:]},
    torch.device: lambda value: {"device": str(value)},
    torch.Size: lambda value: {"size": list(value)},
    complex: lambda value: {"complex": [repr(value.real), repr(value.imag)]},
    bytes: lambda value: {"bytes": base64.b64encode(value).decode()},
}


class Numbers(Protocol):
    """The tree around the values."""

    def module(self, module: Any, path: str) -> int:
        """The number of a module that was found at `path`."""

    def tensor(self, tensor: Any, path: str) -> int:
        """The number of a tensor that was found at `path`."""


class Packer:
    """Turns values into JSON-able data, and notes what it can't keep instead of failing at the first.

    Args:
        tree: Numbers the modules and tensors that are met.

    Attributes:
        names: The number of each class and function that was named.
        alike: The number of each set of attributes that several modules may share, by its text.
        shared: The mutable objects that are reached more than once.
        problems: What can't be kept, each with its place.
    """

    def __init__(self, tree: Numbers) -> None:
        self.names: dict[str, int] = {}
        self.alike: dict[str, int] = {}
        self.shared: list[Any] = []
        self.problems: list[str] = []
        self._marks = 0  # how many mutable objects, modules and tensors were met
        self._tree = tree
        self._seen: dict[int, tuple[object, dict[str, Any]]] = {}
        self._depth = 0
        self._objects: list[tuple[object, str]] = []

    def pack(self, value: object, path: str) -> Any:
        """The value as JSON-able data; `path` is its place, for the message if it can't be kept."""
        kind = type(value)
        if kind in _SCALARS:
            return value
        if kind is float:
            return value if math.isfinite(value) else {"float": repr(value)}  # type: ignore[arg-type]  # it is a float
        if kind in _ATOMS:
            return _ATOMS[kind](value)
        if self._depth >= DEPTH:
            return self.refuse(path, "nested too deeply", "flatten it")
        self._depth += 1
        try:
            return [*self._each(value, path)] if kind is tuple else self._pack_object(value, path)  # type: ignore[arg-type]  # a tuple
        finally:
            self._depth -= 1

    def pack_attributes(self, held: Mapping[str, object], path: str) -> dict[str, Any]:
        """The attributes of an object as data."""
        return {name: self.pack(value, f"{path}.{name}".strip(".")) for name, value in held.items()}

    def share_attributes(self, held: Mapping[str, object], path: str) -> int | dict[str, Any]:
        """The attributes of a module: as data, or the number of those that others may have too."""
        before = self._marks
        packed = self.pack_attributes(held, path)
        if self._marks > before:
            return packed
        return self.alike.setdefault(json.dumps(packed), len(self.alike))

    def tables(self) -> dict[str, Any]:
        """The parts of the tree that values refer to."""
        return {
            "version": VERSION,
            "names": list(self.names),
            "attributes": [json.loads(text) for text in self.alike],
            "shared": self.shared,
        }

    def refuse(self, path: str, what: str, remedy: str) -> Any:
        """Note a value that can't be kept; returns None in its place."""
        self.problems.append(f"{path}  {what}: {remedy}")

    def name(self, value: object, path: str) -> Any:
        """The number of a class or function in the table of names, None if a file may not name it."""
        name = qualified_name(value)
        if name is None:
            qualname = getattr(value, "__qualname__", repr(value))
            what = "a lambda" if "<lambda>" in qualname else f"{qualname}, which has no name in a module"
            return self.refuse(path, what, "define it at the top level of a module, or make it an nn.Module")
        if not may_be_value(value) and not (isinstance(value, type) and is_data_class(value)):
            return self.refuse(path, f"{name.replace(':', '.')}, which a file can't name", "make it an nn.Module")
        return self.names.setdefault(name, len(self.names))

    def _each(self, items: Iterable[object], path: str) -> list[Any]:
        return [self.pack(item, f"{path}[{at}]") for at, item in enumerate(items)]

    def _pairs(self, items: Mapping[Any, Any], path: str) -> list[Any]:
        return [[self._key(key, path), self.pack(value, f"{path}[{key!r:.40}]")] for key, value in items.items()]

    def _key(self, key: object, path: str) -> Any:
        return self.pack(key, path) if is_key(key) else self.refuse(path, f"a {type(key).__name__} as a key", "drop it")

    def _pack_object(self, value: object, path: str) -> Any:
        if isinstance(value, nn.Module):
            self._marks += 1
            return {"module": self._tree.module(value, path)}
        if isinstance(value, torch.Tensor):
            self._marks += 1
            return {"tensor": self._tree.tensor(value, path)}
        if isinstance(value, type | types.FunctionType | types.BuiltinFunctionType):
            name = self.name(value, path)
            return None if name is None else {"name": name}
        if isinstance(value, Enum):
            return self._pack_enum(value, path)
        return self._pack_once(value, path)

    def _pack_once(self, value: object, path: str) -> Any:
        self._marks += 1
        if id(value) not in self._seen:
            holder: dict[str, Any] = {}
            self._seen[id(value)] = (value, holder)  # the value is held, so that its id stays its own
            content = self._pack_mutable(value, path)
            if "shared" in holder:  # it holds itself
                self.shared[holder["shared"]] = content
            elif content is not None:
                holder.update(content)
            return holder or None
        holder = self._seen[id(value)][1]
        if "shared" not in holder:
            self.shared.append(dict(holder))
            holder.clear()
            holder["shared"] = len(self.shared) - 1
        return holder

    def _pack_mutable(self, value: Any, path: str) -> Any:
        kind = type(value)
        if kind is list:
            return {"list": self._each(value, path)}
        if kind is dict:
            if all(type(key) is str for key in value):
                return {"dict": {key: self.pack(item, f"{path}[{key!r}]") for key, item in value.items()}}
            return {"items": self._pairs(value, path)}
        if kind is set:
            return {"set": sorted((self._key(item, path) for item in value), key=json.dumps)}
        if kind is functools.partial:
            return self._pack_partial(value, path)
        if kind is types.MethodType:
            return self._pack_method(value, path)
        if kind is weakref.ref and isinstance(value(), torch.Tensor | None):  # torch's recurrent layers
            return {"weakref": None if value() is None else self._tree.tensor(value(), path)}
        if kind is EvalLock:
            return {"eval_lock": [self._tree.module(value.module, path), value.mode]}
        return self._pack_instance(value, path)

    def _pack_enum(self, value: Enum, path: str) -> Any:
        name = qualified_name(type(value))
        if name not in ENUMS or value.name not in type(value).__members__:
            return self.refuse(path, f"a member of {type(value).__qualname__}", "keep its value instead")
        return {"enum": [self.names.setdefault(name, len(self.names)), value.value]}

    def _pack_method(self, value: types.MethodType, path: str) -> Any:
        owner, name = value.__self__, value.__func__.__name__
        if not isinstance(owner, nn.Module):
            return self.refuse(path, f"a method of a {type(owner).__name__}", "make it a method of the module")
        function = class_entry(type(owner), name)
        if function is not value.__func__ or not is_own_function(function, name):
            return self.refuse(path, f"{value.__func__.__qualname__}, bound by hand", "make it a method of the class")
        return {"method": [self._tree.module(owner, path), name]}

    def _pack_partial(self, value: "functools.partial[Any]", path: str) -> Any:
        if any(map(is_callable, (*value.args, *value.keywords.values()))):
            return self.refuse(path, "a partial with something to call among its arguments", "make it an nn.Module")
        name = self.name(value.func, path)
        if name is None:
            return None
        return {"partial": [name, self._each(value.args, path), self.pack_attributes(value.keywords, path)]}

    def _pack_instance(self, value: Any, path: str) -> Any:
        """An object of a class: its name, what it holds as a list or dict, and its attributes."""
        kind = type(value)
        base = next((base for base in BASES if isinstance(value, base)), object)
        if not is_data_class(kind) or not _is_made_of_attributes(kind, base):
            return self.refuse(
                path, f"a {kind.__module__}.{kind.__qualname__}", "drop it, or make it when it is needed"
            )
        name = self.name(kind, path)
        if name is None:
            return None
        self._objects.append((value, path))
        data: dict[str, Any] = {"class": name}
        if isinstance(value, defaultdict):
            data["default"] = self.pack(value.default_factory, f"{path}.default_factory")
        if isinstance(value, dict):
            data["items"] = self._pairs(value, path)
        elif base is tuple:
            data["args"] = self._each(value, path) if is_named_tuple(kind) else [self._each(value, path)]
        elif base in (str, bytes, int, float):
            plain: Any = base
            data["args"] = [self.pack(plain(value), path)]
        elif base is not object:
            data["base"] = self._each(value, path)
        if isinstance(value, deque):
            data["length"] = value.maxlen
        held = {key: item for key, item in attributes(value).items() if self.may_have(kind, key, path)}
        state = self.pack_attributes(held, path)
        return {"object": {**data, "state": state} if state else data}

    def may_have(self, kind: type, name: str, path: str) -> bool:
        """Whether a file may give an object of this class an attribute of this name; notes it if not."""
        try:
            check_name(kind, name)
        except (FormatError, TrustError):
            what = "a method replaced on this object" if name.isidentifier() else "a name that no code can write"
            self.refuse(f"{path}.{name}".strip("."), what, _REPLACED)
            return False
        return True

    def check_objects(self) -> None:
        """Refuse each data object that holds something to call: code of its class would find it."""
        for value, path in self._objects:
            found = find_callable([value])
            if found is not None:
                what = f"a {type(value).__name__} that holds {found!r:.80}, which can be called"
                self.refuse(path, what, "keep that in a module")


def is_callable(value: object) -> bool:
    """Whether code that finds this value could call it and get more than a plain value."""
    return callable(value) and not (isinstance(value, type) and value in CONTAINERS)


def is_named_tuple(kind: type) -> bool:
    """Whether its constructor takes the items one by one."""
    return type(class_entry(kind, "_fields")) is tuple


def is_key(value: object) -> bool:
    """Whether this may be a key or a member of a set: it is hashed and compared in constant time."""
    items = value if type(value) is tuple else (value,)
    return all(type(item) in _KEYS and not (type(item) is int and item.bit_length() > _KEY_BITS) for item in items)


def is_own_function(function: object, name: str) -> bool:
    """Whether a file may bind this function of a module's class: nn.Module's own methods take the module apart."""
    own = name == "forward" or (not name.startswith("__") and name not in vars(nn.Module))
    return own and type(function) is types.FunctionType


def class_entry(kind: type, name: str) -> Any:
    """What the class or one of its bases has under a name, as it is in their `__dict__`; nothing is fetched or run."""
    for base in _MRO(kind):
        entries = _DICT(base)
        if name in entries:
            return entries[name]
    return None


def hides_code(found: object) -> bool:
    """Whether an entry of a class is a method, another callable, or a descriptor; slots are only places."""
    if type(found) is types.MemberDescriptorType:
        return False
    return callable(found) or any("__get__" in vars(base) or "__set__" in vars(base) for base in type(found).__mro__)


def check_name(kind: type, name: str) -> None:
    """Check that an object of this class may have an attribute of this name.

    Raises:
        TrustError: It would replace a method, a property or what Python itself looks up.
        FormatError: It cannot be written in code.
    """
    if type(name) is not str or len(name) > _LONGEST:
        raise FormatError(f"an attribute of a {kind.__name__} whose name is too long")
    found = class_entry(kind, name)
    if hides_code(found) or name.startswith("__"):
        raise TrustError(f"the file replaces {name!r:.80} of a {kind.__name__}; nothing of it ran")
    if not name.isidentifier() and not name.isdecimal():
        raise FormatError(f"an attribute {name!r:.80} of a {kind.__name__}")


def parts(value: object) -> list[object]:
    """What a container or a data object holds."""
    if isinstance(value, Enum | nn.Module | type):
        return []
    held: list[object] = list(attributes(value).values())
    if isinstance(value, dict):
        return [*held, *dict.values(value)]
    if isinstance(value, list | tuple | set | deque):
        return [*held, *value]
    return held


def find_callable(objects: Iterable[object]) -> object | None:
    """What can be called among the attributes and items of data objects, at any depth; None if there is nothing."""
    waiting, seen = [part for value in objects for part in parts(value)], set()
    while waiting:
        value = waiting.pop()
        if is_callable(value):
            return value
        if id(value) not in seen and type(value) not in (int, float, str, bytes, bool):
            seen.add(id(value))
            waiting += parts(value)
    return None


def _is_made_of_attributes(kind: type, base: Any) -> bool:
    """Whether nothing else is in an instance: no room for what only its C code keeps, as in an open file.

    The sizes are those by which `object.__reduce_ex__` refuses to pickle; offsets below 0 lie outside of the instance.
    """
    pointers = len(slots(kind)) + (kind.__dictoffset__ > 0) + (kind.__weakrefoffset__ > 0)
    return kind.__itemsize__ > 0 or kind.__basicsize__ <= base.__basicsize__ + pointers * object.__basicsize__ // 2


def attributes(value: object) -> dict[str, Any]:
    """The attributes of an object: its `__dict__` and its slots."""
    state = dict(getattr(value, "__dict__", {}))
    for name, slot in slots(type(value)).items():
        with contextlib.suppress(AttributeError):  # an empty one
            state[name] = slot.__get__(value)
    return state


def slots(kind: type) -> dict[str, types.MemberDescriptorType]:
    """The `__slots__` of a class and of those that it inherits from."""
    return {
        name: slot
        for base in reversed(kind.__mro__)
        for name, slot in vars(base).items()
        if type(slot) is types.MemberDescriptorType and name not in _NO_SLOTS
    }
