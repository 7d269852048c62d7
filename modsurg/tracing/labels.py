"""Labels of channels: which places of which dimensions belong together, and can only come and go together.

Each place of a dimension of a parameter has a label, a whole number. Operations unite labels: the sum of two tensors
unites theirs place by place. Label 0 is that of everything that can't change, as the colours of the input.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

import torch

FIXED = 0


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """A part of a dimension. A dimension is a product of factors: flattened, `(c, h, w)` has three.

    Attributes:
        size: Number of places.
        ids: The label of each place, or None where the places are not channels.
        fixed: Without labels: whether its size is a fact (a height), or follows whatever it meets (`torch.zeros`).
    """

    size: int
    ids: torch.Tensor | None = None
    fixed: bool = True


Dim = tuple[Factor, ...]


@dataclass(frozen=True, slots=True)
class _Split:
    ids: torch.Tensor
    parts: tuple[Factor, ...]
    whole_groups: bool

    def free(self, roots: torch.Tensor, fixed: torch.Tensor) -> list[int]:
        """The parts that can change."""
        if (roots[self.ids] == fixed).all():
            return []
        ids = [part.ids for part in self.parts]
        return [n for n, each in enumerate(ids) if each is not None and not (roots[each] == fixed).any()]


class Labels:
    """Gives out labels, and takes note of what belongs together.

    Attributes:
        refused: Labels that met an operation of which nothing is known, and the operation.
        spanned: Labels over which an operation runs (a mean, a norm), and the operation.
        heads: Labels of the dimensions over which products of activations run in parallel.
        read: `id` of the labels by which parameters read their input.
        ties: Dimensions that get their size from one number in the code of the model.
    """

    def __init__(self) -> None:
        self.count = 1
        self.refused: list[tuple[torch.Tensor, str]] = []
        self.spanned: list[tuple[torch.Tensor, str]] = []
        self.heads: list[torch.Tensor] = []
        self.read: set[int] = set()
        self.ties: list[tuple[Dim, Dim]] = []
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._splits: dict[tuple[int, tuple[int, ...]], _Split] = {}

    def fresh(self, size: int) -> Factor:
        """Give new labels to `size` places."""
        self.count += size
        return Factor(size, torch.arange(self.count - size, self.count))

    def unite(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Let the labels at the same places belong together."""
        if a is not b:
            self._pairs.append((a, b))

    def fix(self, dim: Dim) -> None:
        """Let the places of a dimension stay as they are."""
        for factor in dim:
            if factor.ids is not None:
                self.unite(factor.ids, torch.zeros_like(factor.ids))

    def refuse(self, dims: Iterable[Dim], operation: str) -> None:
        """Take note that the labels of these dimensions met an unknown operation."""
        self.refused += [(f.ids, operation) for dim in dims for f in dim if f.ids is not None]

    def span(self, dims: Iterable[Dim], operation: str) -> None:
        """Take note that an operation runs over all the places of these dimensions at once."""
        self.spanned += [(f.ids, operation) for dim in dims for f in dim if f.ids is not None]

    def split(self, factor: Factor, sizes: tuple[int, ...], whole_groups: bool = False) -> tuple[Factor, ...]:
        """Split a factor into a product of factors.

        Args:
            factor: Its size is the product of `sizes`.
            sizes: Of the parts.
            whole_groups: Whether the first part can change rather than the last, if both can.
        """
        if factor.ids is None:
            return tuple(Factor(size, None, factor.fixed) for size in sizes)
        if 1 in sizes:
            parts = iter(self.split(factor, tuple(s for s in sizes if s > 1), whole_groups) if factor.size > 1 else ())
            return tuple(Factor(1) if size == 1 else next(parts) for size in sizes)
        if len(sizes) == 1:
            return (factor,)
        key = (id(factor.ids), sizes)
        known = self._splits.get(key)
        if known is None or (whole_groups and not known.whole_groups):
            parts_of = known.parts if known else tuple(self.fresh(size) for size in sizes)
            known = self._splits[key] = _Split(factor.ids, parts_of, whole_groups)
        return known.parts

    def flatten(self, dim: Dim) -> torch.Tensor | None:
        """Give the label of each place of a dimension; None where no place has one."""
        labelled = [f for f in dim if f.ids is not None]
        if not labelled:
            return None
        if len(labelled) == 1:
            return spread(dim, dim.index(labelled[0]))
        whole = self.fresh(prod(f.size for f in dim))
        assert whole.ids is not None
        sizes = tuple(f.size for f in dim)
        parts = self.split(whole, sizes)
        for part, factor in zip(parts, dim, strict=True):
            self._unify_factors(part, factor)
        return whole.ids

    def places(self, dim: Dim) -> torch.Tensor:
        """Give a label to each place of a dimension, new ones where there are none and the size is not fixed."""
        ids = self.flatten(dim)
        if ids is not None:
            return ids
        size = prod(f.size for f in dim)
        if any(f.fixed for f in dim) or size == 1:
            return torch.zeros(size, dtype=torch.long)
        fresh = self.fresh(size).ids
        assert fresh is not None
        return fresh

    def unify(self, a: Dim, b: Dim) -> Dim:
        """Let two dimensions of one size belong together, place by place; returns the more telling one."""
        if a is b or not b:
            return a
        if not a:
            return b
        if not labelled(a) or not labelled(b):
            plain, other = (a, b) if not labelled(a) else (b, a)
            if any(f.fixed and f.size > 1 for f in plain):
                self.fix(other)
            return other
        if [f.size for f in a] == [f.size for f in b]:
            return tuple(self._unify_factors(one, two) for one, two in zip(a, b, strict=True))
        many = sum(f.ids is not None for f in a) > 1 or sum(f.ids is not None for f in b) > 1
        if many:
            large = [tuple(f for f in dim if f.size > 1) for dim in (a, b)]
            common = _common_sizes(*([f.size for f in dim] for dim in large))
            if common is not None:
                fine = [self._refine(dim, common) for dim in large]
                for one, two in zip(*fine, strict=True):
                    self._unify_factors(one, two)
                return a
        one_ids, two_ids = self.flatten(a), self.flatten(b)
        assert one_ids is not None
        assert two_ids is not None
        self.unite(one_ids, two_ids)
        return a

    def _unify_factors(self, a: Factor, b: Factor) -> Factor:
        if a.ids is not None and b.ids is not None:
            self.unite(a.ids, b.ids)
            return a
        plain, other = (a, b) if a.ids is None else (b, a)
        if plain.fixed and plain.size > 1:
            self.fix((other,))
        return other

    def _refine(self, dim: Dim, sizes: list[int]) -> list[Factor]:
        fine: list[Factor] = []
        left = list(sizes)
        for factor in dim:
            mine: list[int] = []
            while prod(mine) < factor.size:
                mine.append(left.pop(0))
            fine += self.split(factor, tuple(mine))
        return fine

    def resolve(self) -> torch.Tensor:
        """Give the number of the set that each label belongs to; that of label 0 is what can't change."""
        roots = self._decide_splits()
        for a, b in self.ties:
            one, two = flat_sets(a, roots), flat_sets(b, roots)
            if not torch.equal(one.sort().values, two.sort().values):
                self.unite(one, two)
        return self._roots()

    def _decide_splits(self) -> torch.Tensor:
        """Choose for each split which part can change; first where there is no choice, last where there is no hint."""
        roots = self._roots()
        waiting = list(self._splits.values())
        rules = [_only_choice, _parallel, _whole_groups, _last]
        while waiting:
            fixed, heads = roots[FIXED], self._flags(roots)
            for rule in rules:
                decided = {}
                for number, split in enumerate(waiting):
                    chosen = rule(split, split.free(roots, fixed), roots, heads)
                    if chosen is not None:
                        decided[number] = chosen
                        if rule is _last:
                            break
                if decided:
                    break
            for number, chosen in decided.items():
                self._decide(waiting[number], chosen)
            waiting = [split for number, split in enumerate(waiting) if number not in decided]
            roots = self._roots()
        return roots

    def _decide(self, split: _Split, chosen: int) -> None:
        """Let one part change with the whole (-1: none), and the others stay."""
        for number, part in enumerate(split.parts):
            if number == chosen:
                self.unite(split.ids, spread(split.parts, chosen))
            else:
                self.fix((part,))
        if chosen < 0:
            self.unite(split.ids, torch.zeros_like(split.ids))

    def _flags(self, roots: torch.Tensor) -> torch.Tensor:
        flags = torch.zeros(self.count, dtype=torch.bool)
        for ids in self.heads:
            flags[roots[ids]] = True
        return flags

    def _roots(self) -> torch.Tensor:
        if not self._pairs:
            return torch.arange(self.count)
        a, b = (torch.cat([pair[side] for pair in self._pairs]) for side in (0, 1))
        roots = _components(self.count, a, b)
        self._pairs = [(torch.arange(self.count), roots)]
        return roots


