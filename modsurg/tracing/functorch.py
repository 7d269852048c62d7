"""What torch.vmap hides: the one place that uses torch's private names for its wrapped tensors."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch._C._functorch import (
    get_unwrapped,
    is_batchedtensor,
    is_functorch_wrapped_tensor,
    maybe_get_bdim,
    maybe_get_level,
    peek_interpreter_stack,
)


def is_wrapped(tensor: torch.Tensor) -> bool:
    """Return whether torch.vmap or torch.func.grad made this tensor, so that its values can't be read."""
    return bool(is_functorch_wrapped_tensor(tensor))


def is_transforming() -> bool:
    """Return whether a call under torch.vmap or torch.func.grad is running: a shape is not all there is of a tensor."""
    return peek_interpreter_stack() is not None


def unwrap_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor that has the memory.

    Example:
        >>> def shape(x):
        ...     shapes.append((tuple(x.shape), tuple(unwrap_tensor(x).shape)))
        ...     return x
        >>> shapes = []
        >>> _ = torch.vmap(shape)(torch.zeros(5, 2))
        >>> shapes
        [((2,), (5, 2))]
    """
    while is_functorch_wrapped_tensor(tensor):
        tensor = get_unwrapped(tensor)
    return tensor


def count_mapped(given: Sequence[Any]) -> int:
    """Return how many times torch.vmap makes a call of which it shows one: the sizes that it hides in these arguments.

    Example:
        >>> counts = []
        >>> _ = torch.vmap(lambda x: counts.append(count_mapped([x])) or x)(torch.zeros(5, 2))
        >>> counts
        [5]
    """
    hidden: dict[int, int] = {}
    waiting = list(given)
    while waiting:
        value = waiting.pop()
        if isinstance(value, (tuple, list)):
            waiting += value
        elif isinstance(value, torch.Tensor) and is_functorch_wrapped_tensor(value):
            inner = get_unwrapped(value)
            if is_batchedtensor(value):
                hidden[maybe_get_level(value)] = int(inner.shape[maybe_get_bdim(value)])
            waiting.append(inner)
    return prod(hidden.values())
