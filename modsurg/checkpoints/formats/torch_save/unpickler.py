"""Pickles read as data: nothing that they name is looked up, imported or called.

A pickle is a program for a small stack machine. Here its numbers, strings and containers are built, and whatever it
would import or call stays a note of what was asked for: a `Name`, or a `Made` with the arguments. The caller gives the
few calls that are carried out, by name. Time and memory stay in proportion to the pickle.
"""

import mmap
import struct
from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from modsurg.errors import FormatError, ModsurgError

_STEPS: Final = 20_000_000
_COPIED: Final = 1 << 20
_LONGEST_KEY: Final = 64
_LARGEST_KEY: Final = 1 << 60
_LONGEST_NUMBER: Final = 255
# Protocol 2 keeps to the names of Python 2; Python 3.13 alone has the classes of pathlib elsewhere.
_HOMES: Final = {"__builtin__": "builtins", "copy_reg": "copyreg", "pathlib._local": "pathlib"}


@dataclass(frozen=True, slots=True)
class Name:
    """A class or a function that a pickle names. Nobody looked whether it exists."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False)
class Made:
    """What a pickle would have made of `maker` and `args`, had anybody let it.

    Attributes:
        maker: As a rule a `Name`.
        args: What it would have been given.
        called: True for a function call, False for an object that is only allocated.
        state: What would have been put into the object.
        items: What would have been appended to it, as to a list.
        pairs: The keys and values that would have been set in it, as in a dict.
    """

    maker: object
    args: tuple[object, ...]
    called: bool
    state: Any = None
    items: list[Any] = field(default_factory=list)
    pairs: list[tuple[Any, Any]] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"<{shown(self.maker) if isinstance(self.maker, Name) else type(self.maker).__name__}>"


class Ordered(dict[Any, Any]):
    """A dict in the place of an object of one of Python's dict classes, as the OrderedDict of a state_dict is.

    Attributes:
        maker: Its class.
        default: The factory of a defaultdict.
        state: Its attributes.
    """

    maker: str = "collections.OrderedDict"
    default: Any = None
    state: Any = None


def shown(value: object, length: int = 100) -> str:
    """A value in an error message; containers by their type, since writing nested ones out may take for ever."""
    text = str(value) if isinstance(value, Name | Made | str | int) else f"a {type(value).__name__}"
    return text if len(text) <= length else text[:length] + "..."


@dataclass(frozen=True, slots=True)
class Loading:
    """What a pickle may do.

    Attributes:
        calls: The calls that are carried out, by dotted name.
        persistent: Turns a persistent id (in torch's files, a storage) into a value.
    """

    calls: Mapping[str, Callable[..., object]]
    persistent: Callable[[object], object]


@dataclass(frozen=True, slots=True)
class Unpickled:
    """The value of a pickle, the byte after its end, and everything that it asked for and did not get."""

    value: Any
    end: int
    made: list[Made]


def unpickle(data: bytes | mmap.mmap, loading: Loading, start: int = 0) -> Unpickled:
    """Read one pickle of protocol 2 to 5 as plain data.

    Args:
        data: The bytes that hold it, or a mapped file.
        loading: The calls that are carried out; every other becomes a `Made`.
        start: Where in `data` the pickle begins.

    Raises:
        FormatError: Cut off, not a pickle, or one that would hardly end.

    Example:
        >>> import os, pickle
        >>> unpickle(pickle.dumps({"a": [1, 2.5], "b": os.getcwd}, protocol=2), Loading({}, str)).value
        {'a': [1, 2.5], 'b': Name(module='posix', name='getcwd')}
    """
    machine = _Machine(data, loading)
    try:
        end = machine.run(start)
        return Unpickled(machine.stack.pop(), end, machine.made)
    except ModsurgError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, struct.error) as error:
        raise FormatError(f"the pickle is damaged or cut off ({type(error).__name__}: {error})") from None


class _Machine:
    """The stack machine. An operation takes the position after its code and returns that of the next code."""

    def __init__(self, data: bytes | mmap.mmap, loading: Loading) -> None:
        self.data = data
        self.loading = loading
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.made: list[Made] = []
        self.copied = 0

    def run(self, at: int) -> int:
        data, operations = self.data, _OPERATIONS
        for _ in range(_STEPS):
            code = data[at]
            if code == 0x2E:
                return at + 1
            operation = operations.get(code)
            if operation is None:
                raise FormatError(f"not a pickle that torch writes: operation {code:#04x} at byte {at}")
            at = operation(self, at + 1)
        raise FormatError(f"the pickle takes more than {_STEPS:,} steps")

    def take(self, at: int, size: int) -> bytes:
        if size < 0 or at + size > len(self.data):
            raise FormatError(f"the pickle is cut off: {size:,} bytes wanted, {len(self.data) - at:,} left")
        return self.data[at : at + size]

    def mark(self, at: int) -> int:
        self.outer.append(self.stack)
        self.stack = []
        return at

    def group(self) -> list[Any]:
        """The items since the last mark."""
        items, self.stack = self.stack, self.outer.pop()
        return items

    def pop(self, at: int) -> int:
        self.stack.pop()
        return at

    def pop_group(self, at: int) -> int:
        self.group()
        return at

    def close_tuple(self, at: int) -> int:
        items = self.group()
        self.stack.append(tuple(items))
        return at

    def frozen_set(self, at: int) -> int:
        items = self.group()
        self.stack.append(frozenset(checked_key(item) for item in items))
        return at

    def memoize(self, at: int) -> int:
        self.memo[len(self.memo)] = self.stack[-1]
        return at

    def name(self, at: int) -> int:
        middle = self.data.find(b"\n", at)
        end = self.data.find(b"\n", middle + 1)
        if min(middle, end) < 0:
            raise FormatError("the pickle is cut off in a name")
        self.stack += (self.data[at:middle].decode(), self.data[middle + 1 : end].decode())
        return self.stacked_name(end + 1)

    def stacked_name(self, at: int) -> int:
        name, module = self.stack.pop(), str(self.stack.pop())
        self.stack.append(Name(_HOMES.get(module, module), str(name)))
        return at

    def persistent(self, at: int) -> int:
        self.stack.append(self.loading.persistent(self.stack.pop()))
        return at

    def make(self, at: int, *, called: bool) -> int:
        args, maker = self.stack.pop(), self.stack.pop()
        if not isinstance(args, tuple):
            raise FormatError(f"the pickle calls {shown(maker)} with {shown(args)}, not with a tuple")
        self.copied += sum(len(arg) for arg in args if isinstance(arg, Sized))
        if self.copied > 4 * len(self.data) + _COPIED:  # a bytearray of protocol 2 goes through two calls
            raise FormatError("the pickle copies the same values over and over, which no file of torch does")
        known = self.loading.calls.get(str(maker)) if type(maker) is Name else None
        if known is not None:
            self.stack.append(known(*args))
            return at
        self.made.append(Made(maker, args, called))
        self.stack.append(self.made[-1])
        return at

    def build(self, at: int) -> int:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Name):
            raise FormatError(f"the pickle changes {shown(target)} itself, which no file of torch does")
        if isinstance(target, Made | Ordered):
            if target.state is not None:  # what was looked at would be only the second
                raise FormatError(f"the pickle fills {shown(target)} twice, which no file of torch does")
            target.state = state
        return at


def checked_key(key: Any) -> Any:
    """A key of a dict or set, if it can be hashed in bounded time, as nested tuples can't."""
    several = isinstance(key, tuple | frozenset)
    if several and len(key) > _LONGEST_KEY:
        raise FormatError(f"the pickle has a tuple of {len(key):,} values as a key, which no state_dict has")
    for item in key if several else (key,):
        if isinstance(item, Made):
            continue  # hashed by its identity
        if isinstance(item, int) and not -_LARGEST_KEY < item < _LARGEST_KEY:  # their hashes may all be equal
            raise FormatError("the pickle has a number of more than 60 bits as a key, which no state_dict has")
        if not (item is None or isinstance(item, str | int | float | complex | bytes | Name)):
            raise FormatError(f"the pickle has {shown(key)} as a key, which no state_dict has")
    return key


def _extend(target: object, items: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(items)
    elif isinstance(target, Made):
        target.items.extend(items)
    else:
        raise FormatError(f"the pickle is damaged: items for a {type(target).__name__}")


def _add(target: Any, items: list[Any]) -> None:
    target.update(checked_key(item) for item in items)


def _update(target: object, items: list[Any]) -> None:
    if isinstance(target, dict):
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[key if type(key) is str else checked_key(key)] = value
    elif isinstance(target, Made):
        target.pairs.extend(zip(items[::2], items[1::2], strict=True))
    else:
        raise FormatError(f"the pickle is damaged: keys and values for a {type(target).__name__}")


_Operation = Callable[[_Machine, int], int]


def _skip(size: int) -> _Operation:
    return lambda machine, at: at + size


def _constant(make: Callable[[], object]) -> _Operation:
    def operation(machine: _Machine, at: int) -> int:
        machine.stack.append(make())
        return at

    return operation


def _number(layout: str) -> _Operation:
    read, width = struct.Struct(layout).unpack_from, struct.calcsize(layout)

    def operation(machine: _Machine, at: int) -> int:
        machine.stack.append(read(machine.data, at)[0])
        return at + width

    return operation


def _sized(layout: str, convert: Callable[[bytes], object]) -> _Operation:
    read, width = struct.Struct(layout).unpack_from, struct.calcsize(layout)

    def operation(machine: _Machine, at: int) -> int:
        size: int = read(machine.data, at)[0]
        at += width
        machine.stack.append(convert(machine.take(at, size)))
        return at + size

    return operation


def _memory(layout: str, *, keep: bool) -> _Operation:
    read, width = struct.Struct(layout).unpack_from, struct.calcsize(layout)

    def store(machine: _Machine, at: int) -> int:
        machine.memo[read(machine.data, at)[0]] = machine.stack[-1]
        return at + width

    def fetch(machine: _Machine, at: int) -> int:
        machine.stack.append(machine.memo[read(machine.data, at)[0]])
        return at + width

    return store if keep else fetch


def _into(fill: Callable[[Any, list[Any]], None], count: int | None) -> _Operation:
    def operation(machine: _Machine, at: int) -> int:
        if count is None:
            items = machine.group()
        else:
            items = machine.stack[-count:]
            del machine.stack[-count:]
        fill(machine.stack[-1], items)
        return at

    return operation


def _last(size: int) -> _Operation:
    def operation(machine: _Machine, at: int) -> int:
        machine.stack[-size:] = [tuple(machine.stack[-size:])]
        return at

    return operation


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:  # a `str` of Python 2 may hold anything
        return data.decode("latin-1")


def _integer(data: bytes) -> int:
    if len(data) > _LONGEST_NUMBER:  # a longer one takes too long to print
        raise FormatError(f"the pickle has a number of {len(data):,} bytes, which no file of torch has")
    return int.from_bytes(data, byteorder="little", signed=True)


_BY_CODE: Final[dict[bytes, _Operation]] = {
    b"\x80": _skip(1), b"\x95": _skip(8), b"(": _Machine.mark, b"0": _Machine.pop, b"1": _Machine.pop_group,
    b"N": _constant(lambda: None), b"\x88": _constant(lambda: True), b"\x89": _constant(lambda: False),
    b"}": _constant(dict), b"]": _constant(list), b")": _constant(tuple), b"\x8f": _constant(set),
    b"J": _number("<i"), b"K": _number("<B"), b"M": _number("<H"), b"G": _number(">d"),
    b"\x8a": _sized("<B", _integer), b"\x8b": _sized("<i", _integer),
    b"X": _sized("<I", _text), b"\x8c": _sized("<B", _text), b"\x8d": _sized("<Q", _text),
    b"U": _sized("<B", _text), b"T": _sized("<i", _text),
    b"C": _sized("<B", bytes), b"B": _sized("<I", bytes), b"\x8e": _sized("<Q", bytes),
    b"\x96": _sized("<Q", bytearray),
    b"q": _memory("<B", keep=True), b"r": _memory("<I", keep=True), b"\x94": _Machine.memoize,
    b"h": _memory("<B", keep=False), b"j": _memory("<I", keep=False),
    b"\x85": _last(1), b"\x86": _last(2), b"\x87": _last(3), b"t": _Machine.close_tuple,
    b"a": _into(_extend, 1), b"e": _into(_extend, None), b"s": _into(_update, 2), b"u": _into(_update, None),
    b"\x90": _into(_add, None), b"\x91": _Machine.frozen_set,
    b"c": _Machine.name, b"\x93": _Machine.stacked_name, b"Q": _Machine.persistent,
    b"R": partial(_Machine.make, called=True), b"\x81": partial(_Machine.make, called=False),
    b"b": _Machine.build,
}  # fmt: skip
_OPERATIONS: Final = {code[0]: operation for code, operation in _BY_CODE.items()}
