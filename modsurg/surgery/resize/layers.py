"""Layers that can be resized: their sizes, and which dimension of which tensor each of them is.

A layer raises `ResizeError` without saying where: `resizing.py` adds the path and the line of code that mends it.
"""

from collections.abc import Mapping
from math import prod
from operator import index
from typing import Any

import torch
from torch import nn

from modsurg.errors import ResizeError, counted
from modsurg.surgery.resize.axes import Axes, Axis, new_shape, overlay

Sizes = dict[str, Any]


class Layer:
    """One family of layers.

    Attributes:
        classes: The classes; their subclasses are resized in the same way.
        keywords: The sizes, by the names that the constructor gives them; each is an attribute of the module too.
        outputs: The size that counts the channels of the output.
    """

    classes: tuple[type[nn.Module], ...]
    keywords: tuple[str, ...]
    outputs: str

    def sizes(self, module: nn.Module) -> Sizes:
        """The sizes of `module` as it is."""
        return {name: getattr(module, name) for name in self.keywords}

    def complete(self, module: nn.Module, asked: Mapping[str, object]) -> Sizes:
        """All the sizes that `module` is to have.

        Raises:
            ResizeError: The sizes asked for don't go together.
        """
        return self.sizes(module) | {name: _size(name, value) for name, value in asked.items()}

    def axes(self, module: nn.Module, old: Sizes, new: Sizes) -> dict[str, Axes]:
        """The dimensions of each tensor of the layer, by the tensor's name."""
        raise NotImplementedError

    def follow(self, name: str, axes: Axes) -> Sizes | None:
        """The sizes of a layer whose tensor `name` has got new axes from another layer that it is tied to."""
        return None

    def place(self, module: nn.Module, size: str) -> tuple[str, int]:
        """The tensor and the dimension whose channels a size counts.

        Raises:
            ResizeError: There is none.
        """
        raise ResizeError(f"{size} has no channels of its own.")

    def measure(self, module: nn.Module, shapes: Mapping[str, tuple[int, ...]], counts: Mapping[str, int]) -> Sizes:
        """The sizes of a layer whose tensors have these shapes.

        Args:
            module: The layer as it was.
            shapes: By the tensors' names.
            counts: Sizes that are known, such as the number of groups.
        """
        return {name: size for name, size in counts.items() if name in self.keywords}

    def attributes(self, module: nn.Module, new: Sizes) -> list[tuple[nn.Module, str, Any]]:
        """The attributes to be set: owner, name, value."""
        return [(module, name, new[name]) for name in self.keywords]

    def initialise(self, scratch: nn.Module) -> None:
        """Give the tensors of a layer that was just made the values that its class begins with."""
        scratch.reset_parameters()  # type: ignore[operator]  # a Module attribute is typed Tensor

    def carry(self, module: nn.Module, old: torch.Tensor, new: torch.Tensor, axes: Axes) -> None:
        """Copy into the contiguous `new` what stays of a tensor of `module`."""
        overlay(old, new, axes)

    def note(self, module: nn.Module, old: Sizes, new: Sizes) -> str | None:
        """What the user should know of this change of sizes."""
        return None


class Table(Layer):
    """Layers in which each dimension of each tensor is one size.

    Args:
        classes: See `Layer`.
        tensors: For each tensor the sizes of its dimensions; a `-` before the name: the dimension runs over inputs.
        others: Sizes that are no dimension of a tensor.
        outputs: The size of the output, where it is not the first.
    """

    def __init__(
        self,
        *classes: type[nn.Module],
        tensors: Mapping[str, tuple[str, ...]],
        others: tuple[str, ...] = (),
        outputs: str = "",
    ) -> None:
        self.classes = classes
        self.tensors = tensors
        self.keywords = (*dict.fromkeys(name.lstrip("-") for dims in tensors.values() for name in dims), *others)
        self.outputs = outputs or self.keywords[0]

    def axes(self, module: nn.Module, old: Sizes, new: Sizes) -> dict[str, Axes]:
        """Each dimension is one size."""
        return {tensor: tuple(_axis(name, old, new) for name in dims) for tensor, dims in self.tensors.items()}

    def follow(self, name: str, axes: Axes) -> Sizes | None:
        """Each size is one dimension."""
        dims = self.tensors.get(name, ())
        if len(dims) != len(axes):
            return None
        return {dim.lstrip("-"): prod(axis.new) for dim, axis in zip(dims, axes, strict=True)}

    def place(self, module: nn.Module, size: str) -> tuple[str, int]:
        """The first tensor that the layer has."""
        for tensor, dims in self.tensors.items():
            for number, dim in enumerate(dims):
                if dim.lstrip("-") == size and getattr(module, tensor, None) is not None:
                    return tensor, number
        return super().place(module, size)

    def measure(self, module: nn.Module, shapes: Mapping[str, tuple[int, ...]], counts: Mapping[str, int]) -> Sizes:
        """Each size is one dimension."""
        found = super().measure(module, shapes, counts)
        for tensor, dims in self.tensors.items():
            found |= zip((dim.lstrip("-") for dim in dims), shapes.get(tensor, ()), strict=False)
        return found


class Embeddings(Table):
    """Tables of vectors, looked up by number."""

    def complete(self, module: nn.Module, asked: Mapping[str, object]) -> Sizes:
        """The padding index must stay inside."""
        new = super().complete(module, asked)
        padding = module.padding_idx
        if isinstance(padding, int) and padding >= new["num_embeddings"]:
            raise ResizeError(f"its padding_idx is {padding}, so num_embeddings must be at least {padding + 1}.")
        return new


