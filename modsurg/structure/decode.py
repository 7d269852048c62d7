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
from inspect import getattr_static
from typing import Any

import torch
from torch import nn

from modsurg.errors import FormatError, TrustError
from modsurg.structure.encode import BASES, hides_code, is_callable, is_key, is_own_function, parts
from modsurg.structure.trust import ENUMS, is_data_class, qualified_name
from modsurg.tree.eval_lock import Held

Fill = Callable[[], None]
VALUES = 5_000_000
_LONGEST = 255


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
        self._objects: list[object] = []

    def unpack(self, data: Any) -> Any:
        """The value that `data` stands for.

        Raises:
            FormatError: Data of a kind that `Packer` does not write.
            LookupError, TypeError, ValueError: Data that is damaged in another way.
        """
        self._left -= 1
        if self._left < 0:
            raise FormatError(f"the tree has more than {VALUES:,} values")
        if type(data) is list:
            return tuple([self.unpack(item) for item in data]) if data else ()
        if type(data) is not dict:
            return data
        try:
            value, fill = self._start(data)
            if fill is not None:
                fill()
        except RecursionError:
            raise FormatError("nested too deeply") from None
        return value

    def _start(self, data: dict[str, Any]) -> tuple[Any, Fill | None]:
        """The value, and for a mutable one what fills it: it may hold itself."""
        ((tag, content),) = data.items()
        if tag == "shared":
            return self._share(content), None
        if tag in _MUTABLE:
            return _MUTABLE[tag](self, content)
        if tag not in _VALUES:
            raise FormatError(f"a value of kind {tag!r:.40}, which this version of modsurg does not know")
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

    def _base(self, content: Any, base: type) -> Any:
        """What an object holds as a list, a string or the like, of just that kind."""
        value = self.unpack(content)
        if type(value) is not (tuple if base in (list, deque) else base):
            raise FormatError(f"a {type(value).__name__} as the content of a {base.__name__}")
        return value

    def _object(self, content: dict[str, Any]) -> tuple[Any, Fill]:
        kind = self._names[content["class"]]
        if not isinstance(kind, type) or not is_data_class(kind):
            raise FormatError(f"{kind!r:.80} as the class of a plain object")
        base: Any = next((base for base in BASES if issubclass(kind, base)), object)
        frozen = base in (tuple, str, bytes, int, float)
        value = base.__new__(kind, self._base(content["base"], base)) if frozen else base.__new__(kind)

        def fill() -> None:
            if base is deque:
                deque.__init__(value, self._base(content["base"], base), content["length"])
            elif base in (list, set):
                base.__init__(value, self._base(content["base"], base))
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
        waiting, seen = [part for value in self._objects for part in parts(value)], set()
        while waiting:
            value = waiting.pop()
            if is_callable(value):
                raise TrustError(f"a data object holds {value!r:.80}, which can be called; nothing of it ran")
            if id(value) not in seen and type(value) not in (int, float, str, bytes, bool):
                seen.add(id(value))
                waiting += parts(value)

    def _method(self, content: list[Any]) -> types.MethodType:
        owner, name = self._modules[content[0]], content[1]
        function = getattr_static(type(owner), name, None) if type(name) is str else None
        if not is_own_function(function, name):
            raise FormatError(f"{type(owner).__qualname__} has no method {name!r:.80} that a file may bind")
        return types.MethodType(function, owner)

    def _partial(self, content: list[Any]) -> "functools.partial[Any]":
        function, args, keywords = self._names[content[0]], self._each(content[1]), self._plain_dict(content[2])
        if not callable(function) or any(map(is_callable, (*args, *keywords.values()))):
            raise TrustError("a partial with something to call among its arguments; nothing of it ran")
        return functools.partial(function, *args, **keywords)

    def _plain_dict(self, content: dict[str, Any]) -> dict[str, Any]:
        return {key: self.unpack(item) for key, item in content.items()}

    def _enum(self, content: list[Any]) -> Any:
        kind = self._names[content[0]]
        if not isinstance(kind, EnumMeta) or qualified_name(kind) not in ENUMS:
            raise FormatError(f"{kind!r:.80} is not an enumeration that a file may name")
        return kind.__members__[content[1]]

    def _eval_lock(self, content: list[Any]) -> Held:
        module, mode = self._modules[content[0]], content[1]
        if type(mode) is not bool:
            raise FormatError("the mode of a frozen module must be true or false")
        lock: Held = object.__new__(Held)
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
        slot = getattr_static(type(value), key, None)
        if type(slot) is types.MemberDescriptorType:
            slot.__set__(value, item)
        else:
            value.__dict__[key] = item


def check_name(kind: type, name: str) -> None:
    """Check that an object of this class may have an attribute of this name.

    Raises:
        TrustError: It would replace a method, a property or what Python itself looks up.
        FormatError: It cannot be written in code.
    """
    if type(name) is not str or len(name) > _LONGEST:
        raise FormatError(f"an attribute of a {kind.__name__} whose name is too long")
    found = getattr_static(kind, name, None)
    if hides_code(found) or name.startswith("__"):
        raise TrustError(f"the file replaces {name!r:.80} of a {kind.__name__}; nothing of it ran")
    if not name.isidentifier() and not name.isdecimal():
        raise FormatError(f"an attribute {name!r:.80} of a {kind.__name__}")


def check_child_name(kind: type, name: str) -> None:
    """Check the name of a child, parameter or buffer: it hides nothing of the class, and is one segment of a path.

    Raises:
        TrustError, FormatError: It does, or is not.
    """
    if type(name) is not str or not name.replace("-", "_").replace(" ", "_").isprintable() or "." in name or not name:
        raise FormatError(f"a child {name!r:.80} of a {kind.__name__}")
    if name.isidentifier():
        check_name(kind, name)


def _constant(name: str, kind: type) -> Any:
    value = vars(torch).get(name)
    if type(value) is not kind:
        raise FormatError(f"torch.{name!r:.40} is no {kind.__name__}")
    return value


def _float(text: str) -> float:
    value = float(text)
    if math.isfinite(value) and text != repr(value):
        raise FormatError(f"{text!r:.40} is no number")
    return value


_MUTABLE: dict[str, Callable[[Unpacker, Any], tuple[Any, Fill | None]]] = {
    "list": Unpacker._list,
    "dict": Unpacker._dict,
    "items": Unpacker._items,
    "object": Unpacker._object,
}
_VALUES: dict[str, Callable[[Unpacker, Any], Any]] = {
    "name": lambda self, content: self._names[content],
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
    "size": lambda _, content: torch.Size(content),
    "device": lambda _, content: torch.device(content),
    "dtype": lambda _, content: _constant(content, torch.dtype),
}
