"""Convolutions that are resized: groups keep their size or their number, and gray pictures their response."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import nn

from modsurg.errors import ResizeError
from modsurg.surgery.resize.axes import Axes, Axis, fixed
from modsurg.surgery.resize.layers import Layer, Sizes

_COLOURS = 3


class Convolutions(Layer):
    """Conv1d to Conv3d and their transposes.

    The weight is (out, in / groups, ...), of a transpose (in, out / groups, ...). Channels belong to groups: a channel
    that stays keeps its place in its group, so that it still reads what it read.
    """

    classes = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    keywords = ("in_channels", "out_channels", "groups")
    outputs = "out_channels"

    def complete(self, module: nn.Module, asked: Mapping[str, object]) -> Sizes:
        """Groups must divide both; a depthwise layer stays depthwise when its input changes."""
        old = self.sizes(module)
        new = super().complete(module, asked)
        if old["groups"] == old["in_channels"] > 1 and "in_channels" in asked and "groups" not in asked:
            new["groups"] = new["in_channels"]
            if "out_channels" not in asked:
                new["out_channels"] = new["groups"] * (old["out_channels"] // old["groups"])
        wrong = [name for name in ("in_channels", "out_channels") if new[name] % new["groups"]]
        if wrong:
            sizes = ", ".join(f"{name}={new[name]}" for name in wrong)
            raise ResizeError(f"groups={new['groups']} does not divide {sizes}{_hint(old)}.")
        if old["groups"] != new["groups"] and _in_a_group(old) != _in_a_group(new):
            ins, outs = _in_a_group(old)
            raise ResizeError(
                f"its {old['groups']} groups have {ins} inputs and {outs} outputs each, and keep them when their "
                f"number changes: in_channels={ins * new['groups']}, out_channels={outs * new['groups']}, "
                f"groups={new['groups']}."
            )
        return new

    def axes(self, module: nn.Module, old: Sizes, new: Sizes) -> dict[str, Axes]:
        """The first dimension runs over the groups and the channels in a group, the second over the latter alone."""
        (ins, outs), (new_ins, new_outs) = _in_a_group(old), _in_a_group(new)
        groups, new_groups = old["groups"], new["groups"]
        kernel = fixed(*cast(tuple[int, ...], module.kernel_size))
        grouped = Axis((groups, outs), (new_groups, new_outs))
        if module.transposed:
            first = Axis((groups, ins), (new_groups, new_ins), reads=True)
            return {"weight": (first, Axis((outs,), (new_outs,)), *kernel), "bias": (grouped,)}
        return {"weight": (grouped, Axis((ins,), (new_ins,), reads=True), *kernel), "bias": (grouped,)}

    def place(self, module: nn.Module, size: str) -> tuple[str, int]:
        """Of a grouped convolution the inputs are those of the layer before it."""
        groups, ins = (int(getattr(module, name)) for name in ("groups", "in_channels"))
        if size == "groups" or (size == "in_channels" and groups == ins):
            return "weight", 0
        if groups > 1 and (size == "in_channels" or module.transposed):
            raise ResizeError(f"{size} of {groups} groups follows the layer before it; resize that one.")
        return "weight", int((size == "in_channels") != bool(module.transposed))

    def measure(self, module: nn.Module, shapes: Mapping[str, tuple[int, ...]], counts: Mapping[str, int]) -> Sizes:
        """The weight, and the number of groups."""
        groups = counts.get("groups", int(module.groups))  # type: ignore[arg-type]  # typed Tensor | Module
        first, second = shapes["weight"][:2]
        ins, outs = (first, second * groups) if module.transposed else (second * groups, first)
        return {"in_channels": ins, "out_channels": outs, "groups": groups}

    def carry(self, module: nn.Module, old: torch.Tensor, new: torch.Tensor, axes: Axes) -> None:
        """Colours that become gray are summed, so that a gray picture gets the response that it had."""
        if old.ndim > 1 and _to_gray(module, new.shape[1]):
            outputs = min(old.shape[0], new.shape[0])
            new[:outputs] = old[:outputs].sum(dim=1, keepdim=True)
        else:
            super().carry(module, old, new, axes)

    def note(self, module: nn.Module, old: Sizes, new: Sizes) -> str | None:
        """Colours that became gray, channels that got another number."""
        if _to_gray(module, new["in_channels"]):
            return "the three input channels were summed: a gray picture keeps its response"
        outs, new_outs = _in_a_group(old)[1], _in_a_group(new)[1]
        if old["groups"] == 1 or outs == new_outs:
            return None
        return (
            f"an output channel keeps its group and its place in it: the second group began at {outs} "
            f"and begins at {new_outs}"
        )


def _to_gray(module: nn.Module, channels: int) -> bool:
    return isinstance(module, nn.Conv2d) and module.in_channels == _COLOURS and module.groups == 1 == channels


def _in_a_group(sizes: Sizes) -> tuple[int, int]:
    return sizes["in_channels"] // sizes["groups"], sizes["out_channels"] // sizes["groups"]


def _hint(old: Sizes) -> str:
    if old["groups"] != old["in_channels"]:
        return ""
    return "; it is depthwise: give in_channels, and groups and out_channels follow"
