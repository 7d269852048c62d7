"""What stays of a tensor whose sizes change: for each dimension, which old places are which new ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch


@dataclass(frozen=True, slots=True)
class Axis:
    """One dimension of a tensor before and after.

    A dimension may run over several things at once, as the output channels of a grouped convolution run over the groups
    and the channels in a group. Each of these parts keeps its first places.

    Attributes:
        old: The parts before; their product is the size of the dimension.
        new: The same parts after.
        reads: Whether the dimension runs over inputs: what an old output reads from a new input begins at zero.
    """

    old: tuple[int, ...]
    new: tuple[int, ...]
    reads: bool = False

    @property
    def kept(self) -> tuple[slice, ...]:
        """The places that are there before and after."""
        return tuple(slice(min(old, new)) for old, new in zip(self.old, self.new, strict=True))


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
    new.view(_parts(axes, "new"))[_kept(axes)] = old.reshape(_parts(axes, "old"))[_kept(axes)]


def kept(tensor: torch.Tensor, axes: Axes, when: str) -> torch.Tensor:
    """The part of a tensor from `when` (`"old"` or `"new"`) that is there before and after."""
    return tensor.reshape(_parts(axes, when))[_kept(axes)]


def silence_new_inputs(new: torch.Tensor, axes: Axes) -> None:
    """Set to zero what the old outputs read, in the contiguous `new`."""
    if any(axis.reads for axis in axes):
        reach = tuple(slice(None) if axis.reads else part for axis in axes for part in axis.kept)
        new.view(_parts(axes, "new"))[reach] = 0


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


def _parts(axes: Axes, when: str) -> tuple[int, ...]:
    return tuple(part for axis in axes for part in getattr(axis, when))


def _kept(axes: Axes) -> tuple[slice, ...]:
    return tuple(part for axis in axes for part in axis.kept)
