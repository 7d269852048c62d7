"""Position embeddings of vision transformers for another number of patches."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

Grid = tuple[int, int]
Shape = tuple[int, ...]

_MOST_PREFIX_TOKENS = 16


@dataclass(frozen=True)
class Resampling:
    """How one tensor of positions becomes another.

    Attributes:
        shape: Of the result.
        old: Rows and columns of the source.
        new: Rows and columns of the result.
        prefix: Tokens before the patches, which are kept: class, distillation, registers.
        table: Whether it is a table of relative positions, (rows x columns, heads).
    """

    shape: Shape
    old: Grid
    new: Grid
    prefix: int
    table: bool = False

    def apply(self, values: torch.Tensor) -> torch.Tensor:
        """Give the resampled values, in the dtype of the old ones."""
        flat = values.reshape(-1, values.shape[-1]).float()
        kept, patches = flat[: self.prefix], flat[self.prefix :]
        picture = patches.reshape(1, *self.old, -1).permute(0, 3, 1, 2)
        resized = functional.interpolate(picture, self.new, mode="bicubic", antialias=not self.table)
        new = resized.permute(0, 2, 3, 1).reshape(-1, values.shape[-1])
        return torch.cat([kept, new]).reshape(self.shape).to(values.dtype)


def plan_resampling(
    name: str, old: Shape, new: Shape | None, grid: Grid | None = None, old_grid: Grid | None = None
) -> Resampling | None:
    """Find out how positions of one shape become those of another; None if shapes and name do not tell.

    Args:
        name: The key; tables of relative positions are known by it.
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
    tokens = old[-2]
    table = "relative_position_bias" in name or "rel_pos_bias" in name
    if new is None:
        if grid is None:
            return None
        prefix = _prefix(tokens, None, None, old_grid)
        new = (*old[:-2], (prefix or 0) + math.prod(grid), old[-1])
    if len(new) != len(old) or new[-1] != old[-1] or new[:-2] != old[:-2]:
        return None
    prefix = _prefix(tokens, new[-2], grid, old_grid)
    if prefix is None or (table and prefix):
        return None
    before = old_grid or _square(tokens - prefix)
    after = grid or _square(new[-2] - prefix)
    if before is None or after is None:
        return None
    if (math.prod(before), math.prod(after)) != (tokens - prefix, new[-2] - prefix):
        return None
    return Resampling(new, before, after, prefix, table)


def holds_positions(name: str) -> bool:
    """Whether a key is that of position embeddings, by its last two segments.

    Example:
        >>> holds_positions("vit.embeddings.position_embeddings"), holds_positions("head.weight")
        (True, False)
    """
    ending = ".".join(name.split(".")[-2:])
    return any(word in ending for word in ("pos_embed", "position_embed", "positional_embed", "relative_position_bias"))


def find_grid(module: nn.Module) -> Grid | None:
    """The rows and columns of patches that a model of timm or transformers says it has, beside its positions."""
    for child in module.children():
        grid = vars(child).get("grid_size")
        if grid is not None and _is_grid(grid):
            return grid[0], grid[1]
        image, patch = (_pair(vars(child).get(name)) for name in ("image_size", "patch_size"))
        if image and patch and all(patch):
            return image[0] // patch[0], image[1] // patch[1]
    return None


def _is_grid(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and all(type(each) is int for each in value)


def _pair(value: Any) -> Grid | None:
    if type(value) is int:
        return value, value
    return (value[0], value[1]) if _is_grid(value) else None


def _prefix(old: int, new: int | None, grid: Grid | None, old_grid: Grid | None) -> int | None:
    """How many tokens stand before the patches."""
    if old_grid is not None:
        return _not_negative(old - math.prod(old_grid))
    if grid is not None and new is not None:
        return _not_negative(new - math.prod(grid))
    for prefix in range(min(_MOST_PREFIX_TOKENS, old) + 1):
        if _square(old - prefix) and (new is None or _square(new - prefix)):
            return prefix
    return None


def _not_negative(count: int) -> int | None:
    return count if count >= 0 else None


def _square(count: int) -> Grid | None:
    side = math.isqrt(max(count, 0))
    return (side, side) if side and side * side == count else None