def labelled(dim: Dim) -> bool:
    """Whether any place of a dimension has a label."""
    return any(f.ids is not None for f in dim)


def spread(dim: Dim, number: int) -> torch.Tensor:
    """The labels of one factor at each place of the whole dimension."""
    ids = dim[number].ids
    assert ids is not None
    outer, inner = prod(f.size for f in dim[:number]), prod(f.size for f in dim[number + 1 :])
    if outer == inner == 1:
        return ids
    return ids.repeat_interleave(inner).repeat(outer)


def flat_sets(dim: Dim, sets: torch.Tensor) -> torch.Tensor:
    """The set of each place of a dimension: of its factors at most one can change."""
    result = torch.full((prod(f.size for f in dim),), int(sets[FIXED]))
    for number, factor in enumerate(dim):
        if factor.ids is not None:
            mine = sets[spread(dim, number)]
            result = torch.where(mine == sets[FIXED], result, mine)
    return result


def _only_choice(split: _Split, free: list[int], roots: torch.Tensor, heads: torch.Tensor) -> int | None:
    return None if len(free) > 1 else free[0] if free else -1


def _parallel(split: _Split, free: list[int], roots: torch.Tensor, heads: torch.Tensor) -> int | None:
    """Attention goes by whole heads."""
    for number in free:
        ids = split.parts[number].ids
        if ids is not None and heads[roots[ids]].any():
            return number
    return None


