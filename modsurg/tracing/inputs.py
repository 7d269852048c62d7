"""Make the arguments of forward from an example: tensors, arrays, or shapes."""

import itertools
import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

MIXED = 3


def is_shape(value: object) -> bool:
    """Whether a value stands for a tensor of that shape: a tuple of whole numbers such as `(1, 3, 32, 32)`."""
    return isinstance(value, tuple) and len(value) > 0 and all(type(size) is int and size >= 0 for size in value)


def is_array(value: object) -> bool:
    """Return whether a value is a numpy array of numbers."""
    return type(value).__module__ == "numpy" and getattr(getattr(value, "dtype", None), "kind", "O") in "biufc"


def with_batch(example: object) -> object:
    """Return the example with a batch size of 1 before every shape, tensor and array; None where there is none.

    Example:
        >>> with_batch((3, 224, 224)), with_batch({"x": (3, 8, 8), "scale": 2.0})
        ((1, 3, 224, 224), {'x': (1, 3, 8, 8), 'scale': 2.0})
    """
    args, kwargs = _spread(example)
    if not any(map(_has_sizes, (*args, *kwargs.values()))):
        return None
    args, kwargs = tuple(map(_batched, args)), {name: _batched(value) for name, value in kwargs.items()}
    return kwargs if isinstance(example, Mapping) else args[0] if args and not _is_several(example) else args


def shapes_of(example: object) -> list[tuple[int, ...]]:
    """List the shapes of the arguments that are shapes, tensors or arrays."""
    args, kwargs = _spread(example)
    return [
        value if is_shape(value) else tuple(value.shape) for value in (*args, *kwargs.values()) if _has_sizes(value)
    ]


def _has_sizes(value: object) -> bool:
    return is_shape(value) or isinstance(value, torch.Tensor) or is_array(value)


def _batched(value: Any) -> Any:
    return (1, *value) if is_shape(value) else value[None] if _has_sizes(value) else value


def dtypes_to_try(example: object) -> Iterator[tuple[torch.dtype | None, ...]]:
    """What the tensors that the example gives by their shapes alone may be: floating, whole numbers, or some of each.

    Example:
        >>> list(dtypes_to_try({"x": (2, 3)}))
        [(None,), (torch.int64,)]
        >>> list(dtypes_to_try(((2, 3), (2, 4))))
        [(None, None), (torch.int64, torch.int64), (None, torch.int64), (torch.int64, None)]
    """
    args, kwargs = _spread(example)
    count = sum(map(is_shape, (*args, *kwargs.values())))
    choices: set[tuple[torch.dtype | None, ...]] = {(None,) * count, (torch.int64,) * count}
    if count <= MIXED:
        choices.update(itertools.product((None, torch.int64), repeat=count))
    yield from sorted(choices, key=lambda choice: (len(set(choice)), list(map(str, choice))))


def arguments(
    example: object, model: nn.Module, dtypes: tuple[torch.dtype | None, ...]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Make the arguments and keyword arguments of forward.

    Args:
        example: A tensor, a numpy array or any other value (one argument), a tuple (several), a mapping (keywords), or
            a shape.
        model: Tensors made from a shape or an array have the dtype and device of its first floating parameter.
        dtypes: Another dtype for each of them, in order.
    """
    left = iter(dtypes)

    def made(value: Any) -> Any:
        if is_shape(value):
            return _tensor(value, model, next(left))
        return _from_array(value, model) if is_array(value) else value

    args, kwargs = _spread(example)
    return tuple(map(made, args)), {name: made(value) for name, value in kwargs.items()}


def _spread(example: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Mapping):
        return (), dict(example)
    return (example if isinstance(example, tuple) and _is_several(example) else (example,)), {}


def _is_several(example: object) -> bool:
    return isinstance(example, tuple) and not is_shape(example) and not hasattr(example, "_fields")


def _from_array(value: Any, model: nn.Module) -> torch.Tensor:
    made = torch.tensor(value)
    like = _first_floating(model)
    return made.to(like.device, like.dtype if made.is_floating_point() else made.dtype)


def _first_floating(model: nn.Module) -> torch.Tensor:
    return next((each for each in model.parameters() if each.is_floating_point()), torch.empty(0))


def _tensor(shape: tuple[int, ...], model: nn.Module, dtype: torch.dtype | None) -> torch.Tensor:
    like = _first_floating(model)
    dtype = dtype or like.dtype
    if like.is_meta:
        return torch.empty(shape, dtype=dtype, device="meta")
    if not dtype.is_floating_point:
        tables = (each for each in model.modules() if isinstance(each, (nn.Embedding, nn.EmbeddingBag)))
        index = 0 if any(table.num_embeddings == 1 for table in tables) else 1
        return torch.full(shape, index, dtype=dtype, device=like.device)
    return torch.randn(shape, dtype=dtype, device=like.device)


@contextmanager
def forked_random() -> Iterator[None]:
    """Give back the random states of python, numpy and torch as they were."""
    python = random.getstate()
    numpy = sys.modules.get("numpy")
    numbers = numpy.random.get_state() if numpy else None
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]  # torch's own
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        if numpy:
            numpy.random.set_state(numbers)
