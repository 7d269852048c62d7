"""Plain data and tensors <-> JSON that names tensors: how a run is written without pickle.

Numbers, strings, lists and dicts with string keys are themselves. Everything else is an object with one key that begins
with `$`, as in `{"$tuple": [1, 2]}` or `{"$tensor": "optimizer.state.fc.weight.exp_avg"}`.
"""

import collections
import math
import sys
from collections.abc import Mapping
from typing import Any

import torch

from modsurg.checkpoints.formats.file_io import why_not_kept
from modsurg.errors import FormatError, SaveError

Tensors = dict[str, torch.Tensor]


def encode(value: object, name: str, tensors: Tensors) -> Any:
    """Give `value` as JSON-able data; its tensors go into `tensors` under names that begin with `name`.

    Args:
        value: None, numbers, strings, bytes, lists, tuples, sets, dicts, dtypes, devices, tensors and numpy arrays.
        name: Dotted name of the value, for its tensors and for the error.
        tensors: Receives the tensors, detached and not copied.

    Raises:
        SaveError: Something of another type, named by its place; a container that holds itself.

    Example:
        >>> tensors = {}
        >>> encode({"betas": (0.9, 0.99), "m": torch.ones(1)}, "adam", tensors)
        {'betas': {'$tuple': [0.9, 0.99]}, 'm': {'$tensor': 'adam.m'}}
        >>> list(tensors)
        ['adam.m']
    """
    try:
        return _encode(value, name, tensors)
    except RecursionError:
        raise SaveError(f"{name} holds itself, or containers inside one another without an end") from None


def decode(data: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Give back what `encode` was given.

    Raises:
        FormatError: Data that `encode` does not write, or a tensor that is not in `tensors`.

    Example:
        >>> decode({"$tuple": [1, {"$float": "inf"}]}, {})
        (1, inf)
    """
    if isinstance(data, list):
        return [decode(item, tensors) for item in data]
    if not isinstance(data, dict):
        return data
    tag = next(iter(data), "")
    if not tag.startswith("$"):
        return {key: decode(value, tensors) for key, value in data.items()}
    try:
        return _DECODERS[tag](data[tag], tensors)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        raise FormatError(f"{tag} {data[tag]!r:.80} can't be read: {error!r}. The file is damaged or newer.") from error


def _encode(value: object, name: str, tensors: Tensors) -> Any:
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, torch.Tensor):
        return {"$tensor": _keep(value, name, tensors)}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": str(float(value))}
    if isinstance(value, Mapping):
        return _encode_mapping(value, name, tensors)
    if isinstance(value, (list, tuple, set, frozenset, collections.deque)):
        items = sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value
        data = [_encode(item, f"{name}.{i}", tensors) for i, item in enumerate(items)]
        if isinstance(value, collections.deque):
            return {"$deque": [data, value.maxlen]}
        tag = next((kind.__name__ for kind in (set, frozenset) if isinstance(value, kind)), "tuple")
        return data if isinstance(value, list) else {f"${tag}": data}
    return _encode_rare(value, name, tensors)


def _keep(tensor: torch.Tensor, name: str, tensors: Tensors) -> str:
    if problem := why_not_kept(tensor):
        raise SaveError(f"{name} {problem}")
    free = name
    while free in tensors:
        free += "_"
    tensors[free] = tensor.detach()
    return free


def _encode_mapping(value: Mapping[Any, Any], name: str, tensors: Tensors) -> Any:
    if all(isinstance(key, str) and not key.startswith("$") for key in value):
        data: Any = {key: _encode(item, f"{name}.{key}", tensors) for key, item in value.items()}
    else:
        pairs = [[_encode(key, name, tensors), _encode(item, f"{name}.{key}", tensors)] for key, item in value.items()]
        data = {"$dict": pairs}
    return {"$counter": data} if isinstance(value, collections.Counter) else data


def _encode_rare(value: object, name: str, tensors: Tensors) -> Any:
    if isinstance(value, bytes):
        return {"$bytes": value.hex()}
    if isinstance(value, complex):
        return {"$complex": [value.real, value.imag]}
    if isinstance(value, (torch.dtype, torch.device)):
        return {"$dtype" if isinstance(value, torch.dtype) else "$device": str(value).removeprefix("torch.")}
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.str_):
        return str(value)
    if numpy is not None and isinstance(value, numpy.generic) and _is_of_numbers(value):
        return _encode(value.item(), name, tensors)
    if numpy is not None and isinstance(value, numpy.ndarray) and _is_of_numbers(value):
        native = value.astype(value.dtype.newbyteorder("="), order="C")
        return {"$numpy": [_keep(torch.from_numpy(native), name, tensors), value.dtype.str]}
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    raise SaveError(
        f"{name} is a {kind}, which can't be kept without pickle; keep numbers, strings, lists and tensors."
    )


def _is_of_numbers(value: Any) -> bool:
    """Whether a value of numpy is of numbers that torch has too, all of them: no long doubles, and no mask."""
    return value.dtype.kind in "biufc" and value.dtype.char not in "gG" and not hasattr(value, "mask")


def _dtype(name: str, _: object) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"torch.{name} is not a dtype")
    return dtype


def _array(data: list[str], tensors: Mapping[str, torch.Tensor]) -> Any:
    array = tensors[data[0]].numpy()
    if data[1].lstrip("<>|=") != array.dtype.str.lstrip("<>|="):  # one element may be as long as a dtype says
        raise TypeError(f"{data[0]} is not an array of {data[1]}")
    return array.astype(data[1], copy=False)


_DECODERS: dict[str, Any] = {
    "$tensor": lambda data, tensors: tensors[data],
    "$float": lambda data, _: float(data),
    "$tuple": lambda data, tensors: tuple(decode(data, tensors)),
    "$set": lambda data, tensors: set(decode(data, tensors)),
    "$frozenset": lambda data, tensors: frozenset(decode(data, tensors)),
    "$deque": lambda data, tensors: collections.deque(decode(data[0], tensors), data[1]),
    "$dict": lambda data, tensors: {decode(key, tensors): decode(value, tensors) for key, value in data},
    "$counter": lambda data, tensors: collections.Counter(decode(data, tensors)),
    "$bytes": lambda data, _: bytes.fromhex(data),
    "$complex": lambda data, _: complex(*data),
    "$dtype": _dtype,
    "$device": lambda data, _: torch.device(data),
    "$numpy": _array,
}
