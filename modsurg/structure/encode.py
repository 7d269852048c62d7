"""Python values -> JSON: what modules hold besides tensors and children. `unpacking` is the way back.

None, numbers and strings are themselves and a tuple is a list, so that `kernel_size` reads `[3, 3]`. Everything else is
an object with one key that says what it is: `{"list": [...]}`, `{"dtype": "float16"}`, `{"name": 4}`. Classes and
functions are numbers in one table of names, so that a reader knows all that a file asks for before it looks at anything
else. A mutable object that is reached twice is written once, and stays one object.
"""

import base64
import contextlib
import datetime
import decimal
import enum
import functools
import json
import logging
import math
import pathlib
import re
import sys
import types
import typing
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from inspect import getattr_static
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.modules.module import _WrappedHook  # torch holds its own load hooks in it; no public name
from torch.utils.hooks import RemovableHandle

from modsurg.structure.trust import qualified_name

DEPTH = 60
BASES = (
    OrderedDict,
    defaultdict,
    dict,
    list,
    deque,
    set,
    frozenset,
    tuple,
    str,
    bytes,
    int,
    float,
    types.SimpleNamespace,
)

# Made again by a call with what `__reduce__` says, which is plain.
MADE = frozenset(
    {decimal.Decimal, datetime.date, datetime.datetime, datetime.time, datetime.timedelta, datetime.timezone}
)
ALIASES = (types.GenericAlias, typing._GenericAlias)  # type: ignore[attr-defined]  # of Net[int]; no public name
_NO_SLOTS = frozenset({"__dict__", "__weakref__"})
_SCALARS = frozenset({type(None), bool, int, str})
_ATOMS: dict[type, Callable[[Any], dict[str, Any]]] = {
    torch.dtype: lambda value: {"dtype": str(value)[6:]},
    torch.layout: lambda value: {"layout": str(value)[6:]},
    torch.memory_format: lambda value: {"memory_format": str(value)[6:]},
    torch.device: lambda value: {"device": str(value)},
    torch.Size: lambda value: {"size": list(value)},
    range: lambda value: {"range": [value.start, value.stop, value.step]},
    complex: lambda value: {"complex": [repr(value.real), repr(value.imag)]},
    bytes: lambda value: {"bytes": base64.b64encode(value).decode()},
    torch.qscheme: lambda value: {"qscheme": str(value)[6:]},
    type(...): lambda value: {"ellipsis": None},
    logging.Logger: lambda value: {"logger": value.name},
    pathlib.PosixPath: lambda value: {"path": str(value)},
}


class Numbers(Protocol):
    """The tree around the values."""

    def module(self, module: nn.Module, path: str) -> int:
        """The number of a module that was found at `path`."""

    def tensor(self, tensor: torch.Tensor, path: str) -> int:
        """The number of a tensor that was found at `path`."""

    def hooks(self, hooks: object) -> list[Any] | None:
        """The number of the module that keeps this dict of hooks, and its name there; None if nobody keeps it."""


