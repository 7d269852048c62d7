"""How the elements of two tensors differ: counted, measured and located, a piece at a time."""

import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Generic, TypeVar

import torch
from torch import Tensor

PIECE = 1 << 15
SMALL = 1 << 10
MANY = 256

_PAIRS = getattr(torch, "float4_e2m1fn_x2", None)  # torch 2.8 and later; it does no arithmetic

Number = bool | int | float | complex
Key = TypeVar("Key", bound=Hashable)


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


def compare_values(pairs: Iterable[tuple[Key, Tensor, Tensor]]) -> Iterator[tuple[Key, Values]]:
    """Compare pairs of tensors of one shape bit for bit; NaN equals NaN, and 0.0 and -0.0 differ.

    Two dtypes are compared by value instead, in a type that holds both. Small tensors that differ wait and are measured
    many at a time. Needs memory for a few pieces of some ten thousand elements, for those that wait, and for a copy of
    a tensor that is not contiguous; a large pair is given back before the next is taken.

    Args:
        pairs: Each with a name of its own.

    Yields:
        The name of each pair that differs, and how; in no order.
    """
    waiting: dict[tuple[torch.dtype, torch.dtype], list[_Tally[Key]]] = {}
    for key, old, new in pairs:
        tally = _tally(key, old, new)
        del old, new
        if tally is not None and tally.total > SMALL:
            yield from _measured([tally])
        elif tally is not None:
            dtypes = (tally.old.dtype, tally.new.dtype)
            waiting.setdefault(dtypes, []).append(tally)
            if len(waiting[dtypes]) == MANY:
                yield from _measured(waiting.pop(dtypes))
        del tally
    for alike in waiting.values():
        yield from _measured(alike)


def _index(position: int, shape: Sequence[int]) -> tuple[int, ...]:
    found = []
    for size in reversed(shape):
        position, place = divmod(position, size)
        found.append(place)
    return tuple(reversed(found))


def sketches(samples: Sequence[Tensor]) -> list[tuple[int, ...]]:
    """What samples of tensors hold, alike in every precision: rounded to bfloat16, as whole numbers."""
    found: list[tuple[int, ...]] = [()] * len(samples)
    kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    flat = [_strided(sample).reshape(-1) for sample in samples]
    for place, sample in enumerate(flat):
        kinds.setdefault((sample.dtype, sample.device), []).append(place)
    for places in kinds.values():
        values = torch.cat([flat[place] for place in places]).cpu()
        each = 1
        if values.is_complex():
            values, each = torch.view_as_real(values).reshape(-1), 2
        if values.is_floating_point():
            values = values.to(torch.bfloat16).view(torch.int16)
        numbers, start = values.tolist(), 0
        for place in places:
            end = start + each * len(flat[place])
            found[place] = tuple(numbers[start:end])
            start = end
    return found


@dataclass(slots=True)
class _Tally(Generic[Key]):
    """Two flat tensors, and sums over what differs in them."""

    key: Key
    old: Tensor
    new: Tensor
    shape: tuple[int, ...]
    total: int
    differing: int = 0
    position: int = -1
    max_abs: float = -1.0
    max_rel: float = 0.0
    there: tuple[Number, Number] = (0, 0)

    def add(self, count: int, largest: float, relative: float, position: int, there: tuple[Number, Number]) -> None:
        self.differing += count
        self.max_rel = max(self.max_rel, relative)
        if not math.isnan(self.max_abs) and not largest <= self.max_abs:
            self.max_abs, self.position, self.there = largest, position, there

    def values(self) -> Values:
        old, new = self.there
        if self.old.dtype == self.new.dtype == torch.bool:
            old, new = bool(old), bool(new)
        index = _index(self.position, self.shape)
        return Values(self.differing, self.total, self.max_abs, self.max_rel, index, old, new)


def _tally(key: Key, old: Tensor, new: Tensor) -> _Tally[Key] | None:
    """A tally of the two, None if they are equal at first sight."""
    old, new = _strided(old), _strided(new)
    if old.dtype == new.dtype and old.device == new.device and torch.equal(_bits(old), _bits(new)):
        return None
    return _Tally(key, old.reshape(-1), new.reshape(-1), tuple(old.shape), old.numel())


def _measured(tallies: Sequence[_Tally[Key]]) -> Iterator[tuple[Key, Values]]:
    """How the pairs of the same two dtypes differ, those that do."""
    old, new = _joined([tally.old for tally in tallies]), _joined([tally.new for tally in tallies])
    ends = torch.tensor(list(accumulate(tally.total for tally in tallies)), device="cpu")
    for start in range(0, len(old), PIECE):
        where, x, y = _differing(old[start : start + PIECE].cpu(), new[start : start + PIECE].cpu())
        if len(where):
            _add(tallies, ends, where + start, x, y)
    for tally in tallies:
        if tally.differing:
            yield tally.key, tally.values()


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat([part.cpu() for part in parts])


def _add(tallies: Sequence[_Tally[Key]], ends: Tensor, where: Tensor, x: Tensor, y: Tensor) -> None:
    """Add what differs in a piece of the joined tensors, each of which ends at one of `ends`, to their tallies."""
    distance = _distance(x, y)
    relative = distance / torch.maximum(_magnitude(x), _magnitude(y))
    if not math.isfinite(float(distance.max())):
        relative = torch.where(distance.isfinite(), relative, torch.inf)
    relative.nan_to_num_(0.0, math.inf)
    cuts = [0, *torch.searchsorted(where, ends).tolist()]
    parts = [(place, a, b) for place, (a, b) in enumerate(pairwise(cuts)) if a < b]
    worst = torch.tensor([a + int(distance[a:b].argmax()) for _, a, b in parts], device="cpu")
    found = zip(
        distance[worst].tolist(),
        [float(relative[a:b].max()) for _, a, b in parts],
        where[worst].tolist(),
        zip(_taken(x, worst).tolist(), _taken(y, worst).tolist(), strict=True),
        strict=True,
    )
    for (place, a, b), (largest, ratio, position, there) in zip(parts, found, strict=True):
        tally = tallies[place]
        tally.add(b - a, largest, ratio, position - int(ends[place]) + tally.total, there)


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
        where = torch.arange(len(x), device="cpu")
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


def _strided(tensor: Tensor) -> Tensor:
    """The same elements as an ordinary tensor without history; pairs of float4 values as bytes."""
    tensor = tensor.detach()
    if tensor.dtype == _PAIRS:
        tensor = tensor.view(torch.uint8)
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    elif tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    return tensor.resolve_conj().resolve_neg() if tensor.is_conj() or tensor.is_neg() else tensor


def _plain_number(value: Number) -> bool | int | float | str:
    if isinstance(value, complex):
        return str(value)
    return value if math.isfinite(value) else str(value)
