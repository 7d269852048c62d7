"""JSON -> Python values: the way back from `encode`.

Nothing of the file is called, and nothing that it names: an object is allocated by `object.__new__` or by one of
Python's own containers, and its attributes go where they are kept without a `__setattr__` in between.
"""

import base64
import functools
import math
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from enum import EnumMeta
from typing import Any

import torch
from torch import nn

from modsurg.errors import FormatError, TrustError
from modsurg.structure.encode import (
    BASES,
    DEPTH,
    check_name,
    class_entry,
    find_callable,
    is_callable,
    is_key,
    is_named_tuple,
    is_own_function,
)
from modsurg.structure.tensors import dtype_named
from modsurg.structure.trust import ENUMS, is_data_class, may_be_value, qualified_name
from modsurg.tree.eval_lock import EvalLock

Fill = Callable[[], None]
VALUES = 5_000_000


class Unpacker:
    """Turns what `Packer` wrote into values again.

    Args:
        names: The object of each number in the table of names, all of them trusted.
        modules: The modules of the tree, still empty perhaps.
        tensors: The tensors of the tree.
        shared: The mutable objects that are reached more than once, as data.
    """

    def __init__(
        self,
        names: Sequence[object],
        modules: Sequence[nn.Module],
        tensors: Sequence[torch.Tensor],
        shared: Sequence[Any],
    ) -> None:
        self._names = names
        self._modules = modules
        self._tensors = tensors
        self._shared = shared
        self._ready: dict[int, Any] = {}
        self._left = VALUES
        self._depth = 0
        self._objects: list[object] = []

    def unpack(self, data: Any) -> Any:
        """Make the value that `data` describes.

        Raises:
            FormatError: Data of a kind that `Packer` does not write.
            LookupError, TypeError, ValueError: Data that is damaged in another way.
        """
        self._left -= 1
        if self._left < 0:
            raise FormatError(f"the tree has more than {VALUES:,} values")
        if type(data) is not list and type(data) is not dict:
            return data
        if self._depth > 2 * DEPTH:
            raise FormatError("nested too deeply")
        self._depth += 1
        if type(data) is list:
            value = tuple([self.unpack(item) for item in data]) if data else ()
        else:
            assert isinstance(data, dict)
            value, fill = self._start(data)
            if fill is not None:
                fill()
        self._depth -= 1
        return value

    def _start(self, data: dict[str, Any]) -> tuple[Any, Fill | None]:
        """The value, and for a mutable one what fills it: it may hold itself."""
        ((tag, content),) = data.items()
        if tag == "shared":
            return self._share(content), None
        if tag in _MUTABLE:
            return _MUTABLE[tag](self, content)
        if tag not in _VALUES:
            raise FormatError(f"a value of the unknown kind {tag!r:.40}")
        return _VALUES[tag](self, content), None

    def _share(self, number: int) -> Any:
        if number not in self._ready:
            value, fill = self._start(self._shared[number])
            self._ready[number] = value
            if fill is not None:
                fill()
        return self._ready[number]

    def _list(self, content: list[Any]) -> tuple[Any, Fill]:
        value: list[Any] = []
        return value, lambda: value.extend([self.unpack(item) for item in content])

    def _dict(self, content: dict[str, Any]) -> tuple[Any, Fill]:
        value: dict[str, Any] = {}
        return value, lambda: value.update({key: self.unpack(item) for key, item in content.items()})

    def _items(self, content: list[Any]) -> tuple[Any, Fill]:
        value: dict[Any, Any] = {}
        return value, lambda: value.update(self._pairs(content))

    def _pairs(self, content: list[Any]) -> list[tuple[Any, Any]]:
        return [(_checked_key(self.unpack(key)), self.unpack(item)) for key, item in content]

    def _each(self, content: list[Any]) -> tuple[Any, ...]:
        """Items that are written out one by one; a range would need no more room in the file for a million of them."""
        if type(content) is not list:
            raise FormatError(f"a {type(content).__name__} in the place of a list")
        return self.unpack(content)  # type: ignore[no-any-return]  # of a list, it is a tuple

    def _new(self, kind: Any, base: Any, args: tuple[Any, ...]) -> Any:
        """An object of a class, without its constructor: only what can't be filled later is given to it."""
        if base not in (tuple, str, bytes, int, float):
            if args:
                raise FormatError(f"arguments for a {kind.__name__}, which takes none")
            return base.__new__(kind)
        if base is tuple and is_named_tuple(kind):
            if len(args) != len(kind._fields):
                raise FormatError(f"{len(args)} values for a {kind.__name__} of {len(kind._fields)}")
            return tuple.__new__(kind, args)
        if len(args) != 1 or type(args[0]) is not base:
            raise FormatError(f"other content than a {base.__name__} for a {kind.__name__}")
        return base.__new__(kind, args[0])

    def _object(self, content: dict[str, Any]) -> tuple[Any, Fill]:
        kind = self._names[content["class"]]
        if not isinstance(kind, type) or not is_data_class(kind):
            raise FormatError(f"{kind!r:.80} as the class of a plain object")
        base: Any = next((base for base in BASES if issubclass(kind, base)), object)
        value = self._new(kind, base, self._each(content.get("args", [])))

        def fill() -> None:
            if base is deque:
                deque.__init__(value, self._each(content.get("base", [])), content["length"])
            elif base is list:
                list.__init__(value, self._each(content.get("base", [])))
            elif base is defaultdict:
                defaultdict.__init__(value, self.unpack(content["default"]))
            write: Any = OrderedDict.__setitem__ if base is OrderedDict else dict.__setitem__
            for key, item in self._pairs(content.get("items", [])):
                write(value, key, item)
            set_attributes(value, self._plain_dict(content.get("state", {})))

        self._objects.append(value)
        return value, fill

    def check_objects(self) -> None:
        """Check that no data object holds something to call: code of its class would find it.

        Raises:
            TrustError: One does.
        """
        found = find_callable(self._objects)
        if found is not None:
            raise TrustError(f"a data object holds {found!r:.80}, which can be called; nothing of it ran")

    def _method(self, content: list[Any]) -> types.MethodType:
        owner, name = self._modules[content[0]], content[1]
        function: Any = class_entry(type(owner), name) if type(name) is str else None
        if not is_own_function(function, name):
            raise TrustError(f"{type(owner).__qualname__} has no method {name!r:.80} that a file may bind; nothing ran")
        return types.MethodType(function, owner)

    def _partial(self, content: list[Any]) -> "functools.partial[Any]":
        function, args, keywords = self._value(content[0]), self._each(content[1]), self._plain_dict(content[2])
        if any(map(is_callable, (*args, *keywords.values()))):
            raise TrustError("a partial with something to call among its arguments; nothing of it ran")
        return functools.partial(function, *args, **keywords)

    def _plain_dict(self, content: dict[str, Any]) -> dict[str, Any]:
        return {key: self.unpack(item) for key, item in content.items()}

    def _enum(self, content: list[Any]) -> Any:
        kind = self._names[content[0]]
        if not isinstance(kind, EnumMeta) or qualified_name(kind) not in ENUMS:
            raise FormatError(f"{kind!r:.80} is not an enumeration that a file may name")
        members: Any = kind.__members__.values()
        for member in members:
            if type(member.value) is type(content[1]) and member.value == content[1]:
                return member
        raise FormatError(f"{kind.__name__} has no member of value {content[1]!r:.40}")

    def _value(self, number: int) -> Callable[..., Any]:
        """A class or function that is a value, not the class of one."""
        value = self._names[number]
        if not may_be_value(value):
            raise TrustError(f"{value!r:.80} as a value; a file may hold module classes and pure functions")
        return value

    def _eval_lock(self, content: list[Any]) -> EvalLock:
        module, mode = self._modules[content[0]], content[1]
        if type(mode) is not bool:
            raise FormatError("the mode of a frozen module must be true or false")
        lock: EvalLock = object.__new__(EvalLock)
        lock.__dict__.update(module=module, mode=mode)
        return lock


