"""What the pickle of a whole model may call and allocate: plain values that take no more memory than in the file.

torch's restricted unpickler asks only whether a name is allowed. Here the arguments are looked at too: `tuple` of a
range takes ten bytes in the file and all memory there is, and numpy believes what it is told of where an object lies.
"""

import re
import sys
from collections.abc import Callable, Mapping
from enum import EnumMeta
from fractions import Fraction
from types import FunctionType
from typing import Any, Final

from modsurg.checkpoints.formats.torch_save.unpickler import Made, Name, checked_key

_ATOMS: Final = frozenset({type(None), bool, int, float, str, bytes, Name})
_BASES: Final[tuple[tuple[type, tuple[type, ...]], ...]] = (
    (tuple, (tuple, list)),
    (str, (str,)),
    (bytes, (bytes,)),
    (int, (int,)),
    (float, (float,)),
)
_NUMBERS: Final = "?bBhHiIlLqQefdgFDG"
_NUMBER: Final = re.compile(r"[biufc]\d{1,2}")
_PLAIN_DTYPE: Final = (None, None, None, -1, -1, 0)
_BY_IDENTITY: Final[object] = object.__hash__
_LONGEST_NAME: Final = 255
_DEEPEST_NAME: Final = 20
_LARGEST_PART: Final = 1 << 4096
FUNCTIONS: Final = "torch._C._VariableFunctionsClass"


def may_be_made(made: Made, named: Mapping[str, object]) -> bool:
    """Whether this makes no more than a plain value of its arguments, or an object that takes no more memory than they.

    Args:
        made: What the pickle wants to be called or allocated.
        named: The trusted classes by dotted name.
    """
    kind = named.get(str(made.maker))
    if isinstance(kind, EnumMeta):  # a member by its value
        return len(made.args) == 1 and _is_flat(made.args[0])
    return _may_be_called(made) if made.called else _may_be_allocated(made, kind)


def torch_function(made: Made) -> str | None:
    """The name of a function such as `torch.relu`, which a pickle gets from a class of torch by `getattr`."""
    named = made.args[1] if made.called and str(made.maker) == "builtins.getattr" and len(made.args) == 2 else None
    return named if type(named) is str and str(made.args[0]) == FUNCTIONS else None


def may_be_hashed(made: Made, named: Mapping[str, object]) -> bool:
    """Whether hashing this object, which may be made, takes bounded time.

    Args:
        made: What the pickle has as a key.
        named: The trusted classes by dotted name.
    """
    kind = named.get(str(made.maker))
    if isinstance(kind, type) and kind.__hash__ is _BY_IDENTITY:  # by identity, as a module
        return True
    args = () if _is_leaf(made) else made.args
    states = made.state if isinstance(made.state, tuple | list) else (made.state,)
    parts = (part for state in states for part in (state.values() if isinstance(state, dict) else (state,)))
    return all(_is_flat(part) or _is_leaf(part) for part in (*args, *parts))


def _is_leaf(value: object) -> bool:
    """What a call that may be made gives; only a slice is hashed with all that it holds."""
    return isinstance(value, Made) and value.called and value.state is None and str(value.maker) != "builtins.slice"


def classes_of_numbers() -> list[type]:
    """The classes of numpy's dtypes of numbers, of which torch asks that they are allowed too."""
    numpy = sys.modules["numpy"]
    return sorted({type(numpy.dtype(code)) for code in _NUMBERS}, key=str)


def frozen(items: Any = ()) -> frozenset[object]:
    """`frozenset`, of members that can be hashed in bounded time."""
    return frozenset(checked_key(item) for item in items)


def _may_be_called(made: Made) -> bool:
    check = CALLED.get(str(made.maker))
    return check is not None and check(made)


