"""The groups of an optimizer: which one a new parameter belongs to, and how its lists are rewritten."""

from bisect import bisect
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer, SparseAdam

Named = Sequence[tuple[str, nn.Parameter]]
Replaced = Sequence[tuple[nn.Module, nn.Module]]


@dataclass(frozen=True, slots=True)
class GroupIndex:
    """One group: the numbers of its optimizer and of the group in it."""

    optimizer: int
    group: int


@dataclass(frozen=True, slots=True)
class NamedParameter:
    """One parameter of a model: its position in module order, its first name, and itself."""

    position: int
    name: str
    parameter: nn.Parameter


NamedParameters = Mapping[int, NamedParameter]
"""NamedParameters by the `id` of the parameter, in the order of the model."""


def find_places(optimizers: Sequence[Optimizer]) -> dict[int, GroupIndex]:
    """Where each parameter is, by its `id`."""
    return {
        id(parameter): GroupIndex(i, j)
        for i, optimizer in enumerate(optimizers)
        for j, group in enumerate(optimizer.param_groups)
        for parameter in group["params"]
    }


def first_entries(named: Named) -> dict[int, NamedParameter]:
    """One entry for each parameter, under its first name."""
    first: dict[int, NamedParameter] = {}
    for name, parameter in named:
        if id(parameter) not in first:
            first[id(parameter)] = NamedParameter(len(first), name, parameter)
    return first


def admits(optimizer: Optimizer, parameter: torch.Tensor) -> bool:
    """Whether the optimizer can step a parameter of that many dimensions: Muon takes matrices only."""
    return parameter.ndim == 2 or not isinstance(optimizer, getattr(torch.optim, "Muon", ()))


class Ancestry:
    """Which parameters were where a new one is now.

    Args:
        replaced: Old module and new module.
        before: The model's parameters before.
        gone: `id` of those that left.
    """

    def __init__(self, replaced: Replaced, before: Named, gone: Set[int]) -> None:
        self._names = {name: parameter for name, parameter in before if id(parameter) in gone}
        self._olds: dict[int, list[tuple[str, list[tuple[str, nn.Parameter]]]]] = {}
        for old, new in replaced:
            if (old._parameters or old._modules) and (new._parameters or new._modules):
                olds = list(old.named_parameters())
                for name, parameter in new.named_parameters(remove_duplicate=False):
                    self._olds.setdefault(id(parameter), []).append((name, olds))

    def find(self, entry: NamedParameter) -> Iterator[tuple[bool, nn.Parameter]]:
        """Candidates, the likeliest first, and whether each had the same name; those of candidates in their turn."""
        seen = {id(entry.parameter)}
        waiting = [(True, entry.parameter)]
        while waiting:
            same, youngest = waiting.pop(0)
            found = list(self._parents(youngest))
            if youngest is entry.parameter and entry.name in self._names:
                found.append((True, self._names[entry.name]))
            for also, older in found:
                if id(older) not in seen:
                    seen.add(id(older))
                    waiting.append((same and also, older))
                    yield same and also, older

    def _parents(self, parameter: nn.Parameter) -> Iterator[tuple[bool, nn.Parameter]]:
        for name, every in self._olds.get(id(parameter), ()):
            olds = [(n, p) for n, p in every if _is_weight(p) == _is_weight(parameter)]
            yield from ((True, p) for n, p in olds if n == name)
            yield from ((False, p) for n, p in olds if n != name and _leaf(n) == _leaf(name))
            yield from ((False, p) for n, p in olds if n != name and _leaf(n) != _leaf(name))


class Neighbours:
    """The parameters that are in a group, in the order of the model.

    The one under the longest common path is then the last before or the first after a new one. Where another beside it
    has the name that the new one has there, that is meant.
    """

    def __init__(self, held: Iterable[NamedParameter]) -> None:
        self._all = sorted(held, key=attrgetter("position"))
        self._by_kind = {kind: [e for e in self._all if _is_weight(e.parameter) == kind] for kind in (False, True)}
        self._by_name = {entry.name: entry for entry in self._all}

    def find_nearest(self, entry: NamedParameter) -> int | None:
        """The `id` of the nearest: of the same kind (weights; biases and norms) if there is any; None without any."""
        kind = _is_weight(entry.parameter)
        held = self._by_kind[kind] or self._all
        if not held:
            return None
        at = bisect(held, entry.position, key=attrgetter("position"))
        nearest = max(held[max(0, at - 1) : at + 1], key=lambda each: _common(each.name, entry.name))
        depth = _common(nearest.name, entry.name)
        theirs, own = nearest.name.split("."), entry.name.split(".")
        twin = self._by_name.get(".".join([*theirs[: depth + 1], *own[depth + 1 :]]))
        if twin is not None and _is_weight(twin.parameter) == kind:
            nearest = twin
        return id(nearest.parameter)


