"""What stays of a tensor whose sizes change: for each dimension, which old places are which new ones."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import torch


@dataclass(frozen=True, slots=True)
class Axis:
    """One dimension of a tensor before and after.

    A dimension may run over several things at once, as the output channels of a grouped convolution run over the groups
    and the channels in a group. Each of these parts keeps its first places, if nothing else is said.

    Attributes:
        old: The parts before; their product is the size of the dimension.
        new: The same parts after.
        reads: Whether the dimension runs over inputs: what an old output reads from a new input begins at zero.
        chosen: For each new place the old one that it was, -1 for none; where these are not the first.
    """

    old: tuple[int, ...]
    new: tuple[int, ...]
    reads: bool = False
    chosen: torch.Tensor | None = field(default=None, compare=False)

    @property
    def old_size(self) -> int:
        """The size before."""
        return prod(self.old)

    @property
    def changes(self) -> bool:
        """Whether any place comes, goes or moves."""
        return self.chosen is not None or self.old != self.new

    @property
    def source(self) -> torch.Tensor:
        """For each new place the old one that it was, -1 for none."""
        if self.chosen is not None:
            return self.chosen
        places = torch.arange(prod(self.old)).view(self.old)
        result = torch.full(self.new, -1)
        both = tuple(slice(min(old, new)) for old, new in zip(self.old, self.new, strict=True))
        result[both] = places[both]
        return result.flatten()


Axes = tuple[Axis, ...]


@dataclass(frozen=True, slots=True)
class Reshaped:
    """A tensor of the model that got another shape.

    Attributes:
        tensor: The parameter or buffer; it is the same object as before.
        axes: Its dimensions before and after.
    """

    tensor: torch.Tensor
    axes: Axes


def fixed(*sizes: int) -> Axes:
    """Dimensions that do not change."""
    return tuple(Axis((size,), (size,)) for size in sizes)


def old_shape(axes: Axes) -> tuple[int, ...]:
    """The shape before."""
    return tuple(prod(axis.old) for axis in axes)


def new_shape(axes: Axes) -> tuple[int, ...]:
    """The shape after."""
    return tuple(prod(axis.new) for axis in axes)


def overlay(old: torch.Tensor, new: torch.Tensor, axes: Axes) -> None:
    """Copy what is kept of `old` into the contiguous `new`."""
    part, places = old.to(new.dtype), []
    for dim, axis in enumerate(axes):
        source = axis.source
        there = source >= 0
        part = part.index_select(dim, source[there].to(old.device)) if axis.changes else part
        places.append(there.nonzero().flatten().to(new.device))
    if part.shape == new.shape:
        new.copy_(part)
    else:
        new[_grid(places)] = part


def silence_new_inputs(new: torch.Tensor, axes: Axes) -> None:
    """Set to zero what the old outputs read, in the contiguous `new`."""
    if any(axis.reads for axis in axes):
        reached = [((axis.source >= 0) | axis.reads).nonzero().flatten() for axis in axes]
        new[_grid([places.to(new.device) for places in reached])] = 0


def extend(old: torch.Tensor, axes: Axes, how: str) -> torch.Tensor:
    """The old tensor in its new shape: new places are the mean of the old ones, or repeat them.

    Example:
        >>> extend(torch.tensor([[1., 3.]]), (Axis((1,), (1,)), Axis((2,), (3,))), "mean")
        tensor([[1., 3., 2.]])
    """
    for dim, axis in enumerate(axes):
        if axis.changes:
            source = axis.source.to(old.device)
            fresh = source < 0
            turn = (fresh.cumsum(0) - 1) % old.shape[dim]
            new = old.index_select(dim, torch.where(fresh, turn, source))
            if how == "mean" and fresh.any():
                shape = [-1 if n == dim else 1 for n in range(old.dim())]
                new = torch.where(fresh.view(shape), old.mean(dim, keepdim=True), new)
            old = new
    return old.contiguous()


def resized(tensor: torch.Tensor, axes: Axes, fill: float = 0.0) -> torch.Tensor:
    """A tensor of the new shape, with what is kept of `tensor`, and `fill` elsewhere, in the same layout.

    Example:
        >>> resized(torch.ones(2, 2), (Axis((2,), (1,)), Axis((2,), (3,))))
        tensor([[1., 1., 0.]])
    """
    new = tensor.new_full(new_shape(axes), fill)
    overlay(tensor, new, axes)
    return like(new, tensor)


def put_back(new: torch.Tensor, old: torch.Tensor, axes: Sequence[Axes]) -> torch.Tensor:
    """Return `old` with what was kept of it in `new`, after resizes along `axes`, taken from `new`.

    Example:
        >>> put_back(torch.ones(1), torch.zeros(2), [(Axis((2,), (1,)),)])
        tensor([1., 0.])
    """
    places = torch.arange(1, old.numel() + 1, device=old.device).view(old.shape)
    for each in axes:
        places = resized(places, each)
    kept = places.flatten() > 0
    result = old.contiguous().clone().flatten()
    result[places.flatten()[kept] - 1] = new.to(old.device, old.dtype).flatten()[kept]
    return like(result.view(old.shape), old)


def like(new: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """`new` in the memory format of `tensor`."""
    for ndim, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if tensor.ndim == ndim and tensor.is_contiguous(memory_format=layout) and not tensor.is_contiguous():
            return new.contiguous(memory_format=layout)
    return new


def factor(axes: Axes, shape: Sequence[int], key: str) -> Axes | None:
    """The axes of a tensor that an optimizer keeps for a parameter with `axes`: the same, or without some dimension.

    Args:
        axes: The parameter's.
        shape: The tensor's shape: the parameter's own, or with some of its dimensions 1, or without its last dimension
            (one number for each row) or the one before it (one for each column).
        key: The tensor's name; `row` or `col` in it tells which, where the shape alone does not.
    """
    whole, shape = old_shape(axes), tuple(shape)
    if len(shape) == len(whole):
        if any(size not in (1, full) for size, full in zip(shape, whole, strict=True)):
            return None
        single = len(shape) - 1 if "row" in key else len(shape) - 2 if "col" in key else -1
        return tuple(
            fixed(1)[0] if size != full or (size == 1 and place == single) else axis
            for place, (axis, size, full) in enumerate(zip(axes, shape, whole, strict=True))
        )
    rows, columns = axes[:-1], axes[:-2] + axes[-1:]
    for choice in (columns, rows) if "col" in key else (rows, columns):
        if len(whole) > 1 and shape == old_shape(choice):
            return choice
    return None


def _grid(places: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """An index of the places at which these cross."""
    last = len(places) - 1
    return tuple(each.view(-1, *[1] * (last - dim)) for dim, each in enumerate(places))