class Packer:
    """Turns values into JSON-able data, and notes what it can't keep instead of failing at the first.

    Args:
        tree: Numbers the modules and tensors that are met.

    Attributes:
        names: The number of each class and function that was named.
        shared: The mutable objects that are reached more than once.
        problems: What can't be kept, each with its place.
        marks: How many mutable objects, modules and tensors were met. A value that adds none may be shared freely.
    """

    def __init__(self, tree: Numbers) -> None:
        self.names: dict[str, int] = {}
        self.shared: list[Any] = []
        self.problems: list[str] = []
        self.marks = 0
        self._tree = tree
        self._seen: dict[int, tuple[object, dict[str, Any]]] = {}
        self._depth = 0

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

    def refuse(self, path: str, what: str, remedy: str) -> Any:
        """Note a value that can't be kept; returns None in its place."""
        self.problems.append(f"{path}  {what}: {remedy}")

    def name(self, value: object, path: str) -> Any:
        """The number of a class or function in the table of names, None if it has none."""
        name = qualified_name(value)
        if name is None:
            qualname = getattr(value, "__qualname__", repr(value))
            what = "a lambda" if "<lambda>" in qualname else f"{qualname}, which has no name in a module"
            return self.refuse(path, what, "define it at the top level of a module, or make it an nn.Module")
        return self.names.setdefault(name, len(self.names))

    def _each(self, items: Iterable[object], path: str) -> list[Any]:
        return [self.pack(item, f"{path}[{at}]") for at, item in enumerate(items)]

    def _pairs(self, items: Mapping[Any, Any], path: str) -> list[Any]:
        return [[self.pack(key, path), self.pack(value, f"{path}[{key!r:.40}]")] for key, value in items.items()]

    def _pack_object(self, value: object, path: str) -> Any:
        if type(value) in weakref.ProxyTypes:
            represent: Any = value.__repr__  # a method of what the proxy stands for
            return {"proxy": self.pack(represent.__self__, path)}
        if isinstance(value, nn.Module):
            self.marks += 1
            return {"module": self._tree.module(value, path)}
        if isinstance(value, torch.Tensor):
            self.marks += 1
            return {"tensor": self._tree.tensor(value, path)}
        if isinstance(value, type | types.FunctionType | types.BuiltinFunctionType):
            name = self.name(value, path)
            return None if name is None else {"name": name}
        if isinstance(value, enum.Enum):
            return self._pack_enum(value, path)
        return self._pack_once(value, path)

    def _pack_once(self, value: object, path: str) -> Any:
        self.marks += 1
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
        if kind in (set, frozenset):
            return {kind.__name__: sorted(self._each(value, path), key=json.dumps)}
        if kind is re.Pattern:
            return {"regex": [self.pack(value.pattern, path), value.flags]}
        if kind in MADE:
            return {"made": [self.name(kind, path), self._each(value.__reduce__()[1], path)]}
        if kind in ALIASES and isinstance(value.__origin__, type):
            return {"alias": [self.pack(value.__origin__, path), self._each(value.__args__, path)]}
        if kind is torch.Generator:
            return {"generator": [str(value.device), self._tree.tensor(value.get_state(), path)]}
        if kind is slice:
            return {"slice": self._each((value.start, value.stop, value.step), path)}
        if kind is bytearray:
            return {"bytearray": base64.b64encode(value).decode()}
        if kind is functools.partial:
            keywords = {key: self.pack(item, f"{path}.{key}") for key, item in value.keywords.items()}
            return {"partial": [self.pack(value.func, path), self._each(value.args, path), keywords]}
        if kind is types.MethodType:
            return self._pack_method(value, path)
        if isinstance(value, weakref.ref):
            if not isinstance(value(), nn.Module | torch.Tensor | None):
                return self.refuse(path, f"a weak reference to a {type(value()).__name__}", "look it up when needed")
            return {"weakref": self.pack(value(), path)}
        if kind is RemovableHandle:
            slots = [self._tree.hooks(ref()) for ref in (value.hooks_dict_ref, *value.extra_dict_ref)]
            return {"handle": [value.id, *slots] if None not in slots else []}
        if kind is _WrappedHook:
            return self._pack_wrapped_hook(value, path)
        return self._pack_numpy(value, path) or self._pack_instance(value, path)

    def _pack_enum(self, value: enum.Enum, path: str) -> Any:
        name = self.name(type(value), path)
        combined = value.name not in type(value).__members__
        return None if name is None else {"enum": [name, value.value if combined else value.name]}

    def _pack_method(self, value: types.MethodType, path: str) -> Any:
        name = value.__func__.__name__
        if getattr_static(type(value.__self__), name, None) is not value.__func__:
            return self.refuse(path, f"{value.__func__.__qualname__}, bound by hand", "make it a method of the class")
        return {"method": [self.pack(value.__self__, path), name]}

    def _pack_wrapped_hook(self, value: _WrappedHook, path: str) -> dict[str, Any] | None:
        closure = getattr(value.hook, "__closure__", None)
        if getattr(value.hook, "__qualname__", "") == "weight_norm.<locals>._weight_norm_compat_hook" and closure:
            return {"weight_norm": closure[0].cell_contents}
        return {"hook": [self.pack(value.hook, path), self.pack(value.module(), path) if value.with_module else None]}

    def _pack_numpy(self, value: Any, path: str) -> dict[str, Any] | None:
        numpy = sys.modules.get("numpy")
        if numpy is None:
            return None
        if isinstance(value, numpy.dtype) and value.kind in "biufc":
            return {"numpy": value.str}
        if isinstance(value, numpy.generic) and value.dtype.kind in "biufc":
            return {"scalar": [value.dtype.str, base64.b64encode(value.tobytes()).decode()]}
        if type(value) is not numpy.ndarray or value.dtype.kind not in "biufc":
            return None
        flat = numpy.ascontiguousarray(value)
        try:
            tensor = torch.from_numpy(flat if flat.flags.writeable else flat.copy())
        except (TypeError, ValueError):  # torch has no such dtype
            return None
        return {"array": self._tree.tensor(tensor.reshape(value.shape), path)}

    def _pack_instance(self, value: Any, path: str) -> Any:
        """An object of a class: its name, what it holds as a list or dict, and its attributes."""
        kind = type(value)
        base = next((base for base in BASES if isinstance(value, base)), object)
        if not _is_made_of_attributes(kind, base):
            return self.refuse(
                path, f"a {kind.__module__}.{kind.__qualname__}", "drop it, or make it when it is needed"
            )
        name = self.name(kind, path)
        if name is None:
            return None
        data: dict[str, Any] = {"class": name}
        if isinstance(value, defaultdict):
            data["default"] = self.pack(value.default_factory, f"{path}.default_factory")
        if isinstance(value, dict):
            data["items"] = self._pairs(value, path)
        elif base not in (object, types.SimpleNamespace):
            plain: type[Any] = list if base is deque else base
            data["base"] = self.pack(tuple(value) if plain in (list, tuple) else plain(value), path)
        if isinstance(value, deque):
            data["length"] = value.maxlen
        state = {key: self.pack(item, f"{path}.{key}") for key, item in attributes(value).items()}
        return {"object": {**data, "state": state} if state else data}


def _is_made_of_attributes(kind: type, base: Any) -> bool:
    """Whether nothing else is in an instance: no room for what only its C code knows, as in an open file.

    The sizes are those by which `object.__reduce_ex__` refuses to pickle; offsets below 0 lie outside of the instance.
    """
    try:
        base.__new__(kind)
    except TypeError:
        return False
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
