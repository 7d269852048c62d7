"""Which group of which optimizer a new parameter belongs to."""

from bisect import bisect
from collections.abc import Iterable, Iterator, Sequence, Set
from typing import NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer, SparseAdam

Named = Sequence[tuple[str, nn.Parameter]]
Replaced = Sequence[tuple[nn.Module, nn.Module, str]]


class Place(NamedTuple):
    """One group: the numbers of its optimizer and of the group in it."""

    optimizer: int
    group: int


def places(optimizers: Sequence[Optimizer]) -> dict[int, Place]:
    """Where each parameter is, by its `id`."""
    return {
        id(parameter): Place(i, j)
        for i, optimizer in enumerate(optimizers)
        for j, group in enumerate(optimizer.param_groups)
        for parameter in group["params"]
    }


def first_names(named: Named) -> dict[int, tuple[int, str, nn.Parameter]]:
    """Position, first name and parameter, by the parameter's `id`, in the order of the model."""
    first: dict[int, tuple[int, str, nn.Parameter]] = {}
    for name, parameter in named:
        if id(parameter) not in first:
            first[id(parameter)] = (len(first), name, parameter)
    return first


def admits(optimizer: Optimizer, parameter: torch.Tensor) -> bool:
    """Whether the optimizer can step a parameter of that many dimensions: Muon takes matrices only."""
    return parameter.ndim == 2 or not isinstance(optimizer, getattr(torch.optim, "Muon", ()))


class Ancestry:
    """Which parameters stood where a new one stands now.

    Args:
        replaced: Old module, new module, path.
        before: The model's parameters before.
        gone: `id` of those that left.
    """

    def __init__(self, replaced: Replaced, before: Named, gone: Set[int]) -> None:
        self._names = {name: parameter for name, parameter in before if id(parameter) in gone}
        self._olds: dict[int, list[tuple[str, list[tuple[str, nn.Parameter]]]]] = {}
        for old, new, _ in replaced:
            if (old._parameters or old._modules) and (new._parameters or new._modules):
                olds = list(old.named_parameters())
                for name, parameter in new.named_parameters(remove_duplicate=False):
                    self._olds.setdefault(id(parameter), []).append((name, olds))

    def of(self, name: str, parameter: nn.Parameter) -> Iterator[tuple[bool, nn.Parameter]]:
        """Candidates, the likeliest first, and whether it stood at the same name; those of candidates in their turn."""
        seen = {id(parameter)}
        waiting = [(True, parameter)]
        while waiting:
            same, youngest = waiting.pop(0)
            found = list(self._parents(youngest))
            if youngest is parameter and name in self._names:
                found.append((True, self._names[name]))
            for also, older in found:
                if id(older) not in seen:
                    seen.add(id(older))
                    waiting.append((same and also, older))
                    yield same and also, older

    def _parents(self, parameter: nn.Parameter) -> Iterator[tuple[bool, nn.Parameter]]:
        for name, every in self._olds.get(id(parameter), ()):
            olds = [(n, p) for n, p in every if _kind(p) == _kind(parameter)]
            yield from ((True, p) for n, p in olds if n == name)
            yield from ((False, p) for n, p in olds if n != name and _leaf(n) == _leaf(name))
            yield from ((False, p) for n, p in olds if n != name and _leaf(n) != _leaf(name))


class Neighbours:
    """The parameters that are in a group, to find the one nearest to a name.

    Nearest is: of the same kind (matrices; biases and the weights of norms), then under the longest common prefix, then
    with the same name there, then next to it in the model's order.
    """

    def __init__(self, held: Iterable[tuple[int, str, nn.Parameter]]) -> None:
        self._found: dict[tuple[object, ...], list[tuple[int, int]]] = {}
        for position, name, parameter in held:
            for prefix, tail in _splits(name):
                for key in _keys(prefix, tail, _kind(parameter)):
                    self._found.setdefault(key, []).append((position, id(parameter)))

    def nearest(self, position: int, name: str, parameter: nn.Parameter) -> int | None:
        """The `id` of the parameter in a group that is nearest to a new one; None where no parameter is."""
        splits = list(_splits(name))
        for number in (0, 1):
            for prefix, tail in reversed(splits):
                keys = _keys(prefix, tail, _kind(parameter))
                for key in keys[-1:] if number else keys[:-1]:
                    if found := self._found.get(key):
                        at = bisect(found, (position, 0))
                        return min(found[max(0, at - 1) : at + 1], key=lambda each: abs(each[0] - position))[1]
        return None


class Membership:
    """Finds the place of each new parameter.

    Args:
        optimizers: Those that follow.
        held: Where each parameter is, see `places`.
        before: The model's parameters before, `first_names`.
        after: The model's parameters now, `first_names`.
        ancestry: What new parameters stand for.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        held: dict[int, Place],
        before: dict[int, tuple[int, str, nn.Parameter]],
        after: dict[int, tuple[int, str, nn.Parameter]],
        ancestry: Ancestry,
    ) -> None:
        self._optimizers, self._held, self._ancestry = optimizers, held, ancestry
        self._before, self._after = before, after
        self._neighbours: dict[tuple[bool, bool], Neighbours] = {}

    def place(self, position: int, name: str, parameter: nn.Parameter) -> Place | None:
        """The group of what it replaces, or of its nearest neighbour; None for one that is not trained."""
        for same, older in self._ancestry.of(name, parameter):
            place = self._held.get(id(older))
            if place and (same or parameter.requires_grad) and self._fits(place, same, parameter):
                return place
        if not parameter.requires_grad:
            return None
        for gone in (False, True):
            nearest = self._index(parameter, gone).nearest(position, name, parameter)
            if nearest is not None:
                return self._held[nearest]
        groups = [Place(i, 0) for i, o in enumerate(self._optimizers) if o.param_groups and admits(o, parameter)]
        return groups[0] if len(groups) == 1 else None

    def _fits(self, place: Place, same: bool, parameter: nn.Parameter) -> bool:
        """SparseAdam takes what stood in the place of one of its own, no other, where another can have it."""
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


def _kind(parameter: torch.Tensor) -> bool:
    return parameter.ndim > 1


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """Prefix and the name below what stands right under it, from the shortest prefix to the longest."""
    segments = name.split(".")
    for depth in range(len(segments)):
        yield ".".join(segments[:depth]), ".".join(segments[depth + 1 :]) or segments[-1]


def _keys(prefix: str, tail: str, kind: bool) -> tuple[tuple[object, ...], ...]:
    return (prefix, kind, tail), (prefix, kind, "*", _leaf(tail)), (prefix, kind), (prefix,)
