"""What a forward is given: the user's example, or tensors made from its shapes."""

import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def is_shape(value: object) -> bool:
    """Whether a value stands for a tensor of that shape: a tuple of whole numbers such as `(1, 3, 32, 32)`."""
    return isinstance(value, tuple) and len(value) > 0 and all(type(size) is int and size >= 0 for size in value)


def has_shape(example: object) -> bool:
    """Whether some tensor of the example is given by its shape alone, so that its dtype is ours to choose."""
    args, kwargs = _spread(example)
    return any(map(is_shape, args)) or any(map(is_shape, kwargs.values()))


def arguments(example: object, model: nn.Module, dtype: torch.dtype | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments and keyword arguments of forward.

    Args:
        example: A tensor or any other value (one argument), a tuple (several), a mapping (keywords), or a shape.
        model: Tensors made from a shape have the dtype and device of its first floating parameter.
        dtype: Another dtype for them.
    """

    def made(value: Any) -> Any:
        return _tensor(value, model, dtype) if is_shape(value) else value

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
        return torch.zeros(shape, dtype=dtype, device=like.device)
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
