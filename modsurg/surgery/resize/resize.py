"""Resizing a layer in place: what overlaps stays, and everything that shares a weight with it follows."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from modsurg.errors import ResizeError, counted, listed
from modsurg.surgery.journal import Journal
from modsurg.surgery.resize.attention import Attention
from modsurg.surgery.resize.checks import refuse_rewritten, refuse_shared_memory, refuse_unknown
from modsurg.surgery.resize.conv import Convolutions
from modsurg.surgery.resize.layers import TABLES, TRANSFORMERS_LINEAR, Layer
from modsurg.surgery.resize.values import (
    Fill,
    LayerPlan,
    Resized,
    changes,
    changing_tensors,
    planned_tensors,
    refuse_fill,
    write_plans,
)
from modsurg.tree.walk import Tree

_LAYERS: tuple[Layer, ...] = (*TABLES, Convolutions(), Attention())


def resize_modules(
    tree: Tree,
    sites: Sequence[tuple[str, nn.Module]],
    sizes: Mapping[str, object],
    journal: Journal,
    *,
    fill: Fill = "init",
    multiple: int | None = None,
) -> list[Resized]:
    """Resize the layers at `sites` (path and layer) in place; everything is worked out before the first change.

    The first places of each dimension are kept (in each group of channels, in each head). What an old output reads from
    a new input begins at zero, so that the old part computes what it did; new outputs begin as the layer initialises
    them, or at zero (`fill="zeros"`). A `Conv2d` that goes from three input channels to one sums them. Tensors keep
    identity, dtype, device, memory format and `requires_grad`; gradients are resized too. Layers that hold the same
    parameter follow.

    Returns:
        One entry for each site and for each layer that followed.

    Raises:
        ResizeError: A layer or a size that can't be. Nothing was changed.
    """
    refuse_fill(fill)
    plans = _plans(tree, sites, sizes, multiple)
    refuse_shared_memory(tree, changing_tensors(plans))
    return write_plans(plans, fill, journal)


def layer_of(module: nn.Module) -> Layer | None:
    """How `module` is resized, if it can be."""
    names = [f"{kind.__module__}.{kind.__qualname__}" for kind in type(module).__mro__]
    if "transformers.pytorch_utils.Conv1D" in names:  # without importing it
        return TRANSFORMERS_LINEAR
    return next((layer for layer in _LAYERS if isinstance(module, layer.classes)), None)


def _plans(
    tree: Tree, sites: Sequence[tuple[str, nn.Module]], sizes: Mapping[str, object], multiple: int | None
) -> list[LayerPlan]:
    """The sites, then what shares a tensor with them."""
    holders = tensor_holders(tree)
    plans: dict[int, LayerPlan] = {}
    waiting = deque((path, module, _numbers(module, sizes, multiple)) for path, module in sites)
    while waiting:
        path, module, asked = waiting.popleft()
        if id(module) not in plans:
            plan = plans[id(module)] = _plan(path, module, asked)
            for holder, name, mine in _holding(plan, holders):
                where = tree.paths[id(holder)][0]
                following = _following(plan, holder, name, mine, asked, where)
                if following is not None:
                    waiting.append((where, holder, following))
    return list(plans.values())


def _numbers(module: nn.Module, sizes: Mapping[str, object], multiple: int | None) -> Mapping[str, object]:
    """The sizes with shares of the old ones as numbers, and rounded."""
    layer = layer_of(module)
    old = {name: getattr(module, name, None) for name in layer.keywords} if layer is not None else {}
    step = multiple or 1
    found = dict(sizes)
    for name, value in sizes.items():
        known = old.get(name)
        if isinstance(value, float) and 0 < value <= 1 and isinstance(known, int):
            found[name] = max(1, round(value * known / step)) * step
        elif multiple and isinstance(value, int) and value > 0:
            found[name] = max(1, round(value / step)) * step
    return found


def _holding(plan: LayerPlan, holders: dict[int, list[tuple[nn.Module, str]]]) -> Iterator[tuple[nn.Module, str, str]]:
    """Who else holds a tensor that changes: module, its name for it, the plan's name for it."""
    inside = {id(module) for module in plan.module.modules()}
    for mine, tensor in planned_tensors(plan).items():
        if changes(plan.axes[mine]):
            yield from ((h, name, mine) for h, name in holders.get(id(tensor), ()) if id(h) not in inside)


