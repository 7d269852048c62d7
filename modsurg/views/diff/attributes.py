"""The plain attributes of a module: what sets it apart from another of its class."""

import dataclasses
import enum
import functools
import sys
from collections.abc import Mapping, Sequence
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import nn

_SIMPLE = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.memory_format)
_FREQUENT = frozenset({bool, int, float, str, type(None)})
_NAMED = (type, FunctionType, BuiltinFunctionType)


def attributes(module: nn.Module) -> dict[str, str]:
    """Numbers, strings, functions and collections of them that a module holds, as text, in order.

    Private attributes, the mode, and objects whose equality nothing is known of are left out.

    Example:
        >>> attributes(nn.Linear(2, 3))
        {'in_features': '2', 'out_features': '3'}
    """
    found = {}
    for name, value in vars(module).items():
        if name[0] == "_" or name == "training":
            continue
        text = repr(value) if type(value) in _FREQUENT else text_of(value)
        if text is not None:
            found[name] = text
    return found


def packed_attributes(packed: Mapping[str, Any], names: Sequence[str]) -> dict[str, str]:
    """The same from the description of a module in a file.

    Args:
        packed: As `tree.values` writes attributes.
        names: The table of classes and functions in the description.

    Example:
        >>> packed_attributes({"training": True, "kernel": [3, 3], "act": {"name": 0}}, ["torch:relu"])
        {'kernel': '(3, 3)', 'act': 'torch.relu'}
    """
    found = {}
    for name, value in packed.items():
        if not name.startswith("_") and name != "training":
            text = _unpacked(value, names)
            if text is not None:
                found[name] = text
    return found


def text_of(value: object) -> str | None:
    """A plain value as text, equal for equal values; None for what is not plain.

    Example:
        >>> text_of((1, torch.float16)), text_of({"act": torch.relu}), text_of(object())
        ('(1, torch.float16)', "{'act': torch.relu}", None)
    """
    if isinstance(value, enum.Enum):
        return str(value)
    if isinstance(value, _SIMPLE):
        return repr(value)
    if isinstance(value, _numpy("generic")):
        return text_of(value.item()) if value.dtype.kind in "biufc" else None
    if isinstance(value, _NAMED):
        name = value.__name__ if isinstance(value, BuiltinFunctionType) else value.__qualname__
        return f"{value.__module__}.{name}".removeprefix("builtins.")
    if isinstance(value, (tuple, list)):
        return _joined(list(value), "()" if isinstance(value, tuple) else "[]")
    if isinstance(value, (set, frozenset)):
        return _joined(sorted(value, key=repr), "{}")
    if isinstance(value, Mapping):
        return _pairs([(text_of(key), text_of(item)) for key, item in value.items()])
    if isinstance(value, functools.partial):
        return _joined([value.func, value.args, value.keywords], "()")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _joined([getattr(value, part.name) for part in dataclasses.fields(value)], "()")
    return None


def as_tensor(value: object) -> torch.Tensor | None:
    """The tensor that a value is, or that an array of numpy would be; None for anything else."""
    if isinstance(value, torch.Tensor):
        return value
    if not isinstance(value, _numpy("ndarray")):
        return None
    try:
        return torch.from_numpy(value.copy())
    except (TypeError, ValueError):  # of texts or objects, or of numbers that torch does not have
        return None


def _numpy(name: str) -> Any:
    """A class of numpy; no class where that is not there, or not yet."""
    return getattr(sys.modules.get("numpy"), name, ())


def _unpacked(value: Any, names: Sequence[str]) -> str | None:
    if isinstance(value, list):
        return _brackets([_unpacked(item, names) for item in value], "()")
    if not isinstance(value, dict):
        return repr(value)
    ((tag, content),) = value.items()
    if tag == "name":
        return names[content].replace(":", ".")
    if tag in ("dtype", "layout", "memory_format"):
        return f"torch.{content}"
    if tag in ("list", "set", "frozenset"):
        return _brackets([_unpacked(item, names) for item in content], "[]" if tag == "list" else "{}")
    if tag == "dict":
        return _pairs([(_unpacked(key, names), _unpacked(item, names)) for key, item in content.items()])
    return str(content) if tag in ("size", "float", "device", "complex", "range", "enum") else None


def _joined(values: list[object], brackets: str) -> str | None:
    return _brackets([text_of(value) for value in values], brackets)


def _pairs(items: list[tuple[str | None, str | None]]) -> str | None:
    return _brackets([None if None in item else f"{item[0]}: {item[1]}" for item in items], "{}")


def _brackets(parts: list[str | None], brackets: str) -> str | None:
    if any(part is None for part in parts):
        return None
    return brackets[0] + ", ".join(part for part in parts if part is not None) + brackets[1]
