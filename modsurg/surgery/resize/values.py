"""The tensors of resized layers: what new places hold, and how a tensor of the model gets another shape in place."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

import torch
from torch import nn

from modsurg.errors import ResizeError
from modsurg.surgery.journal import Journal, set_data
from modsurg.surgery.resize.axes import Axes, Reshaped, extend, like, new_shape, resized, silence_new_inputs
from modsurg.surgery.resize.layers import Layer, Sizes

Fill = Literal["init", "zeros", "mean", "repeat"]
FILLS = ("init", "zeros", "mean", "repeat")
Attributes = list[tuple[nn.Module, str, Any]]


@dataclass(frozen=True, slots=True)
class Resized:
    """What became of one layer.

    Attributes:
        path: Where it is.
        module: The layer; it is the same object as before, and so are its parameters.
        sizes: Each size that changed, before and after.
        tensors: The parameters and buffers that changed.
        notes: What the user should know.
        follows: Whether it was resized because another layer was.
    """

    path: str
    module: nn.Module
    sizes: Mapping[str, tuple[object, object]]
    tensors: tuple[Reshaped, ...]
    notes: tuple[str, ...]
    follows: bool = False

    def __str__(self) -> str:
        return ", ".join(f"{name} {old} -> {new}" for name, (old, new) in self.sizes.items()) or "no other size"


@dataclass(slots=True)
class LayerPlan:
    """What one layer is to become.

    Attributes:
        path: Where it is.
        module: The layer.
        layer: Its family; None for a module that is in none.
        old: Its sizes.
        new: Its sizes afterwards.
        axes: The dimensions of its tensors, by name.
        attributes: What is to be set: owner, name, value.
        notes: What the user should know.
        follows: Whether it is resized because another layer is.
    """

    path: str
    module: nn.Module
    layer: Layer | None
    old: Sizes
    new: Sizes
    axes: dict[str, Axes]
    attributes: Attributes
    notes: list[str] = field(default_factory=list)
    follows: bool = False


@dataclass(slots=True)
class _Value:
    tensor: torch.Tensor
    axes: Axes
    new: torch.Tensor


def write_plans(plans: Sequence[LayerPlan], fill: Fill, journal: Journal) -> list[Resized]:
    """Give the layers their new tensors and sizes; all values are made before the first change.

    Raises:
        ResizeError: Two plans want another shape of one tensor, or there is no memory. Nothing was changed.
    """
    values: dict[int, _Value] = {}
    results = []
    for plan in plans:
        mine = _values(plan, fill, values)
        values |= {id(value.tensor): value for value in mine}
        sizes = {name: (old, plan.new[name]) for name, old in plan.old.items() if plan.new[name] != old}
        tensors = tuple(Reshaped(value.tensor, value.axes) for value in mine)
        results.append(Resized(plan.path, plan.module, sizes, tensors, tuple(plan.notes), plan.follows))
    for value in values.values():
        _write(value, journal)
    for plan in plans:
        for owner, name, size in plan.attributes:
            journal.keep_attr(owner, name)
            setattr(owner, name, size)
    return results


def changes(axes: Axes) -> bool:
    """Whether any place of a tensor comes, goes or moves."""
    return any(axis.changes for axis in axes)


def refuse_fill(fill: str) -> None:
    """Refuse a way to fill new places that there is not.

    Raises:
        ResizeError: The message has those that there are.
    """
    if fill not in FILLS:
        raise ResizeError(f"fill={fill!r} is not one of {', '.join(FILLS)}.")


def changing_tensors(plans: Sequence[LayerPlan]) -> dict[str, torch.Tensor]:
    """The tensors that plans are about to change, by name."""
    return {f"{p.path}.{name}": t for p in plans for name, t in planned_tensors(p).items() if changes(p.axes[name])}


def planned_tensors(plan: LayerPlan) -> dict[str, torch.Tensor]:
    """The tensors of a layer that its plan names."""
    own = (*plan.module.named_parameters(), *plan.module.named_buffers())
    return {name: tensor for name, tensor in own if name in plan.axes}


def scratch(module: nn.Module, tensors: Mapping[str, torch.Tensor], attributes: Attributes) -> nn.Module:
    """Copy `module` in evaluation mode with other tensors and attributes, without hooks.

    Args:
        module: A layer, with the children that its tensors are in.
        tensors: The tensors of the copy by name (`"weight"`, `"out_proj.weight"`).
        attributes: What is to be set: owner (the module or its child), name, value.
    """
    copy = type(module).__new__(type(module))
    nn.Module.__init__(copy)
    copy.__dict__.update({k: v for k, v in module.__dict__.items() if k not in copy.__dict__ and k != "train"})
    copy.training = False
    for table in ("_parameters", "_buffers"):
        copy.__dict__[table] = {name: tensors.get(name) for name in module.__dict__[table]}
    for name, child in module._modules.items():
        inner = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        copy._modules[name] = scratch(child, inner, attributes) if inner and child is not None else child
    for owner, name, value in attributes:
        if owner is module:
            copy.__dict__[name] = value
    return copy


def _values(plan: LayerPlan, fill: Fill, known: dict[int, _Value]) -> list[_Value]:
    """The new values of the tensors that no plan before this one has."""
    mine: dict[str, torch.Tensor] = {}
    for name, tensor in planned_tensors(plan).items():
        if id(tensor) not in known:
            mine |= {name: tensor} if changes(plan.axes[name]) else {}
        elif known[id(tensor)].new.shape != new_shape(plan.axes[name]):
            raise ResizeError(
                f'"{plan.path}" shares its {name} with another layer, by which it becomes '
                f"{tuple(known[id(tensor)].new.shape)}; it can't become {new_shape(plan.axes[name])} at once."
            )
    layer = plan.layer or Layer()
    begin = _beginning(plan, mine, fill)
    for name, tensor in mine.items():
        if fill in ("mean", "repeat") and isinstance(tensor, nn.Parameter):
            begin[name] = extend(tensor.detach(), plan.axes[name], fill)
            continue
        silence_new_inputs(begin[name], plan.axes[name])
        layer.carry(plan.module, tensor.detach(), begin[name], plan.axes[name])
        if tensor.grad is not None and tensor.grad.layout is not torch.strided:
            plan.notes.append(f"the sparse gradient of {name} was dropped")
    return [
        _Value(tensor, plan.axes[name], like(begin[name].to(tensor.dtype), tensor)) for name, tensor in mine.items()
    ]


def _beginning(plan: LayerPlan, mine: dict[str, torch.Tensor], fill: Fill) -> dict[str, torch.Tensor]:
    """What new tensors hold where nothing is kept."""
    begin = {name: _zeros(plan, name, tensor) for name, tensor in mine.items()}
    grows = any(prod(axis.new) > prod(axis.old) for name in mine for axis in plan.axes[name] if not axis.reads)
    buffers = [name for name, tensor in mine.items() if not isinstance(tensor, nn.Parameter)]
    if grows and plan.layer is not None and (fill == "init" or buffers):
        own = (*plan.module.named_parameters(), *plan.module.named_buffers())
        every = {name: torch.zeros_like(tensor) for name, tensor in own if name not in plan.axes}
        every |= {name: _zeros(plan, name, tensor) for name, tensor in planned_tensors(plan).items()} | begin
        with torch.no_grad():
            plan.layer.initialise(scratch(plan.module, every, plan.attributes))
            for name in begin.keys() - buffers if fill == "zeros" else ():
                begin[name].zero_()
    return begin


def _zeros(plan: LayerPlan, name: str, tensor: torch.Tensor) -> torch.Tensor:
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
