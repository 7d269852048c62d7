"""JSON -> Python values: the way back from `values`. Nothing is called but the constructors of Python's own types."""

import base64
import enum
import functools
import logging
import math
import re
import types
import typing
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from inspect import getattr_static
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _WrappedHook
from torch.nn.utils import parametrizations
from torch.utils.hooks import RemovableHandle

from modsurg.errors import FormatError
from modsurg.structure.encode import ALIASES, BASES, MADE

Fill = Callable[[], None]
_KEY_PARTS = 10_000


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

    def unpack(self, data: Any) -> Any:
        """The value that `data` stands for.

        Raises:
            FormatError: Data of a kind that `Packer` does not write.
            LookupError, TypeError, ValueError: Data that is damaged in another way.
        """
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
        if not isinstance(kind, type) or issubclass(kind, type | nn.Module | torch.Tensor | enum.Enum):
            raise FormatError(f"{kind!r:.80} as the class of a plain object")
        base: Any = next((base for base in BASES if issubclass(kind, base)), object)
        frozen = base in (frozenset, tuple, str, bytes, int, float)
        value = base.__new__(kind, self._base(content["base"], base)) if frozen else base.__new__(kind)

        def fill() -> None:
            if base is deque:
                deque.__init__(value, self._base(content["base"], base), content["length"])
            elif base in (list, set):
                base.__init__(value, self._base(content["base"], base))
            elif base is defaultdict:
                defaultdict.__init__(value, self.unpack(content["default"]))
            for key, item in self._pairs(content.get("items", [])):
                dict.__setitem__(value, key, item) if base is not OrderedDict else OrderedDict.__setitem__(
                    value, key, item
                )
            set_attributes(value, {key: self.unpack(item) for key, item in content.get("state", {}).items()})

        return value, fill

    def _method(self, content: list[Any]) -> types.MethodType:
        owner, name = self.unpack(content[0]), content[1]
        function = getattr_static(type(owner), name, None)
        if type(function) is not types.FunctionType or name.startswith("__"):
            raise FormatError(f"{type(owner).__qualname__} has no method {name!r:.80}")
        return types.MethodType(function, owner)

    def _partial(self, content: list[Any]) -> "functools.partial[Any]":
        function, args, keywords = content
        return functools.partial(
            self.unpack(function), *self._each(args), **{key: self.unpack(item) for key, item in keywords.items()}
        )

    def _enum(self, content: list[Any]) -> enum.Enum:
        kind = self._names[content[0]]
        if not isinstance(kind, enum.EnumMeta):
            raise FormatError(f"{kind!r:.80} is no enumeration")
        flags = issubclass(kind, enum.Flag) and type(content[1]) is int
        member: enum.Enum = kind(content[1]) if flags else kind.__members__[content[1]]
        return member

    def _made(self, content: list[Any]) -> Any:
        kind: Any = self._names[content[0]]
        if kind not in MADE:
            raise FormatError(f"{kind!r:.80} is not called")
        return kind(*self._each(content[1]))

    def _alias(self, content: list[Any]) -> Any:
        origin, arguments = self.unpack(content[0]), self._each(content[1])
        if not isinstance(origin, type):
            raise FormatError(f"{origin!r:.80} has no type arguments")
        plain, generic = ALIASES
        return (generic if issubclass(origin, typing.Generic) else plain)(origin, arguments)

    def _generator(self, content: list[Any]) -> torch.Generator:
        return torch.Generator(content[0]).set_state(self._tensors[content[1]])

    def _numpy_dtype(self, name: str) -> Any:
        import numpy

        kind = numpy.dtype(name)
        if kind.kind not in "biufc":
            raise FormatError(f"a numpy dtype {name!r:.40}")
        return kind

    def _scalar(self, content: list[Any]) -> Any:
        import numpy

        return numpy.frombuffer(base64.b64decode(content[1]), self._numpy_dtype(content[0]))[0]

    def _array(self, number: int) -> Any:
        tensor = self._tensors[number]
        return (torch.zeros_like(tensor, device="cpu") if tensor.is_meta else tensor).numpy()

    def _handle(self, content: list[Any]) -> RemovableHandle:
        """A handle that removes a hook of the tree; one of nobody's hooks does nothing."""
        number, *slots = content or [0]
        kept = [self._modules[module].__dict__[slot] for module, slot in slots] or [OrderedDict()]
        if not all(isinstance(hooks, OrderedDict) for hooks in kept) or type(number) is not int:
            raise FormatError("a handle of something else than hooks")
        handle = RemovableHandle(kept[0], extra_dict=kept[1:])
        handle.id = number
        return handle

    def _hook(self, content: list[Any]) -> _WrappedHook:
        return _WrappedHook(self.unpack(content[0]), self.unpack(content[1]))


def _checked_key(key: object) -> object:
    """A key of a dict or member of a set, if it can be hashed in bounded time: tuples of the same tuples can't."""
    rest, met = [key], 0
    while rest:
        value = rest.pop()
        met += 1
        if met > _KEY_PARTS:
            raise FormatError(f"a key of more than {_KEY_PARTS} parts")
        if isinstance(value, tuple | frozenset):
            rest.extend(value)
    return key


def set_attributes(value: object, state: Mapping[str, Any]) -> None:
    """Put attributes where they were, into `__dict__` or slots, without a `__setattr__` in between."""
    for key, item in state.items():
        slot = getattr_static(type(value), key, None)
        if type(slot) is types.MemberDescriptorType:
            slot.__set__(value, item)
        else:
            value.__dict__[key] = item


def _weight_norm_hook(name: str) -> _WrappedHook:
    """The hook by which torch's weight_norm reads old checkpoints; only weight_norm itself can make it."""
    module = nn.Module()
    module.register_parameter(name, nn.Parameter(torch.ones(1, 1)))
    parametrizations.weight_norm(module, name)
    (hook,) = module._load_state_dict_pre_hooks.values()
    assert isinstance(hook, _WrappedHook)
    return hook


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
    "scalar": Unpacker._scalar,
    "array": Unpacker._array,
    "hook": Unpacker._hook,
    "handle": Unpacker._handle,
    "weight_norm": lambda _, content: _weight_norm_hook(content),
    "proxy": lambda self, content: weakref.proxy(self.unpack(content)),
    "weakref": lambda self, content: weakref.ref(set() if content is None else self.unpack(content)),
    "set": lambda self, content: set(map(_checked_key, self._each(content))),
    "frozenset": lambda self, content: frozenset(map(_checked_key, self._each(content))),
    "slice": lambda self, content: slice(*self._each(content)),
    "range": lambda _, content: range(*content),
    "float": lambda _, content: _float(content),
    "complex": lambda _, content: complex(*map(float, content)),
    "bytes": lambda _, content: base64.b64decode(content, validate=True),
    "bytearray": lambda _, content: bytearray(base64.b64decode(content, validate=True)),
    "size": lambda _, content: torch.Size(content),
    "device": lambda _, content: torch.device(content),
    "dtype": lambda _, content: _constant(content, torch.dtype),
    "layout": lambda _, content: _constant(content, torch.layout),
    "memory_format": lambda _, content: _constant(content, torch.memory_format),
    "qscheme": lambda _, content: _constant(content, torch.qscheme),
    "regex": lambda self, content: re.compile(self.unpack(content[0]), content[1]),
    "made": Unpacker._made,
    "alias": Unpacker._alias,
    "generator": Unpacker._generator,
    "numpy": Unpacker._numpy_dtype,
    "ellipsis": lambda _, __: ...,
    "logger": lambda _, content: logging.getLogger(content),
    "path": lambda _, content: Path(content),
}
