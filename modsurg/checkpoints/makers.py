"""What the pickle of a whole model may call and allocate: plain values that take no more memory than in the file.

torch's restricted unpickler asks only whether a name is allowed. Here the arguments are looked at too: `tuple` of a
range takes ten bytes in the file and all memory there is, and numpy believes what it is told of where an object lies.
"""

from collections.abc import Callable, Mapping
from enum import EnumMeta
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
_BY_IDENTITY: Final[object] = object.__hash__
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
    """What a call that may be made gives; a value."""
    return isinstance(value, Made) and value.called and value.state is None


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
    if not isinstance(kind, type):
        return False
    if isinstance(kind.__new__, FunctionType):  # the class's own code, as in a named tuple
        return True
    contents = next((plain for base, plain in _BASES if issubclass(kind, base) and kind is not base), ())
    return len(made.args) == 1 and type(made.args[0]) in contents


def _deque(made: Made) -> bool:
    items, length = (*made.args, None)[:2] if made.args else ((), None)
    return len(made.args) <= 2 and type(items) in (tuple, list) and type(length) in (int, type(None))


def _is_flat(value: object) -> bool:
    """An atom, or a tuple or frozenset of atoms."""
    items = value if isinstance(value, tuple | frozenset) else (value,)
    return all(type(item) in _ATOMS for item in items)


def _plain_partial(made: Made) -> bool:
    """A function or class, and beside it nothing that can be called."""
    return len(made.args) >= 1 and not any(isinstance(arg, Name | Made) for arg in made.args[1:])


CALLED: Final[Mapping[str, Callable[[Made], bool]]] = {
    "functools.partial": _plain_partial,
    "builtins.getattr": lambda made: torch_function(made) is not None,
    "collections.deque": _deque,
    "torch._utils._rebuild_meta_tensor_no_storage": lambda _: True,
}