def _whole_groups(split: _Split, free: list[int], roots: torch.Tensor, heads: torch.Tensor) -> int | None:
    return free[0] if split.whole_groups else None


def _last(split: _Split, free: list[int], roots: torch.Tensor, heads: torch.Tensor) -> int | None:
    """The number of groups stands in the code of whoever shuffles channels, so the groups get smaller."""
    return free[-1]


def _common_sizes(a: Sequence[int], b: Sequence[int]) -> list[int] | None:
    """The sizes into which both products can be split."""
    left, right, common = list(a), list(b), []
    while left and right:
        one, two = left.pop(0), right.pop(0)
        small, large = min(one, two), max(one, two)
        if large % small:
            return None
        common.append(small)
        if large > small:
            (left if one > two else right).insert(0, large // small)
    return common


def _components(count: int, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The smallest label of each connected set."""
    roots = torch.arange(count)
    while True:
        left, right = roots[a], roots[b]
        differ = left != right
        if not differ.any():
            return roots
        a, b, left, right = a[differ], b[differ], left[differ], right[differ]
        low, high = torch.minimum(left, right), torch.maximum(left, right)
        roots.scatter_reduce_(0, high, low, "amin")
        while True:
            shorter = roots[roots]
            if torch.equal(shorter, roots):
                break
            roots = shorter