def _may_be_allocated(made: Made, kind: object) -> bool:
    if not made.args:
        return True
    if str(made.maker) in CALLED:
        return _may_be_called(made)
    if not isinstance(kind, type) or (issubclass(kind, Fraction) and not _fraction(made)):
        return False
    if isinstance(kind.__new__, FunctionType):  # the class's own code, as in a named tuple
        return True
    contents = next((plain for base, plain in _BASES if issubclass(kind, base) and kind is not base), ())
    return len(made.args) == 1 and type(made.args[0]) in contents


def _anything(_: Made) -> bool:
    return True


def _deque(made: Made) -> bool:
    items, length = (*made.args, None)[:2] if made.args else ((), None)
    return len(made.args) <= 2 and type(items) in (tuple, list) and type(length) in (int, type(None))


def _of_atoms(made: Made) -> bool:
    return all(type(arg) in _ATOMS for arg in made.args)


def _is_flat(value: object) -> bool:
    """An atom, or a tuple or frozenset of atoms."""
    items = value if isinstance(value, tuple | frozenset) else (value,)
    return all(type(item) in _ATOMS for item in items)


def _fraction(made: Made) -> bool:
    """Of numbers, or of a text without an exponent, of which nine letters would be millions of digits."""
    return all(
        (type(arg) is int and abs(arg) < _LARGEST_PART)
        or type(arg) is float
        or (type(arg) is str and "e" not in arg.lower())
        for arg in made.args
    )


def _logger(made: Made) -> bool:
    """A name of a few parts: logging keeps a logger for each of them."""
    return all(type(arg) is str and len(arg) <= _LONGEST_NAME and arg.count(".") <= _DEEPEST_NAME for arg in made.args)


def _of_values(made: Made) -> bool:
    """Of atoms and of other values of `datetime`: an offset from UTC is a timedelta in a timezone."""
    return all(type(arg) in _ATOMS or str(getattr(arg, "maker", "")).startswith("datetime.") for arg in made.args)


def _dtype(made: Made) -> bool:
    if not made.args:
        return False
    code, *flags = made.args
    state = made.state or (3, "<", *_PLAIN_DTYPE)
    plain = type(state) is tuple and state[2:] == _PLAIN_DTYPE and state[0] == 3 and state[1] in ("<", ">", "=", "|")
    return plain and type(code) is str and bool(_NUMBER.fullmatch(code)) and all(type(flag) is bool for flag in flags)


def _array(made: Made) -> bool:
    if len(made.args) != 3:
        return False
    kind, shape, code = made.args
    return str(kind) == "numpy.ndarray" and shape == (0,) and code == b"b"


def _scalar(made: Made) -> bool:
    if len(made.args) != 2:
        return False
    dtype, data = made.args
    return isinstance(dtype, Made) and str(dtype.maker) == "numpy.dtype" and type(data) is bytes


CALLED: Final[Mapping[str, Callable[[Made], bool]]] = {
    "functools.partial": _anything,
    "builtins.slice": _anything,
    "builtins.getattr": lambda made: torch_function(made) is not None,
    "collections.deque": _deque,
    "builtins.range": _of_atoms,
    "builtins.xrange": _of_atoms,  # Python 2's name of it, which protocol 2 writes
    "torch.serialization._get_layout": _anything,
    "torch._utils._rebuild_sparse_tensor": _anything,
    "torch._utils._rebuild_meta_tensor_no_storage": _anything,
    "torch._C.Generator": _of_atoms,
    "types.SimpleNamespace": _of_atoms,
    "logging.getLogger": _logger,
    "re._compile": _of_atoms,
    "decimal.Decimal": _of_atoms,
    "fractions.Fraction": _fraction,
    **{f"pathlib.{name}": _of_atoms for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")},
    **{f"datetime.{name}": _of_values for name in ("date", "datetime", "time", "timedelta", "timezone")},
    "numpy.dtype": _dtype,
    **{f"numpy.{core}.multiarray._reconstruct": _array for core in ("_core", "core")},
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("_core", "core")},
}
