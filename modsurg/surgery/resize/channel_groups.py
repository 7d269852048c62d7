"""Groups of channels that can only come and go together, and which of them stay."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import lcm
from typing import Literal, TypeAlias

import torch
from torch import nn

from modsurg.errors import ResizeError, counted, listed
from modsurg.tracing.channels import Channels, Leaf
from modsurg.tracing.labels import Dim
from modsurg.tree.walk import Tree


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """One dimension of one tensor that is part of a group.

    Attributes:
        path: Of the module.
        name: Of the parameter or buffer.
        tensor: The parameter or buffer.
        dim: The dimension.
        channel: For each place of the dimension the channel that it belongs to, -1 for none.
        reads: Whether the channels are inputs here.
    """

    path: str
    name: str
    tensor: torch.Tensor
    dim: int
    channel: torch.Tensor
    reads: bool


@dataclass(frozen=True, slots=True, eq=False)
class ChannelGroup:
    """Everything that changes when a size of a layer does.

    Attributes:
        path: The layer.
        size: The name of its size, such as `"out_channels"`.
        channels: How many channels there are.
        step: How many of them come and go at once: the size of a head, of a group.
        members: Each dimension of each tensor that is part of it.
        spanned: Operations that run over all the channels at once, as norms do: what stays is then not the same.
    """

    path: str
    size: str
    channels: int
    step: int
    members: tuple[Member, ...]
    spanned: tuple[str, ...] = ()

    def __repr__(self) -> str:
        step = f", {self.step} at once" if self.step > 1 else ""
        lines = [f"{self.path}  {self.size} {self.channels}{step}"]
        tensors: dict[str, list[str]] = {}
        for each in self.members:
            tensors.setdefault(each.path, []).append(f"{each.name}[{each.dim}]" + (" reads" if each.reads else ""))
        wide = max((len(path) for path in tensors), default=0)
        lines += [f"  {path:{wide}}  {', '.join(names)}" for path, names in tensors.items()]
        return "\n".join(lines + [f"  not exact: {each}" for each in self.spanned])


Keep: TypeAlias = Literal["first", "l1", "l2"] | Sequence[int] | torch.Tensor | Callable[[ChannelGroup], torch.Tensor]


@dataclass(slots=True)
class Widths:
    """The channels of a model, and how many of each are to be there.

    Attributes:
        tree: The model.
        holders: Which modules hold each tensor, by its `id`, and the name there.
        channels: From one run of it.
        now: For each set of labels how often its channels are there now: 0 when they are gone.
        planned: How often they are to be there.
    """

    tree: Tree
    holders: Mapping[int, list[tuple[nn.Module, str]]]
    channels: Channels
    now: torch.Tensor
    planned: torch.Tensor
    _dims: list[tuple[Leaf, int]] = field(default_factory=list)
    _sorted: tuple[torch.Tensor, torch.Tensor] | None = None

    def sets(self, leaf: Leaf, dim: int) -> torch.Tensor:
        """The set of each place of a dimension of a parameter, as it is now."""
        sets = self.channels.sets[self.channels.leaves[leaf][dim][0].ids]
        return sets[places(sets, self.now)[0]]

    def size(self, dim: Dim) -> int:
        """The size that a dimension is to have."""
        total = 1
        for factor in dim:
            known = factor.ids is not None
            total *= int(self.planned[self.channels.sets[factor.ids]].sum()) if known else factor.size
        return total

    def holding(self, sets: torch.Tensor) -> list[tuple[Leaf, int]]:
        """The dimensions of parameters that have a place in one of these sets."""
        if self._sorted is None:
            every = [(leaf, n, dim[0].ids) for leaf, dims in self.channels.leaves.items() for n, dim in enumerate(dims)]
            self._dims = [(leaf, n) for leaf, n, _ in every]
            of = torch.cat(
                [torch.full((len(ids),), number) for number, (*_, ids) in enumerate(every) if ids is not None]
            )
            values = self.channels.sets[torch.cat([ids for *_, ids in every if ids is not None])]
            order = values.argsort(stable=True)
            self._sorted = (values[order], of[order])
        values, of = self._sorted
        sets = _distinct(sets)[0]
        left, right = torch.searchsorted(values, sets), torch.searchsorted(values, sets, right=True)
        counts = right - left
        found = torch.arange(int(counts.sum())) + (left - counts.cumsum(0) + counts).repeat_interleave(counts)
        return [self._dims[number] for number in sorted(set(of[found].tolist()))]


def places(sets: torch.Tensor, copies: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The places of a dimension that are there, and which copy each is: new ones come after those they are like."""
    times = copies[sets]
    if int(times.max()) <= 1:
        there = times.nonzero().flatten()
        return there, torch.zeros_like(there)
    where, copy = [], []
    start = 0
    for run in torch.unique_consecutive(sets, return_counts=True)[1].tolist():
        for number in range(int(times[start])):
            where.append(torch.arange(start, start + run))
            copy.append(torch.full((run,), number))
        start += run
    return torch.cat(where), torch.cat(copy)


