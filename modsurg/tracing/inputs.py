"""What a forward is given: the user's example, or tensors made from its shapes."""

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
    """The arguments and keyword arguments of forward.

    Args:
        example: A tensor or any other value (one argument), a tuple (several), a mapping (keywords), or a shape.
        model: Tensors made from a shape have the dtype and device of its first floating parameter.
        dtypes: Another dtype for each of them, in order.
    """
    left = iter(dtypes)

    def made(value: Any) -> Any:
        return _tensor(value, model, next(left)) if is_shape(value) else value

    args, kwargs = _spread(example)
    return tuple(map(made, args)), {name: made(value) for name, value in kwargs.items()}


def _spread(example: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, tuple) and not is_shape(example) and not hasattr(example, "_fields"):
        return example, {}
    return (example,), {}


def _tensor(shape: tuple[int, ...], model: nn.Module, dtype: torch.dtype | None) -> torch.Tensor:
    like = next((each for each in model.parameters() if each.is_floating_point()), torch.empty(0))
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
