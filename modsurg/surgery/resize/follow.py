"""Resize layers, and let everything follow that is coupled to their channels."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from modsurg.errors import ExampleError, ResizeError, counted, listed
from modsurg.surgery.journal import Journal
from modsurg.surgery.resize.axes import Axes, Axis
from modsurg.surgery.resize.channel_groups import (
    ChannelGroup,
    Keep,
    Widths,
    choose_channels,
    find_group,
    places,
    target_size,
)
from modsurg.surgery.resize.checks import refuse_rewritten, refuse_shared_memory, refuse_values
from modsurg.surgery.resize.recorded import describe_plans
from modsurg.surgery.resize.resize import layer_of, refuse_sizes, tensor_holders
from modsurg.surgery.resize.values import Fill, LayerPlan, Resized, changing_tensors, refuse_fill, write_plans
from modsurg.tracing.channels import Channels, Leaf, Outcome, channels
from modsurg.tree.walk import Tree, walk


def find_widths(tree: Tree, example: object) -> Widths:
    """Run the model on meta, and label its channels.

    Raises:
        ExampleError: It does not run on the example.
    """
    found = channels(tree.root, example)
    if not isinstance(found, Channels):
        raise ExampleError(f"the model does not run on the example; nothing was changed. {found}")
    ones = torch.ones(len(found.sets), dtype=torch.long)
    return Widths(tree, tensor_holders(tree), found, ones, ones.clone())


def group_of(widths: Widths, path: str, module: nn.Module, size: str) -> tuple[ChannelGroup, torch.Tensor]:
    """The channels of one size of a layer, and the set of each.

    Raises:
        ResizeError: The layer has no such size, was not called, or its channels can't change.
    """
    layer = layer_of(module)
    assert layer is not None
    name, dim = layer.place(module, size)
    owner, _, name = f"{path}.{name}".strip(".").rpartition(".")
    leaf = _leaf(widths, owner, name)
    if leaf is None:
        raise ResizeError(f'"{path}" ({type(module).__name__}) is not called on the example, so nothing can follow it.')
    dim %= len(widths.channels.leaves[leaf])
    return find_group(widths, path, size, leaf, dim), widths.sets(leaf, dim)


def _leaf(widths: Widths, path: str, name: str) -> Leaf | None:
    """A parameter by the name under which it was seen first."""
    tensor = getattr(widths.tree.modules[path], name, None)
    known = widths.channels.leaves
    for holder, other in widths.holders.get(id(tensor), ()) if (path, name) not in known else ():
        for where in widths.tree.paths[id(holder)]:
            if (where, other) in known:
                return where, other
    return (path, name) if (path, name) in known else None


def follow_modules(
    widths: Widths,
    sites: Sequence[tuple[str, nn.Module]],
    sizes: Mapping[str, object],
    journal: Journal,
    *,
    fill: Fill = "init",
    keep: Keep = "first",
    multiple: int | None = None,
) -> tuple[list[Resized], dict[str, Any]]:
    """Resize the layers at `sites` in place, with everything that is coupled to their channels; see `plan_follow`.

    Returns:
        What became of each layer, and the plans as a recipe records them.
    """
    refuse_fill(fill)
    try:
        plans = plan_follow(widths, sites, sizes, keep, multiple)
        refuse_shared_memory(widths.tree, changing_tensors(plans))
        recorded = describe_plans(widths.tree, plans)
        done = write_plans(plans, fill, journal)
    except BaseException:
        widths.planned = widths.now.clone()
        raise
    widths.now = widths.planned.clone()
    return done, recorded


def plan_follow(
    widths: Widths,
    sites: Sequence[tuple[str, nn.Module]],
    sizes: Mapping[str, object],
    keep: Keep,
    multiple: int | None,
) -> list[LayerPlan]:
    """Work out what becomes of the layers at `sites`, and of all that is coupled to them.

    Args:
        widths: Takes note of the new sizes.
        sites: Path and layer.
        sizes: What they are to be: numbers, or shares of what they are.
        keep: Which channels stay.
        multiple: Of which the new sizes are multiples.

    Returns:
        A plan for each layer that changes, the sites first.

    Raises:
        ResizeError: It can't be. Nothing was changed.
    """
    notes: list[str] = []
    for path, module in sites:
        refuse_sizes(path, module, sizes)
        for size, value in sizes.items():
            group, here = group_of(widths, path, module, size)
            if (widths.planned[here] != widths.now[here]).any():
                continue  # it follows a site before it
            to = target_size(group, value, multiple)
            choose_channels(widths, group, here, to, keep)
            if group.spanned and to != group.channels:
                notes.append(f"{path}: not exact, for all its channels are part of {listed(group.spanned, 3)}")
    plans = _plans(widths, [path for path, _ in sites])
    plans[0].notes += notes + _following_note(plans)
    return plans


def _following_note(plans: Sequence[LayerPlan]) -> list[str]:
    paths = [plan.path or "the model" for plan in plans if plan.follows]
    return [f"{counted(len(paths), 'layer follows', 'layers follow')}: {listed(paths, 4)}"] if paths else []


def _plans(widths: Widths, sites: Sequence[str]) -> list[LayerPlan]:
    tree, found = widths.tree, widths.channels
    changed = widths.planned != widths.now
    axes: dict[str, dict[str, Axes]] = {path: {} for path in sites}
    holders = widths.holders
    for leaf, name, owner in _changing(widths, changed, holders):
        mine = tuple(_axis(widths, changed, leaf, n) for n in range(len(found.leaves[leaf])))
        axes.setdefault(tree.paths[id(owner)][0], {})[name] = mine
    counts: dict[str, list[tuple[str, int | None, int]]] = {}
    for attribute, dim in found.attributes.items():
        if any(f.ids is not None and changed[found.sets[f.ids]].any() for f in dim):
            counts.setdefault(attribute.path, []).append((attribute.name, attribute.index, widths.size(dim)))
            axes.setdefault(attribute.path, {})
    return [_plan(widths, path, mine, counts.get(path, ()), path not in sites) for path, mine in axes.items()]


def _changing(
    widths: Widths, changed: torch.Tensor, holders: Mapping[int, list[tuple[nn.Module, str]]]
) -> Iterator[tuple[Leaf, str, nn.Module]]:
    """Each parameter that changes, with each module that holds it and its name there."""
    numbers = changed.nonzero().flatten()
    for leaf in dict.fromkeys(leaf for leaf, _ in widths.holding(numbers)) if len(numbers) else ():
        tensor = getattr(widths.tree.modules[leaf[0]], leaf[1])
        for owner, name in holders[id(tensor)]:
            yield leaf, name, owner


def _axis(widths: Widths, changed: torch.Tensor, leaf: Leaf, dim: int) -> Axis:
    sets = widths.channels.sets[widths.channels.leaves[leaf][dim][0].ids]
    reads = dim in widths.channels.reads[leaf]
    if not changed[sets].any():
        size = int(widths.now[sets].sum())
        return Axis((size,), (size,), reads)
    if int(widths.now[sets].max()) <= 1 and int(widths.planned[sets].max()) <= 1:
        was, stays = widths.now[sets] > 0, widths.planned[sets] > 0
        chosen = (was.cumsum(0) - 1)[was & stays]
        return Axis((int(was.sum()),), (len(chosen),), reads, chosen)
    old, new = (_keys(sets, copies) for copies in (widths.now, widths.planned))
    position = {key: n for n, key in enumerate(old)}
    chosen = torch.tensor([position.get(key, -1) for key in new], dtype=torch.long)
    return Axis((len(old),), (len(new),), reads, chosen)


def _keys(sets: torch.Tensor, copies: torch.Tensor) -> list[tuple[int, int]]:
    where, copy = places(sets, copies)
    return list(zip(where.tolist(), copy.tolist(), strict=True))


def _plan(
    widths: Widths,
    path: str,
    axes: dict[str, Axes],
    counts: Sequence[tuple[str, int | None, int]],
    follows: bool,
) -> LayerPlan:
    module = widths.tree.modules[path]
    layer = layer_of(module)
    if layer is not None or ".parametrizations." in f".{path}.":
        refuse_rewritten(path, module)
    refuse_values(path, module, axes)
    numbers = {name: size for name, index, size in counts if index is None}
    attributes: list[tuple[nn.Module, str, Any]] = [(module, name, size) for name, size in numbers.items()]
    for name in dict.fromkeys(name for name, index, _ in counts if index is not None):
        values = list(getattr(module, name))
        for other, index, size in counts:
            if other == name and index is not None:
                values[index] = size
        attributes.append((module, name, type(getattr(module, name))(values)))
    if layer is None:
        old = {name: getattr(module, name) for _, name, _ in attributes}
        new = {name: value for _, name, value in attributes}
        old |= {name: tuple(getattr(module, name).shape) for name in axes}
        new |= {name: tuple(len(axis.source) for axis in mine) for name, mine in axes.items()}
        return LayerPlan(path, module, None, old, new, axes, attributes, follows=follows)
    old = layer.sizes(module)
    shapes = {name: _new_shape(widths, path, name) for name in _tensor_names(module)}
    new = old | layer.measure(module, shapes, numbers)
    return LayerPlan(
        path, module, layer, old, new, axes, [*attributes, *layer.attributes(module, new)], follows=follows
    )


def _tensor_names(module: nn.Module) -> list[str]:
    return [name for name, _ in (*module.named_parameters(), *module.named_buffers())]


def _new_shape(widths: Widths, path: str, name: str) -> tuple[int, ...]:
    owner, _, own = f"{path}.{name}".strip(".").rpartition(".")
    leaf = _leaf(widths, owner, own)
    if leaf is None:
        return tuple(getattr(widths.tree.modules[owner], own).shape)
    return tuple(widths.size(dim) for dim in widths.channels.leaves[leaf])


def check_followed(widths: Widths, root: nn.Module, example: object) -> Channels:
    """Run the edited model on meta: each operation must give the sizes that were worked out.

    Returns:
        The channels of the edited model.

    Raises:
        ResizeError: Code of the model computes a size that does not follow.
    """
    found = channels(root, example)
    if not isinstance(found, Channels):
        raise ResizeError(
            f"the channels can't follow: the edited model does not run on the example; nothing was changed. {found}"
        )
    for old, new in zip(_computed(widths.channels), _computed(found), strict=False):
        for before, after in zip(old.dims, new.dims, strict=False):
            planned = [widths.size(dim) if all(f.fixed or f.ids is not None for f in dim) else None for dim in before]
            given = [_size(dim) for dim in after]
            if old.name != new.name:
                raise ResizeError(
                    f'the channels can\'t follow: the edited model computes {new.name} in "{new.module}" where it '
                    f'computed {old.name} in "{old.module}". Nothing was changed.'
                )
            if len(planned) != len(given) or any(a not in (None, b) for a, b in zip(planned, given, strict=True)):
                shape = tuple(b if a is None else a for a, b in zip(planned, given, strict=False))
                raise ResizeError(
                    f'the channels can\'t follow: {old.name} in "{old.module}" gives {tuple(given)}, not {shape}: its '
                    "code computes a size that does not follow. Nothing was changed."
                )
    return found


_LAYOUT = "view _unsafe_view clone expand permute transpose t unsqueeze squeeze alias detach"


def _computed(found: Channels) -> list[Outcome]:
    """What was computed: whether a view must be copied depends on the sizes."""
    return [outcome for outcome in found.outcomes if outcome.name not in _LAYOUT.split()]


def _size(dim: Any) -> int:
    total = 1
    for factor in dim:
        total *= factor.size
    return total


def coupled_groups(root: nn.Module, sites: Sequence[tuple[str, nn.Module]], example: object) -> list[ChannelGroup]:
    """The groups that belong to the outputs of the layers at `sites`, each once."""
    widths = find_widths(walk(root), example)
    found: list[ChannelGroup] = []
    seen: set[tuple[str, str, int]] = set()
    for path, module in sites:
        layer = layer_of(module)
        if layer is None:
            refuse_sizes(path, module, {})
            continue
        group, _ = group_of(widths, path, module, layer.outputs)
        if (mine := {(m.path, m.name, m.dim) for m in group.members}) and not mine <= seen:
            found.append(group)
        seen |= mine
    return found
