"""How the elements of two tensors differ: counted, measured and located, a piece at a time."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PIECE = 1 << 15

Number = bool | int | float | complex


@dataclass(frozen=True, slots=True)
class Values:
    """How the values of two tensors of one shape differ.

    Attributes:
        differing: Number of elements that differ.
        total: Number of elements.
        max_abs: Largest absolute difference; NaN where only one of the two is NaN.
        max_rel: Largest difference relative to the larger of the two magnitudes.
        index: Where `max_abs` is; the first place of several.
        old: The first tensor's element there.
        new: The second tensor's element there.
    """

    differing: int
    total: int
    max_abs: float
    max_rel: float
    index: tuple[int, ...]
    old: Number
    new: Number

    @property
    def is_sparse(self) -> bool:
        """Whether so few elements differ that a place says something."""
        return self.differing <= 10 or 20 * self.differing < self.total

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON; numbers that JSON lacks become "nan", "inf", "-inf" and complex ones text."""
        return {
            "differing": self.differing,
            "total": self.total,
            "max_abs": _plain_number(self.max_abs),
            "max_rel": _plain_number(self.max_rel),
            "index": list(self.index),
            "old": _plain_number(self.old),
            "new": _plain_number(self.new),
        }


def compare_values(old: Tensor, new: Tensor) -> Values | None:
    """Compare two tensors of one shape bit for bit; NaN equals NaN, and 0.0 and -0.0 differ.

    Two dtypes are compared by value instead, in a type that holds both. Needs memory for a few pieces of a
    few thousand elements, and for a copy of a tensor that is not contiguous.

    Returns:
        None if they are equal.
    """
    old, new = _strided(old), _strided(new)
    if old.dtype == new.dtype and old.device == new.device and torch.equal(_bits(old), _bits(new)):
        return None
    tally = _Tally()
    for start, x, y in _pieces(old, new):
        where, x, y = _differing(x, y)
        if len(where):
            tally.add(start, where, x, y)
    if not tally.differing:
        return None
    there: list[Number] = [tally.old, tally.new]
    if old.dtype == new.dtype == torch.bool:
        there = list(map(bool, there))
    return Values(tally.differing, old.numel(), tally.max_abs, tally.max_rel, _index(tally.position, old.shape), *there)


def _index(position: int, shape: Sequence[int]) -> tuple[int, ...]:
    found = []
    for size in reversed(shape):
        position, place = divmod(position, size)
        found.append(place)
    return tuple(reversed(found))


def sketch(sample: Tensor) -> tuple[int, ...]:
    """What a sample of a tensor holds, alike in every precision: rounded to bfloat16, as whole numbers."""
    sample = _strided(sample).reshape(-1).cpu()
    if sample.is_complex():
        sample = torch.view_as_real(sample).reshape(-1)
    if sample.is_floating_point():
        sample = sample.to(torch.bfloat16).view(torch.int16)
    return tuple(sample.tolist())


class _Tally:
    """Sums over the pieces of a tensor."""

    def __init__(self) -> None:
        self.differing = 0
        self.position = -1
        self.max_abs = -1.0
        self.max_rel = 0.0
        self.old: Number = 0
        self.new: Number = 0

    def add(self, start: int, where: Tensor, x: Tensor, y: Tensor) -> None:
        self.differing += len(where)
        distance = _distance(x, y)
        relative = distance / torch.maximum(_magnitude(x), _magnitude(y))
        worst = int(distance.argmax())
        largest = float(distance[worst])
        if not math.isfinite(largest):
            relative = torch.where(distance.isfinite(), relative, torch.inf)
        self.max_rel = max(self.max_rel, float(relative.nan_to_num_(0.0, math.inf).max()))
        if math.isnan(self.max_abs) or largest <= self.max_abs:
            return
        self.max_abs = largest
        self.position = start + int(where[worst])
        self.old, self.new = x[worst].item(), y[worst].item()


def _distance(x: Tensor, y: Tensor) -> Tensor:
    if x.is_complex() or y.is_complex():
        return (x - y).abs()
    rough = (x.double() - y.double()).abs_()
    if x.is_floating_point() or y.is_floating_point():
        return rough
    return torch.where(rough < 2.0**53, (x.long() - y.long()).abs().double(), rough)


def _magnitude(x: Tensor) -> Tensor:
    return x.abs() if x.is_complex() else x.double().abs()


def _differing(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Positions where two flat pieces differ, and the elements there, widened."""
    if x.dtype == y.dtype:
        unequal = _bits(x) != _bits(y)
        where = (unequal.any(1) if unequal.ndim > 1 else unequal).nonzero().squeeze(1)
        if len(where) < len(x):
            x, y = _taken(x, where), _taken(y, where)
        x, y = _widened(x), _widened(y)
        same = x.isnan() & y.isnan()
    else:
        x, y = _widened(x), _widened(y)
        where = torch.arange(len(x))
        same = (x == y) | (x.isnan() & y.isnan())
    if not same.any():
        return where, x, y
    return where[~same], x[~same], y[~same]


def _taken(x: Tensor, where: Tensor) -> Tensor:
    return x[where] if x.is_complex() else _bits(x)[where].view(x.dtype)


def _widened(x: Tensor) -> Tensor:
    if x.is_complex():
        return x.to(torch.complex128)
    if x.is_floating_point():
        return x.double()
    return x if x.dtype == torch.uint64 else x.long()


def _bits(x: Tensor) -> Tensor:
    if x.is_complex():
        x = torch.view_as_real(x)
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def _pieces(old: Tensor, new: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    old, new = old.reshape(-1), new.reshape(-1)
    for start in range(0, len(old), PIECE):
        yield start, old[start : start + PIECE].cpu(), new[start : start + PIECE].cpu()


def _strided(tensor: Tensor) -> Tensor:
    """The same elements as an ordinary tensor without history."""
    tensor = tensor.detach()
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    elif tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    return tensor.resolve_conj().resolve_neg()


def _plain_number(value: Number) -> bool | int | float | str:
    if isinstance(value, complex):
        return str(value)
    return value if math.isfinite(value) else str(value)