def _checked_key(key: object) -> object:
    if not is_key(key):
        raise FormatError("a key or a member of a set must be a number, a string or a flat tuple of them")
    return key


def set_attributes(value: object, state: Mapping[str, Any]) -> None:
    """Put attributes where they were, into `__dict__` or slots, without a `__setattr__` in between."""
    for key, item in state.items():
        check_name(type(value), key)
        slot = class_entry(type(value), key)
        if type(slot) is types.MemberDescriptorType:
            slot.__set__(value, item)
        else:
            value.__dict__[key] = item


def check_child_name(kind: type, name: str) -> None:
    """Check the name of a child, parameter or buffer: it hides nothing of the class, and is one segment of a path.

    Raises:
        TrustError, FormatError: It does, or is not.
    """
    if type(name) is not str or not name.replace("-", "_").replace(" ", "_").isprintable() or "." in name or not name:
        raise FormatError(f"a child {name!r:.80} of a {kind.__name__}")
    if name.isidentifier():
        check_name(kind, name)


def _float(text: str) -> float:
    value = float(text)
    if math.isfinite(value) and text != repr(value):
        raise FormatError(f"{text!r:.40} is not a number")
    return value


_MUTABLE: dict[str, Callable[[Unpacker, Any], tuple[Any, Fill | None]]] = {
    "list": Unpacker._list,
    "dict": Unpacker._dict,
    "items": Unpacker._items,
    "object": Unpacker._object,
}
_VALUES: dict[str, Callable[[Unpacker, Any], Any]] = {
    "name": lambda self, content: self._value(content),
    "module": lambda self, content: self._modules[content],
    "tensor": lambda self, content: self._tensors[content],
    "method": Unpacker._method,
    "partial": Unpacker._partial,
    "enum": Unpacker._enum,
    "eval_lock": Unpacker._eval_lock,
    "weakref": lambda self, content: weakref.ref(set() if content is None else self._tensors[content]),
    "set": lambda self, content: set(map(_checked_key, self._each(content))),
    "float": lambda _, content: _float(content),
    "complex": lambda _, content: complex(*map(float, content)),
    "bytes": lambda _, content: base64.b64decode(content, validate=True),
    "size": lambda self, content: torch.Size(self._each(content)),
    "device": lambda _, content: torch.device(content),
    "dtype": lambda _, content: dtype_named(content),
}