def _following(
    plan: LayerPlan, holder: nn.Module, name: str, mine: str, asked: Mapping[str, object], where: str
) -> Mapping[str, object] | None:
    """The sizes that `holder` gets; None for a module of the user's own, which only sees the new shape."""
    layer = layer_of(holder)
    if layer is None:
        plan.notes.append(f"{where}.{name}".lstrip(".") + f" is the same tensor as {plan.path}.{mine}")
        return None
    sizes = layer.follow(name, plan.axes[mine])
    if sizes is None and layer is plan.layer and name == mine:
        return asked
    if sizes is None:
        raise ResizeError(
            f'"{plan.path}" shares its {mine} with "{where}" ({type(holder).__name__}), which can\'t follow; untie it '
            f'first: replace(model, "{where}", copy.deepcopy, untie=True).'
        )
    return sizes


def _plan(path: str, module: nn.Module, asked: Mapping[str, object]) -> LayerPlan:
    layer = refuse_sizes(path, module, asked)
    kind = type(module).__name__
    refuse_rewritten(path, module)
    try:
        old, new = layer.sizes(module), layer.complete(module, asked)
    except ResizeError as error:
        raise ResizeError(f'"{path}" ({kind}): {error}') from None
    axes = layer.axes(module, old, new)
    own = [name for name in refuse_unknown(path, module, axes) if name != "num_batches_tracked"]
    note = layer.note(module, old, new)
    notes = [f"{path}: {kind} has {listed(own, 3)} of its own, and keeps it"] if own else []
    attributes = layer.attributes(module, new)
    return LayerPlan(path, module, layer, old, new, axes, attributes, [note, *notes] if note else notes)


def refuse_sizes(path: str, module: nn.Module, asked: Mapping[str, object]) -> Layer:
    """Refuse a module that can't be resized, and sizes that it does not have; returns its family.

    Raises:
        ResizeError: The message has the line with those that it has.
    """
    layer = layer_of(module)
    if layer is None:
        raise ResizeError(_no_layer(path, module, asked))
    foreign = [name for name in asked if name not in layer.keywords]
    if foreign or not asked:
        has = f"has no {', '.join(foreign)}" if foreign else "needs a size"
        line = f'resize(model, "{path}", {layer.keywords[0]}=...)'
        kind = type(module).__name__
        raise ResizeError(f'"{path}" is a {kind} and {has}; its sizes are {", ".join(layer.keywords)}: {line}.')
    return layer


def _no_layer(path: str, module: nn.Module, asked: Mapping[str, object]) -> str:
    kind = type(module).__name__
    if any(kind == known.__name__ for each in _LAYERS for known in each.classes):  # quantised, of a library
        kind = f"{type(module).__module__}.{kind}"
    found = {name: layer_of(inner) for name, inner in module.named_modules(prefix=path) if inner is not module}
    able = [name for name, layer in found.items() if layer is not None and asked.keys() <= set(layer.keywords)]
    if able:
        others = counted(len(able) - 1, "other layer", "other layers")
        more = f" (and {others} in it)" if able[1:] else ""
        return f'"{path}" is a {kind}, which can\'t be resized; "{able[0]}" can{more}: resize(model, "{able[0]}", ...).'
    return (
        f'"{path}" is a {kind}, which can\'t be resized; Linear, Bilinear, convolutions, embeddings, norms, PReLU '
        f'and MultiheadAttention can: replace(model, "{path}", ...) puts a new one there.'
    )


def tensor_holders(tree: Tree) -> dict[int, list[tuple[nn.Module, str]]]:
    """Find which modules hold each tensor, and by which name."""
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for path, module in tree.modules.items():
        if tree.paths[id(module)][0] == path:
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    holders.setdefault(id(tensor), []).append((module, name))
    return holders
