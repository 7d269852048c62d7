"""Position embeddings of vision transformers for another number of patches."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

Grid = tuple[int, int]
Shape = tuple[int, ...]

MOST_PREFIX_TOKENS = 16
_ROWS_OF_CLASS = 3  # of a table: from the class token to patches, from these to it, and to itself
IMAGE_SIZES = ("image_size", "img_size")  # what modules call it
_NAMES = ("pos_embed", "position_embed", "positional_embed", "relative_position_bias", "rel_pos_bias")


@dataclass(frozen=True)
class Resampling:
    """How one tensor of positions becomes another.

    Attributes:
        shape: Of the result.
        old: Rows and columns of the source.
        new: Rows and columns of the result.
        prefix: Tokens before the patches, which are kept: class, distillation, registers.
        table: Whether it is a table of relative positions, (rows x columns, heads). What it has for the class token is
            at its end, and kept.
    """

    shape: Shape
    old: Grid
    new: Grid
    prefix: int
    table: bool = False

    def apply(self, values: torch.Tensor) -> torch.Tensor:
        """Give the resampled values, in the dtype of the old ones."""
        flat = values.reshape(-1, values.shape[-1]).float()
        first = math.prod(self.old) if self.table else self.prefix
        kept, patches = (flat[first:], flat[:first]) if self.table else (flat[:first], flat[first:])
        picture = patches.reshape(1, *self.old, -1).permute(0, 3, 1, 2)
        resized = functional.interpolate(picture, self.new, mode="bicubic", antialias=not self.table)
        new = resized.permute(0, 2, 3, 1).reshape(-1, values.shape[-1])
        return torch.cat([new, kept] if self.table else [kept, new]).reshape(self.shape).to(values.dtype)


def plan_resampling(
    name: str, old: Shape, new: Shape | None, grid: Grid | None = None, old_grid: Grid | None = None
) -> Resampling | None:
    """Find out how positions of one shape become those of another; None if shapes and name do not tell.

    Args:
        name: The key; tables of relative positions are recognised by it.
        old: `(1, tokens, channels)`, `(tokens, channels)`, or a table `((2 h - 1) (2 w - 1), heads)`.
        new: The model's; by default it follows from `grid`.
        grid: Rows and columns wanted; a square by default.
        old_grid: Rows and columns of the source; a square by default.

    Example:
        >>> plan_resampling("pos_embed", (1, 197, 8), (1, 577, 8))
        Resampling(shape=(1, 577, 8), old=(14, 14), new=(24, 24), prefix=1, table=False)
    """
    if len(old) not in (2, 3) or (len(old) == 3 and old[0] != 1):
        return None
    count, wanted = old[-2], new[-2] if new is not None and len(new) == len(old) else None
    prefix = _count_prefix(count, wanted, grid, old_grid)
    if prefix is None or (new is None and grid is None):
        return None
    new = new or (*old[:-2], prefix + math.prod(grid or ()), old[-1])
    if len(new) != len(old) or new[-1] != old[-1] or new[:-2] != old[:-2]:
        return None
    before, after = old_grid or _square(count - prefix), grid or _square(new[-2] - prefix)
    table = is_table(name)
    if before is None or after is None or (table and prefix not in (0, _ROWS_OF_CLASS)):
        return None
    if (math.prod(before), math.prod(after)) != (count - prefix, new[-2] - prefix):
        return None
    return Resampling(new, before, after, prefix, table)


def holds_positions(name: str) -> bool:
    """Whether a key is that of position embeddings, by its last two segments.

    Example:
        >>> holds_positions("vit.embeddings.position_embeddings"), holds_positions("head.weight")
        (True, False)
    """
    ending = ".".join(name.split(".")[-2:])
    return any(word in ending for word in _NAMES) and not ending.endswith("relative_position_index")


def is_table(name: str) -> bool:
    """Whether a key is that of a table of relative positions."""
    return "relative_position_bias" in name or "rel_pos_bias" in name


def find_grid(model: nn.Module, name: str) -> Grid | None:
    """Find the rows and columns that a tensor of positions has, from the sizes that modules around it have.

    Args:
        model: The model, as timm, torchvision, transformers or OpenCLIP build it.
        name: The key of the positions.
    """
    if not is_table(name):
        patches = find_patches(model, name)
        return None if patches is None else patch_grid(patches)
    window = _pair(vars(model.get_submodule(name.rpartition(".")[0])).get("window_size"))
    return None if window is None else (2 * window[0] - 1, 2 * window[1] - 1)


def find_patches(model: nn.Module, name: str) -> nn.Module | None:
    """Find the module nearest to a tensor of positions that has the number of patches in its attributes."""
    path = name.split(".")[:-1]
    for end in range(len(path), -1, -1):
        module = model.get_submodule(".".join(path[:end]))
        for each in (module, *module.children()):
            if patch_grid(each):
                return each
    return None


def patch_grid(module: nn.Module) -> Grid | None:
    """Read the rows and columns of patches from a module that has image and patch size, or the grid itself."""
    values = vars(module)
    grid, patch, image = values.get("grid_size"), patch_size(module), image_size(module)
    if isinstance(grid, tuple | list) and (found := _pair(grid)):
        return found
    return (image[0] // patch[0], image[1] // patch[1]) if image and patch else None


def patch_size(module: nn.Module) -> Grid | None:
    """Read the height and width of a patch from a module's attributes."""
    patch = _pair(vars(module).get("patch_size"))
    return patch if patch and all(patch) else None


def image_size(module: nn.Module) -> Grid | None:
    """Read the height and width of images from a module's attributes."""
    return next((size for name in IMAGE_SIZES if (size := _pair(vars(module).get(name)))), None)


def guess_grids(count: int, prefix: int) -> Iterator[Grid]:
    """Give the ways to lay tokens after the prefix in rows and columns, the most like a square first.

    Example:
        >>> list(guess_grids(22, 1))
        [(3, 7), (7, 3), (1, 21), (21, 1)]
    """
    patches = max(count - prefix, 0)
    for rows in range(math.isqrt(patches), 0, -1):
        if patches % rows == 0:
            yield from dict.fromkeys([(rows, patches // rows), (patches // rows, rows)])


def _pair(value: Any) -> Grid | None:
    if type(value) is int:
        return value, value
    pair = isinstance(value, tuple | list) and len(value) == 2 and all(type(each) is int for each in value)
    return (value[0], value[1]) if pair else None


def _count_prefix(old: int, new: int | None, grid: Grid | None, old_grid: Grid | None) -> int | None:
    """How many tokens stand before the patches."""
    if old_grid is not None:
        return _checked_prefix(old - math.prod(old_grid))
    if grid is not None and new is not None:
        return _checked_prefix(new - math.prod(grid))
    for prefix in range(min(MOST_PREFIX_TOKENS, old) + 1):
        if _square(old - prefix) and (new is None or _square(new - prefix)):
            return prefix
    return None


def _checked_prefix(count: int) -> int | None:
    return count if 0 <= count <= MOST_PREFIX_TOKENS else None


def _square(count: int) -> Grid | None:
    side = math.isqrt(max(count, 0))
    return (side, side) if side and side * side == count else None
