"""One operation of ATen as the rules of labels see it, and what they have in common; see `labels`."""

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from modsurg.tracing.labels import Dim, Factor, Labels, labelled

Dims = list[Dim]


class UnknownOperationError(Exception):
    """No rule says what an operation does with labelled channels; caught by the mode that runs the rules."""


@dataclass(frozen=True, slots=True)
class Op:
    """One operation.

    Attributes:
        name: Its name in ATen.
        args: Positional arguments.
        out: What it returned.
        labels: Gives out labels.
        dims: The dimensions of a tensor.
        weights: `id` of the tensors that are parameters, or made of nothing else.
        picked: By the `id` of a tensor a dimension of which it is one place; it can't change if the tensor is used.
    """

    name: str
    args: Sequence[Any]
    kwargs: dict[str, Any]
    out: Any
    labels: Labels
    dims: Callable[[torch.Tensor], Dims]
    weights: Set[int]
    picked: dict[int, Dim]

    def arg(self, index: int, default: Any = None) -> Any:
        """The argument at a position."""
        return self.args[index] if len(self.args) > index else default

    def has(self, index: int) -> bool:
        """Whether a tensor was given at a position."""
        return isinstance(self.arg(index), torch.Tensor)

    def given(self, index: int) -> Dims:
        """The dimensions of the tensor at a position."""
        return list(self.dims(self.args[index]))


Rule = Callable[[Op], "Dims | list[Dims]"]


def plain(size: int, fixed: bool = True) -> Dim:
    """A dimension without channels."""
    return (Factor(size, None, fixed),) if size != 1 else ()


def plain_dims(tensor: torch.Tensor, fixed: bool = True) -> Dims:
    """The dimensions of a tensor without channels."""
    return [plain(size, fixed) for size in tensor.shape]


def has_size(dim: Dim, size: int) -> bool:
    """Whether a dimension has this size."""
    return prod(f.size for f in dim) == size


def broadcast(op: Op, tensors: Sequence[torch.Tensor], shape: Sequence[int]) -> Dims:
    """Let the dimensions of several tensors belong together, as element by element computations do."""
    result: Dims = [() for _ in shape]
    for tensor in tensors:
        dims = op.dims(tensor)
        for place, dim in enumerate(dims, len(shape) - len(dims)):
            size = prod(f.size for f in dim)
            if size == shape[place]:
                result[place] = op.labels.unify(result[place], dim)
            else:
                op.labels.fix(dim)
    return result


def pointwise(op: Op) -> Dims:
    """Element by element."""
    tensors = [each for each in (*op.args, *op.kwargs.values()) if isinstance(each, torch.Tensor)]
    return broadcast(op, tensors, op.out.shape)


def cut(op: Op, dim: Dim, start: int, stop: int, step: int = 1) -> Dim:
    """The places of a dimension from `start` to `stop`."""
    size = len(range(start, stop, step))
    if has_size(dim, size):
        return dim
    if not labelled(dim):
        return plain(size, any(f.fixed for f in dim))
    inner = prod(f.size for f in dim[1:])
    if len(dim) > 1 and step == 1 and start % inner == 0 and stop % inner == 0:
        return (*cut(op, dim[:1], start // inner, stop // inner), *dim[1:])
    ids = op.labels.flatten(dim)
    assert ids is not None
    return (Factor(size, ids[start:stop:step]),)
