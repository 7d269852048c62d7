"""Resizing a layer in place: what overlaps stays, and everything that shares a weight with it follows."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Literal

import torch
from torch import nn

from modsurg.errors import ResizeError, counted, listed
from modsurg.surgery.journal import Journal, set_data
from modsurg.surgery.resize.attention import Attention
from modsurg.surgery.resize.axes import Axes, Reshaped, like, new_shape, resized, silence_new_inputs
from modsurg.surgery.resize.checks import refuse_rewritten, refuse_shared_memory, refuse_unknown
from modsurg.surgery.resize.conv import Convolutions
from modsurg.surgery.resize.layers import TABLES, TRANSFORMERS_LINEAR, Layer, Sizes
from modsurg.surgery.resize.probing import difference, precise, scratch
from modsurg.tree.walk import Tree

Fill = Literal["init", "zeros"]

_LAYERS: tuple[Layer, ...] = (*TABLES, Convolutions(), Attention())


@dataclass(frozen=True, slots=True)
class Resized:
    """What became of one layer.

    Attributes:
        path: Where it is.
        module: The layer; it is the same object as before, and so are its parameters.
        sizes: Each size that changed, before and after.
        tensors: The parameters and buffers that changed.
        difference: The greatest difference between the old and the new layer's output, where both have one, on a random
            input (a gray one where colours become gray). None on meta, and where a subclass has a forward of its own.
        notes: What the user should know.
    """

    path: str
    module: nn.Module
    sizes: Mapping[str, tuple[object, object]]
    tensors: tuple[Reshaped, ...]
    difference: float | None
    notes: tuple[str, ...]

    def __str__(self) -> str:
        changed = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in self.sizes.items()) or "no other size"
        return changed if self.difference is None else f"{changed} (greatest difference {self.difference:.2g})"


@dataclass(slots=True)
class _Value:
    tensor: torch.Tensor
    axes: Axes
    new: torch.Tensor


@dataclass(slots=True)
class _Plan:
    path: str
    module: nn.Module
    layer: Layer
    old: Sizes
    new: Sizes
    axes: dict[str, Axes]
    notes: list[str] = field(default_factory=list)


def resize_modules(
    tree: Tree,
    sites: Sequence[tuple[str, nn.Module]],
    sizes: Mapping[str, object],
    journal: Journal,
    *,
    fill: Fill = "init",
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
    if fill not in ("init", "zeros"):
        raise ResizeError(f'fill={fill!r} is neither "init" (the layer\'s own way to begin) nor "zeros".')
    plans = _plans(tree, sites, sizes)
    refuse_shared_memory(tree, _changing(plans))
    values: dict[int, _Value] = {}
    results = []
    for plan in plans:
        mine = _values(plan, fill, values)
        values |= {id(value.tensor): value for value in mine}
        results.append(_result(plan, mine, values))
    for value in values.values():
        _write(value, journal)
    for plan in plans:
        for owner, name, size in plan.layer.attributes(plan.module, plan.new):
            journal.keep_attr(owner, name)
            setattr(owner, name, size)
    return results


def _changing(plans: Sequence[_Plan]) -> dict[str, torch.Tensor]:
    return {f"{p.path}.{name}": t for p in plans for name, t in _tensors(p).items() if _changes(p.axes[name])}


def layer_of(module: nn.Module) -> Layer | None:
    """How `module` is resized, if it can be."""
    names = [f"{kind.__module__}.{kind.__qualname__}" for kind in type(module).__mro__]
    if "transformers.pytorch_utils.Conv1D" in names:  # without importing it
        return TRANSFORMERS_LINEAR
    return next((layer for layer in _LAYERS if isinstance(module, layer.classes)), None)


def _plans(tree: Tree, sites: Sequence[tuple[str, nn.Module]], sizes: Mapping[str, object]) -> list[_Plan]:
    """The sites, then what shares a tensor with them."""
    holders = _holders(tree)
    plans: dict[int, _Plan] = {}
    waiting = deque((path, module, sizes) for path, module in sites)
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


def _holding(plan: _Plan, holders: dict[int, list[tuple[nn.Module, str]]]) -> Iterator[tuple[nn.Module, str, str]]:
    """Who else holds a tensor that changes: module, its name for it, the plan's name for it."""
    inside = {id(module) for module in plan.module.modules()}
    for mine, tensor in _tensors(plan).items():
        if _changes(plan.axes[mine]):
            yield from ((h, name, mine) for h, name in holders.get(id(tensor), ()) if id(h) not in inside)


