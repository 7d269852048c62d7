"""Layers on trial: a resized layer is made and measured beside the model before the model changes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from modsurg.surgery.resize.axes import Axes, Axis, kept, new_shape, old_shape, overlay
from modsurg.surgery.resize.layers import Layer, Sizes

Attributes = list[tuple[nn.Module, str, Any]]


def scratch(module: nn.Module, tensors: Mapping[str, torch.Tensor], attributes: Attributes) -> nn.Module:
    """A copy of `module` in evaluation mode with other tensors and attributes, without hooks.

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


def difference(layer: Layer, before: nn.Module, after: nn.Module, old: Sizes, new: Sizes) -> float | None:
    """The greatest difference between the outputs that two scratch layers share, on a random input.

    What the new layer reads besides is random too, what it no longer reads is zero. None on meta.
    """
    tensors = [t for m in (before, after) for t in (*m.parameters(), *m.buffers())]
    if any(tensor.is_meta for tensor in tensors):
        return None
    first = next((t for t in tensors if t.is_floating_point() or t.is_complex()), torch.empty(0))
    inputs, output = layer.probe(before, old, new)
    generator = torch.Generator("cpu").manual_seed(0)
    pairs = [_pair(axes, generator, first) for axes in inputs]
    with torch.no_grad(), torch.autocast(first.device.type, enabled=False):
        was = layer.respond(before, *(layer.align(before, *pair) for pair in pairs))
        now = layer.respond(after, *(pair[1] for pair in pairs))
    return float((kept(was, output, "old") - kept(now, output, "new")).abs().max())


def precise(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in a precision in which every device computes."""
    return tensor.float() if tensor.is_floating_point() and tensor.dtype.itemsize < 4 else tensor


def _pair(axes: Axes, generator: torch.Generator, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    old = torch.zeros(old_shape(axes), dtype=like.dtype, device="cpu")
    new = torch.randn(new_shape(axes), generator=generator, dtype=like.dtype, device="cpu")
    overlay(new, old, tuple(Axis(axis.new, axis.old) for axis in axes))
    return old.to(like.device), new.to(like.device)