def find_group(widths: Widths, path: str, size: str, leaf: Leaf, dim: int) -> ChannelGroup:
    """Find what belongs to the channels of one dimension of a parameter.

    Raises:
        ResizeError: They can't change, or an operation of which nothing is known uses them.
    """
    channels = widths.channels
    here = widths.sets(leaf, dim)
    own = _distinct(here)[0]
    refused = [channels.refused[n] for n in own.tolist() if n in channels.refused]
    if refused:
        raise ResizeError(f'"{path}": its {size} can\'t be followed through {refused[0]}, an operation without a rule.')
    if channels.fixed in own:
        raise ResizeError(
            f'"{path}": its {size} can\'t change: they are the channels of the input, or a size that the code of the '
            "model fixes."
        )
    position = torch.full((len(channels.sets),), -1)
    first = _first_places(here, own)
    position[own] = first
    members = []
    for (where, name), n in widths.holding(own):
        tensor = getattr(widths.tree.modules[where], name)
        channel = position[widths.sets((where, name), n)]
        members.append(Member(where, name, tensor, n, channel, n in channels.reads[where, name]))
    weights = torch.bincount(torch.searchsorted(own, here))
    spanned = sorted({channels.spanned[n] for n in own.tolist() if n in channels.spanned})
    return ChannelGroup(path, size, len(here), int(weights.max()), tuple(members), tuple(spanned))


def _distinct(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each value once, in order; which of them each is; how often each is there."""
    found: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = values.unique(return_inverse=True, return_counts=True)  # type: ignore[no-untyped-call]  # torch's own
    return found


def _first_places(here: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Where each set first is."""
    first = torch.full((len(own),), len(here))
    return first.scatter_reduce_(0, torch.searchsorted(own, here), torch.arange(len(here)), "amin")


def choose_channels(widths: Widths, group: ChannelGroup, here: torch.Tensor, size: int, keep: Keep) -> None:
    """Let a group have another size: take away those that count least, or put new ones behind the last.

    Args:
        widths: Takes note of it as planned.
        group: The group.
        here: The set of each channel.
        size: How many channels there are to be.
        keep: Which of them stay.

    Raises:
        ResizeError: `keep` gives something else than was asked for, or so many can't be.
    """
    own, inverse, weights = _distinct(here)
    if size > len(here):
        last = int(here[-1])
        widths.planned[last] += (size - len(here)) // int(weights[inverse[-1]] // widths.planned[last])
        return
    scores = torch.zeros(len(own), dtype=torch.float64).index_add_(0, inverse, channel_scores(group, keep, size))
    order = (-scores / weights).argsort(stable=True) if keep != "first" else _first_places(here, own).argsort()
    left, chosen = size, []
    for number in order.tolist():
        if int(weights[number]) <= left:
            left -= int(weights[number])
            chosen.append(number)
    if left:
        steps = listed([str(weight) for weight in sorted(set(weights.tolist()))], 3)
        raise ResizeError(
            f'"{group.path}": {group.size} can be {size - left}, not {size}: {steps} channels come and go at once.'
        )
    stay = torch.zeros(len(own), dtype=torch.long)
    stay[chosen] = 1
    widths.planned[own] *= stay


def channel_scores(group: ChannelGroup, keep: Keep, size: int) -> torch.Tensor:
    """How much each channel counts; the highest stay."""
    if isinstance(keep, str):
        if keep not in ("first", "l1", "l2"):
            raise ResizeError(f'keep={keep!r} is not "first", "l1", "l2", a list of channels or a function.')
        return torch.zeros(group.channels, dtype=torch.float64) if keep == "first" else _norms(group, keep)
    given = keep(group) if callable(keep) else keep
    values = torch.as_tensor(given).detach().double().cpu().flatten()
    if callable(keep):
        if len(values) != group.channels:
            raise ResizeError(f"keep= gave {len(values)} scores for the {group.channels} channels of {group.path}.")
        return values
    indices = values.long()
    if (
        len(indices) != size
        or len(set(indices.tolist())) != size
        or indices.min() < 0
        or indices.max() >= group.channels
    ):
        raise ResizeError(
            f"keep= must list {counted(size, 'channel', 'channels')} of {group.path}, each once, from 0 to "
            f"{group.channels - 1}; it lists {len(indices)}."
        )
    chosen = torch.zeros(group.channels, dtype=torch.float64)
    chosen[indices] = 1
    return chosen


def _norms(group: ChannelGroup, keep: str) -> torch.Tensor:
    """The size of the weights of each channel, summed over all parameters of the group."""
    total = torch.zeros(group.channels, dtype=torch.float64)
    for each in group.members:
        if isinstance(each.tensor, nn.Parameter) and not each.tensor.is_meta:
            weight = each.tensor.detach()
            values = weight.abs() if keep == "l1" else weight.square()
            others = [n for n in range(weight.dim()) if n != each.dim]
            sums = values.sum(others) if others else values
            mine = each.channel >= 0
            total.index_add_(0, each.channel[mine], sums.double().cpu()[mine])
    return total


def target_size(group: ChannelGroup, value: object, multiple: int | None) -> int:
    """The size that was asked for, as a number of channels that can be.

    Raises:
        ResizeError: It is not a size, or not a multiple of what comes and goes at once.
    """
    whole, share = isinstance(value, int) and not isinstance(value, bool), isinstance(value, float) and value <= 1
    if not isinstance(value, (int, float)) or not (whole or share) or value <= 0:
        raise ResizeError(f'"{group.path}": {group.size}={value!r} must be a positive integer, or a share such as 0.5.')
    step = lcm(group.step, multiple or 1)
    size = value if isinstance(value, int) else value * group.channels
    rounded = max(1, round(size / step)) * step
    if isinstance(value, int) and multiple is None and rounded != value:
        raise ResizeError(
            f'"{group.path}": {group.size}={value} is not a multiple of {step}, which come and go at once (a head, a '
            f"group). Try: {group.size}={rounded}."
        )
    return int(rounded)