class Membership:
    """Finds the group of each new parameter.

    Args:
        optimizers: Those that follow.
        held: Where each parameter is, see `find_places`.
        before: The model's parameters before.
        after: The model's parameters now.
        ancestry: What new parameters replace.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        held: dict[int, GroupIndex],
        before: NamedParameters,
        after: NamedParameters,
        ancestry: Ancestry,
    ) -> None:
        self._optimizers, self._held, self._ancestry = optimizers, held, ancestry
        self._before, self._after = before, after
        self._neighbours: dict[tuple[bool, bool], Neighbours] = {}

    def find_place(self, entry: NamedParameter) -> GroupIndex | None:
        """The group of what it replaces, or of its nearest neighbour; None for one that is not trained."""
        trains = entry.parameter.requires_grad
        for same, older in self._ancestry.find(entry):
            place = self._held.get(id(older))
            if place and (same or trains) and self._fits(place, same, entry.parameter):
                return place
        if not trains:
            return None
        for gone in (False, True):
            nearest = self._index(entry.parameter, gone).find_nearest(entry)
            if nearest is not None:
                return self._held[nearest]
        able = [i for i, o in enumerate(self._optimizers) if o.param_groups and admits(o, entry.parameter)]
        return GroupIndex(able[0], 0) if len(able) == 1 else None

    def _fits(self, place: GroupIndex, same: bool, parameter: nn.Parameter) -> bool:
        """SparseAdam takes what is in the place of one of its own, no other, where another can have it."""
        optimizer = self._optimizers[place.optimizer]
        alone = all(isinstance(each, SparseAdam) for each in self._optimizers)
        return admits(optimizer, parameter) and (same or alone or not isinstance(optimizer, SparseAdam))

    def _index(self, parameter: nn.Parameter, gone: bool) -> Neighbours:
        key = (parameter.ndim == 2, gone)
        if key not in self._neighbours:
            able = {i for i, each in enumerate(self._optimizers) if admits(each, parameter)}
            numbers = {i for i in able if not isinstance(self._optimizers[i], SparseAdam)} or able
            known = (self._before if gone else self._after).items()
            self._neighbours[key] = Neighbours(
                entry
                for identity, entry in known
                if identity in self._held and self._held[identity].optimizer in numbers
            )
        return self._neighbours[key]


def rewrite_group(
    group: dict[str, Any],
    entering: Sequence[NamedParameter],
    gone: Collection[int],
    before: NamedParameters,
    after: NamedParameters,
) -> None:
    """Let parameters leave and enter one group, and rename those that stay, where the group has names.

    The lists are changed in place: schedulers and LBFGS hold on to the same lists.

    Args:
        group: One of `optimizer.param_groups`.
        entering: What enters.
        gone: `id` of what leaves.
        before: The model's parameters under the names that the group has.
        after: The model's parameters now.
    """
    params: list[nn.Parameter] = group["params"]
    merged = _merge(params, entering, gone, after)
    if "param_names" in group:
        known: list[str] = group["param_names"]
        table = dict(zip(map(id, params), known, strict=True))
        owned = ((name, before[key].name) for key, name in table.items() if key in before)
        prefix = next((name.removesuffix(own) for name, own in owned if name.endswith(own)), "")
        known[:] = [prefix + after[id(p)].name if id(p) in after else table[id(p)] for p in merged]
    params[:] = merged


def _merge(
    params: list[nn.Parameter], entering: Sequence[NamedParameter], gone: Collection[int], after: NamedParameters
) -> list[nn.Parameter]:
    """In the model's order, if the group was in it; parameters of other models keep their predecessor."""
    staying = [parameter for parameter in params if id(parameter) not in gone]
    last = next((after[id(parameter)].position for parameter in staying if id(parameter) in after), -1)
    placed: list[tuple[int, nn.Parameter]] = []
    for parameter in staying:
        last = after[id(parameter)].position if id(parameter) in after else last
        placed.append((last, parameter))
    placed += [(entry.position, entry.parameter) for entry in entering]
    if all(one[0] <= two[0] for one, two in pairwise(placed[: len(staying)])):
        placed.sort(key=lambda each: each[0])
    return [parameter for _, parameter in placed]


def _is_weight(parameter: torch.Tensor) -> bool:
    return parameter.ndim > 1


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _common(one: str, two: str) -> int:
    """How many segments both paths begin with."""
    pairs = zip(one.split("."), two.split("."), strict=False)
    return next((depth for depth, (a, b) in enumerate(pairs) if a != b), 0)