def _following(
    plan: _Plan, holder: nn.Module, name: str, mine: str, asked: Mapping[str, object], where: str
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


def _plan(path: str, module: nn.Module, asked: Mapping[str, object]) -> _Plan:
    layer = layer_of(module)
    kind = type(module).__name__
    if layer is None:
        raise ResizeError(_no_layer(path, module, asked))
    refuse_rewritten(path, module)
    foreign = [name for name in asked if name not in layer.keywords]
    if foreign or not asked:
        has = f"has no {', '.join(foreign)}" if foreign else "needs a size"
        line = f'resize(model, "{path}", {layer.keywords[0]}=...)'
        raise ResizeError(f'"{path}" is a {kind} and {has}; its sizes are {", ".join(layer.keywords)}: {line}.')
    try:
        old, new = layer.sizes(module), layer.complete(module, asked)
    except ResizeError as error:
        raise ResizeError(f'"{path}" ({kind}): {error}') from None
    axes = layer.axes(module, old, new)
    own = [name for name in refuse_unknown(path, module, axes) if name != "num_batches_tracked"]
    note = layer.note(module, old, new)
    notes = [f"{path}: {kind} has {listed(own, 3)} of its own, and keeps it"] if own else []
    return _Plan(path, module, layer, old, new, axes, [note, *notes] if note else notes)


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


def _holders(tree: Tree) -> dict[int, list[tuple[nn.Module, str]]]:
    """Which modules hold each tensor, and by which name."""
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for path, module in tree.modules.items():
        if tree.paths[id(module)][0] == path:
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    holders.setdefault(id(tensor), []).append((module, name))
    return holders


def _tensors(plan: _Plan) -> dict[str, torch.Tensor]:
    own = (*plan.module.named_parameters(), *plan.module.named_buffers())
    return {name: tensor for name, tensor in own if name in plan.axes}


def _changes(axes: Axes) -> bool:
    return any(axis.old != axis.new for axis in axes)


def _values(plan: _Plan, fill: Fill, known: dict[int, _Value]) -> list[_Value]:
    """The new values of the tensors that no plan before this one has."""
    mine: dict[str, torch.Tensor] = {}
    for name, tensor in _tensors(plan).items():
        if id(tensor) not in known:
            mine |= {name: tensor} if _changes(plan.axes[name]) else {}
        elif known[id(tensor)].new.shape != new_shape(plan.axes[name]):
            raise ResizeError(
                f'"{plan.path}" shares its {name} with another layer, by which it becomes '
                f"{tuple(known[id(tensor)].new.shape)}; it can't become {new_shape(plan.axes[name])} at once."
            )
    begin = _beginning(plan, mine, fill)
    for name, tensor in mine.items():
        silence_new_inputs(begin[name], plan.axes[name])
        plan.layer.carry(plan.module, tensor.detach(), begin[name], plan.axes[name])
        if tensor.grad is not None and tensor.grad.layout is not torch.strided:
            plan.notes.append(f"the sparse gradient of {name} was dropped")
    return [
        _Value(tensor, plan.axes[name], like(begin[name].to(tensor.dtype), tensor)) for name, tensor in mine.items()
    ]


def _beginning(plan: _Plan, mine: dict[str, torch.Tensor], fill: Fill) -> dict[str, torch.Tensor]:
    """What new tensors hold where nothing is kept."""
    begin = {name: _zeros(plan, name, tensor) for name, tensor in mine.items()}
    grows = any(prod(axis.new) > prod(axis.old) for name in mine for axis in plan.axes[name] if not axis.reads)
    buffers = [name for name, tensor in mine.items() if not isinstance(tensor, nn.Parameter)]
    if grows and (fill == "init" or buffers):
        own = (*plan.module.named_parameters(), *plan.module.named_buffers())
        every = {name: torch.zeros_like(tensor) for name, tensor in own if name not in plan.axes}
        every |= {name: _zeros(plan, name, tensor) for name, tensor in _tensors(plan).items()} | begin
        with torch.no_grad():
            plan.layer.initialise(scratch(plan.module, every, plan.layer.attributes(plan.module, plan.new)))
            for name in begin.keys() - buffers if fill == "zeros" else ():
                begin[name].zero_()
    return begin


def _zeros(plan: _Plan, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Memory for a tensor's new values; one of 8 bits is filled in a precision in which torch can fill it."""
    shape = new_shape(plan.axes[name])
    dtype = torch.float32 if tensor.dtype.itemsize == 1 else tensor.dtype
    try:
        return torch.zeros(shape, dtype=dtype, device=tensor.device)
    except (RuntimeError, TypeError) as error:
        reason = str(error).split("\n")[0]
        raise ResizeError(
            f'"{plan.path}" ({type(plan.module).__name__}): there is no memory for a {name} of {shape}: {reason}'
        ) from error


def _result(plan: _Plan, mine: list[_Value], values: dict[int, _Value]) -> Resized:
    before = {name: tensor.detach() for name, tensor in _tensors(plan).items()}
    after = {
        name: values[id(tensor)].new if id(tensor) in values else tensor.detach()
        for name, tensor in _tensors(plan).items()
    }
    own_way = plan.layer.computes_its_own_way(plan.module)
    if own_way:
        kind = type(plan.module).__name__
        plan.notes.append(
            f"{plan.path}: {kind} has a forward of its own, so what becomes of its output was not measured"
        )
    attributes = plan.layer.attributes(plan.module, plan.new)
    was, now = (
        scratch(plan.module, {name: precise(tensor) for name, tensor in tensors.items()}, changed)
        for tensors, changed in ((before, []), (after, attributes))
    )
    return Resized(
        path=plan.path,
        module=plan.module,
        sizes={name: (old, plan.new[name]) for name, old in plan.old.items() if plan.new[name] != old},
        tensors=tuple(Reshaped(value.tensor, value.axes) for value in mine),
        difference=None if own_way else difference(plan.layer, was, now, plan.old, plan.new),
        notes=tuple(plan.notes),
    )


def _write(value: _Value, journal: Journal) -> None:
    tensor, grad = value.tensor, value.tensor.grad
    for name, kept in list(vars(tensor).items()):  # an optimizer's Hessian, a trainer's own sum of gradients
        if isinstance(kept, torch.Tensor) and kept.shape == tensor.shape:
            journal.keep_attr(tensor, name)
            setattr(tensor, name, resized(kept, value.axes))
    journal.keep_tensor(tensor)
    tensor.grad = None
    set_data(tensor, value.new)
    if grad is not None and grad.layout is torch.strided:
        tensor.grad = resized(grad, value.axes)
