"""A vision transformer for another image size: its position embeddings, and the sizes that its modules have."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from modsurg.errors import ResizeError
from modsurg.surgery.journal import Journal
from modsurg.surgery.resize.axes import Axes, Axis, fixed
from modsurg.surgery.resize.checks import refuse_shared_memory, refuse_values
from modsurg.surgery.resize.layers import Layer
from modsurg.surgery.resize.values import LayerPlan, Resized, changing_tensors, write_plans
from modsurg.tree.positions import (
    IMAGE_SIZES,
    MOST_PREFIX_TOKENS,
    Grid,
    Resampling,
    Shape,
    find_patches,
    holds_positions,
    image_size,
    is_table,
    patch_grid,
    patch_size,
    plan_resampling,
)
from modsurg.tree.walk import Tree

ImageSize = int | tuple[int, int]


class Positions(Layer):
    """Tensors that have a row for each patch.

    Args:
        resamplings: How position embeddings change, by their old shape.
    """

    def __init__(self, resamplings: Mapping[Shape, Resampling]) -> None:
        self._resamplings = resamplings

    def initialise(self, scratch: nn.Module) -> None:
        """Leave the new tensors as they are: each is filled whole."""

    def carry(self, module: nn.Module, old: torch.Tensor, new: torch.Tensor, axes: Axes) -> None:
        """Resample position embeddings; count the numbers of the positions."""
        if old.is_floating_point():
            new.copy_(self._resamplings[tuple(old.shape)].apply(old))
        else:
            new.copy_(torch.arange(new.numel(), device=new.device).view(new.shape))


def resize_images(
    tree: Tree, sites: Sequence[tuple[str, nn.Module]], wanted: object, journal: Journal
) -> list[Resized]:
    """Resample the position embeddings within `sites` (path and module) for images of another size.

    Tokens before the patches are kept. Attributes that say how large images are, and how many patches they have, get
    the new numbers. Everything is worked out before the first change.

    Raises:
        ResizeError: There is nothing of this kind, or something that can't follow. Nothing was changed.
    """
    size = _checked(wanted)
    plans = [plan for path, module in sites for plan in _plan_site(path, module, size)]
    refuse_shared_memory(tree, changing_tensors(plans))
    return write_plans(plans, "zeros", journal)


def _checked(wanted: object) -> Grid:
    pair = (wanted, wanted) if type(wanted) is int else wanted
    if isinstance(pair, tuple | list) and len(pair) == 2 and all(type(each) is int and each > 0 for each in pair):
        return pair[0], pair[1]
    raise ResizeError(f"image_size={wanted!r} must be a positive integer, or height and width: image_size=(224, 448).")


def _plan_site(path: str, module: nn.Module, size: Grid) -> list[LayerPlan]:
    plans: dict[int, LayerPlan] = {}
    resamplings: dict[Shape, Resampling] = {}
    found: dict[int, nn.Module] = {}
    for name, tensor in module.named_parameters():
        patches = find_patches(module, name) if holds_positions(name) and not is_table(name) else None
        resampling = _plan_tensor(path, name, tensor, patches, size)
        if patches is None or resampling is None:
            continue
        found[id(patches)] = patches
        resamplings[tuple(tensor.shape)] = resampling
        _add(plans, path, module, name, _axes(resampling, tuple(tensor.shape)), Positions(resamplings))
    if not plans:
        raise ResizeError(
            f'"{path}" is a {type(module).__name__} without position embeddings for a known number of patches; '
            "image_size= is for vision transformers of timm, torchvision, transformers and OpenCLIP."
        )
    _refuse_others(path, module)
    counts = {resampling.prefix + math.prod(resampling.old): resampling for resampling in resamplings.values()}
    for name, buffer in module.named_buffers():
        resampling = counts.get(buffer.numel()) if name.endswith("position_ids") else None
        if resampling is not None and torch.equal(buffer.flatten().cpu(), torch.arange(buffer.numel())):
            axes = (*fixed(*buffer.shape[:-1]), _rows(resampling))
            _add(plans, path, module, name, axes, Positions(resamplings))
    first, grids = next(iter(plans.values())), {patch_grid(each) for each in found.values()}
    for each in module.modules():
        if patch_grid(each) in grids:
            first.attributes += [(each, name, value) for name, value in _numbers(path, each, size)]
    old = next((old for each in found.values() if (old := image_size(each))), None)
    for plan in plans.values():
        plan.old, plan.new = {"image_size": _short(old)}, {"image_size": _short(size)}
        refuse_values(plan.path, plan.module, {n: a for n, a in plan.axes.items() if not n.endswith("position_ids")})
    return list(plans.values())


def _plan_tensor(
    path: str, name: str, tensor: torch.Tensor, patches: nn.Module | None, size: Grid
) -> Resampling | None:
    """How a parameter changes; None if it does not depend on the image size.

    Raises:
        ResizeError: It does, and can't follow.
    """
    grid, patch = (patch_grid(patches), patch_size(patches)) if patches is not None else (None, None)
    if grid is None or patch is None:
        return None
    if any(length % step for length, step in zip(size, patch, strict=True)):
        near = tuple(max(step, round(length / step) * step) for length, step in zip(size, patch, strict=True))
        raise ResizeError(f"images of {size} are not whole patches of {patch}. Try: image_size={_short(near)!r}.")
    new = size[0] // patch[0], size[1] // patch[1]
    resampling = plan_resampling(name, tuple(tensor.shape), None, new, grid)
    if resampling is None and tensor.dim() != 2:  # in two dimensions, positions in a text
        where = f"{path}.{name}".lstrip(".")
        raise ResizeError(f'"{where}" is {tuple(tensor.shape)}, and the model has {grid} patches: it can\'t follow.')
    return resampling


def _refuse_others(path: str, module: nn.Module) -> None:
    """Refuse a model that has other tensors which depend on the image size."""
    for name, each in module.named_modules():
        tables = [key for key in (*each._parameters, *each._buffers) if is_table(key)]
        if tables or "feat_shape" in vars(each):
            what = f"its {tables[0]} depends" if tables else "its rotary positions depend"
            place = f"{path}.{name}".strip(".")
            raise ResizeError(
                f'"{place}" is a {type(each).__name__}, and {what} on the image size too and can\'t follow. Build the '
                'model for that size: load_state(new, model.state_dict(), on_mismatch="interpolate").'
            )


def _add(plans: dict[int, LayerPlan], path: str, site: nn.Module, name: str, axes: Axes, layer: Positions) -> None:
    """Plan one tensor, in the plan of the module that holds it."""
    inside, _, attribute = name.rpartition(".")
    holder = site.get_submodule(inside)
    if "parametrizations" in name:
        raise ResizeError(f'"{path}.{name}" is parametrized; make it plain first: remove_parametrizations(...).')
    where = f"{path}.{inside}".strip(".")
    plan = plans.setdefault(id(holder), LayerPlan(where, holder, layer, {}, {}, {}, [], follows=bool(plans)))
    plan.axes[attribute] = axes
    if isinstance(holder, nn.Embedding):
        plan.attributes.append((holder, "num_embeddings", math.prod(axes[0].new)))


def _axes(resampling: Resampling, shape: Shape) -> Axes:
    return (*fixed(*shape[:-2]), _rows(resampling), *fixed(shape[-1]))


def _rows(resampling: Resampling) -> Axis:
    """The tokens before the patches are kept; the others are new."""
    old, new = (resampling.prefix + math.prod(grid) for grid in (resampling.old, resampling.new))
    if resampling.old == resampling.new:
        return Axis((old,), (new,))
    chosen = torch.full((new,), -1)
    chosen[: resampling.prefix] = torch.arange(resampling.prefix)
    return Axis((old,), (new,), chosen=chosen)


def _numbers(path: str, module: nn.Module, size: Grid) -> Iterator[tuple[str, Any]]:
    """The new numbers of images and patches in a module's attributes, by name."""
    values, old, patch = vars(module), patch_grid(module), patch_size(module)
    if old is None or patch is None:
        return
    new = size[0] // patch[0], size[1] // patch[1]
    for name in IMAGE_SIZES:
        if type(values.get(name)) is int and size[0] != size[1]:
            kind = type(module).__name__
            raise ResizeError(f'"{path}": the {name} of its {kind} is one number, so images must be square.')
        if name in values:
            yield name, size[0] if type(values[name]) is int else type(values[name])(size)
    if isinstance(values.get("grid_size"), tuple | list):
        yield "grid_size", type(values["grid_size"])(new)
    for name in ("num_patches", "num_positions", "seq_length"):
        more = values[name] - math.prod(old) if type(values.get(name)) is int else -1
        if 0 <= more <= MOST_PREFIX_TOKENS:
            yield name, math.prod(new) + more


def _short(size: tuple[int, ...] | None) -> object:
    """One number for a square."""
    return size[0] if size and len(set(size)) == 1 else size