class Slopes(Table):
    """PReLU: one slope for all channels may become one for each."""

    def carry(self, module: nn.Module, old: torch.Tensor, new: torch.Tensor, axes: Axes) -> None:
        """A slope that was for all channels goes to every channel."""
        if old.numel() == 1:
            new.copy_(old.expand_as(new))
        else:
            overlay(old, new, axes)


class GroupNorms(Table):
    """GroupNorm: its statistics run over groups of channels."""

    def complete(self, module: nn.Module, asked: Mapping[str, object]) -> Sizes:
        """The groups must divide the channels."""
        new = super().complete(module, asked)
        if new["num_channels"] % new["num_groups"]:
            size = index(module.num_channels) // index(module.num_groups)  # type: ignore[arg-type]  # typed Tensor
            raise ResizeError(
                f"num_channels={new['num_channels']} is not a multiple of num_groups={new['num_groups']}; "
                f"groups of {size}, as it has now, would be num_groups={max(1, new['num_channels'] // size)}."
            )
        return new

    def note(self, module: nn.Module, old: Sizes, new: Sizes) -> str | None:
        """Other groups have other statistics."""
        if new["num_channels"] // new["num_groups"] != old["num_channels"] // old["num_groups"]:
            return "the groups have other channels now, so the statistics of the old ones change"
        return None


class ShapedNorms(Layer):
    """LayerNorm and RMSNorm: one shape, over which the statistics run."""

    classes = (nn.LayerNorm, nn.RMSNorm)
    keywords = ("normalized_shape",)
    outputs = "normalized_shape"

    def place(self, module: nn.Module, size: str) -> tuple[str, int]:
        """The last dimension of the weight, where there is one and it is the only one."""
        if module.weight is None or len(self.sizes(module)[size]) > 1:
            raise ResizeError("it has no weight of one dimension; resize the layer before it.")
        return "weight", 0

    def measure(self, module: nn.Module, shapes: Mapping[str, tuple[int, ...]], counts: Mapping[str, int]) -> Sizes:
        """The shape is that of the weight."""
        return {"normalized_shape": shapes["weight"]} if "weight" in shapes else {}

    def complete(self, module: nn.Module, asked: Mapping[str, object]) -> Sizes:
        """The shape keeps its number of dimensions."""
        old = self.sizes(module)["normalized_shape"]
        shape = asked.get("normalized_shape", old)
        dims = tuple(shape) if isinstance(shape, (tuple, list)) else (shape,)
        new = tuple(_size("normalized_shape", size) for size in dims)
        if len(new) != len(old):
            has = counted(len(new), "dimension", "dimensions")
            raise ResizeError(f"normalized_shape={shape} has {has}, the layer has {len(old)}: {old}.")
        return {"normalized_shape": new}

    def axes(self, module: nn.Module, old: Sizes, new: Sizes) -> dict[str, Axes]:
        """Both tensors have the shape that is normalised."""
        pairs = zip(old["normalized_shape"], new["normalized_shape"], strict=True)
        axes = tuple(Axis((before,), (after,)) for before, after in pairs)
        return {"weight": axes, "bias": axes}

    def follow(self, name: str, axes: Axes) -> Sizes | None:
        """The shape is that of the tensor."""
        return {"normalized_shape": new_shape(axes)}

    def note(self, module: nn.Module, old: Sizes, new: Sizes) -> str | None:
        """The statistics run over other elements."""
        return "the statistics run over the new elements too, so the output of the old ones changes"


class TransformersLinear(Table):
    """The Conv1D of transformers, a Linear the other way round; it has no way to begin anew of its own."""

    def initialise(self, scratch: nn.Module) -> None:
        """What its constructor does."""
        nn.init.normal_(scratch.weight, std=0.02)  # type: ignore[arg-type]  # typed Tensor | Module
        nn.init.zeros_(scratch.bias)  # type: ignore[arg-type]  # typed Tensor | Module


_NORM = ("weight", "bias", "running_mean", "running_var")
TABLES: tuple[Layer, ...] = (
    Table(
        nn.Linear,
        tensors={"weight": ("out_features", "-in_features"), "bias": ("out_features",)},
    ),
    Table(
        nn.Bilinear,
        tensors={"weight": ("out_features", "-in1_features", "-in2_features"), "bias": ("out_features",)},
    ),
    Embeddings(
        nn.Embedding,
        nn.EmbeddingBag,
        tensors={"weight": ("num_embeddings", "embedding_dim")},
        outputs="embedding_dim",
    ),
    Table(
        nn.BatchNorm1d,
        nn.BatchNorm2d,
        nn.BatchNorm3d,
        nn.InstanceNorm1d,
        nn.InstanceNorm2d,
        nn.InstanceNorm3d,
        nn.SyncBatchNorm,
        tensors=dict.fromkeys(_NORM, ("num_features",)),
    ),
    GroupNorms(
        nn.GroupNorm,
        tensors={"weight": ("num_channels",), "bias": ("num_channels",)},
        others=("num_groups",),
    ),
    Slopes(nn.PReLU, tensors={"weight": ("num_parameters",)}),
    ShapedNorms(),
)
TRANSFORMERS_LINEAR = TransformersLinear(tensors={"weight": ("-nx", "nf"), "bias": ("nf",)}, outputs="nf")


def _axis(name: str, old: Sizes, new: Sizes) -> Axis:
    keyword = name.lstrip("-")
    return Axis((old[keyword],), (new[keyword],), reads=name.startswith("-"))


def _size(name: str, value: object) -> int:
    try:
        size = index(value)  # type: ignore[arg-type]  # refused just below
    except TypeError:
        size = 0
    if size < 1 or isinstance(value, bool):
        raise ResizeError(f"{name}={value!r} is not a size; a size is a whole number from 1 on.")
    return size
