"""What follows a resize as plain data, so that a recipe repeats it without running the model."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from modsurg.errors import RecipeError
from modsurg.surgery.resize.axes import Axes, Axis, old_shape
from modsurg.surgery.resize.resize import layer_of
from modsurg.surgery.resize.values import LayerPlan
from modsurg.tree.walk import Tree


def describe_plans(tree: Tree, plans: Sequence[LayerPlan]) -> dict[str, Any]:
    """Describe which places of each tensor stay; lists of places that several tensors share are written once.

    Returns:
        `layers`: for each layer its path, tensors and attributes; `places`: for each new place the old one, or -1.
    """
    numbers: dict[tuple[int, ...], int] = {}

    def write(axis: Axis) -> list[Any]:
        places = axis.source.tolist() if axis.changes else None
        number = None if places is None else numbers.setdefault(tuple(places), len(numbers))
        return [len(axis.source) if places is None else axis.old_size, axis.reads, number]

    layers = [
        {
            "path": plan.path,
            "follows": plan.follows,
            "sizes": {name: [old, plan.new[name]] for name, old in plan.old.items()},
            "tensors": {name: [write(axis) for axis in axes] for name, axes in plan.axes.items()},
            "attributes": [[tree.paths[id(owner)][0], name, value] for owner, name, value in plan.attributes],
        }
        for plan in plans
    ]
    return {"layers": layers, "places": [list(places) for places in numbers]}


def read_plans(tree: Tree, recorded: Mapping[str, Any]) -> list[LayerPlan]:
    """Read what `describe_plans` wrote, for another copy of the model.

    Raises:
        RecipeError: A layer is not there, or its tensors have other shapes.
    """
    places = [torch.tensor(each, dtype=torch.long) for each in recorded["places"]]
    plans = []
    for layer in recorded["layers"]:
        path = layer["path"]
        if path not in tree.modules:
            raise RecipeError(f'the recipe resizes "{path}", and there is no such module here.')
        module = tree.modules[path]
        axes = {name: tuple(_read(axis, places) for axis in each) for name, each in layer["tensors"].items()}
        _check(path, {**dict(module.named_parameters()), **dict(module.named_buffers())}, axes)
        attributes = [_attribute(tree, *each) for each in layer["attributes"]]
        old, new = ({name: pair[n] for name, pair in layer["sizes"].items()} for n in (0, 1))
        plans.append(LayerPlan(path, module, layer_of(module), old, new, axes, attributes, follows=layer["follows"]))
    return plans


def _read(recorded: Sequence[Any], places: Sequence[torch.Tensor]) -> Axis:
    size, reads, number = recorded
    chosen = None if number is None else places[number]
    return Axis((size,), (size if chosen is None else len(chosen),), reads, chosen)


def _check(path: str, tensors: Mapping[str, torch.Tensor], axes: Mapping[str, Axes]) -> None:
    for name, mine in axes.items():
        shape = tuple(tensors[name].shape) if name in tensors else None
        if shape != old_shape(mine):
            raise RecipeError(
                f'the recipe resizes "{path}.{name}" of shape {old_shape(mine)}; here it has the shape {shape}.'
            )


def _attribute(tree: Tree, path: str, name: str, value: Any) -> tuple[nn.Module, str, Any]:
    """An attribute that holds sizes, and its new value; nothing else of a module is set by a recipe."""
    owner = tree.modules.get(path)
    known = vars(owner).get(name) if owner is not None else None
    items = value if isinstance(value, list) else [value]
    if owner is None or type(known) not in (int, tuple, list) or not all(type(item) is int for item in items):
        raise RecipeError(f'the recipe sets "{path}.{name}" to {value!r:.80}, which is not a size there.')
    make: Any = type(known)
    return owner, name, make(value)
