"""Numbers that say where they come from: an attribute of a module, or a size of a tensor."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from modsurg.tracing.labels import Dim
from modsurg.tree.walk import Tree


@dataclass(frozen=True, slots=True)
class Attribute:
    """A whole number that a module holds.

    Attributes:
        path: Of the module.
        name: Of the attribute.
        index: Its position, where the attribute is a tuple or a list.
    """

    path: str
    name: str
    index: int | None = None


class Size(int):
    """A number that also has a source; computing with it gives plain numbers.

    Attributes:
        source: Where it comes from.
        checks: Takes each attribute that code compares with a dimension of its size, as in `x.size(-1) != self.width`.
    """

    source: "Attribute | Dim"
    checks: "list[tuple[Size, Dim]]"

    def __new__(cls, value: int, source: "Attribute | Dim", checks: "list[tuple[Size, Dim]]") -> "Size":
        """Make a number of that value."""
        made = super().__new__(cls, value)
        made.source, made.checks = source, checks
        return made

    def __eq__(self, other: object) -> bool:
        same = int.__eq__(self, other)
        if same is True and isinstance(other, Size):
            for one, two in ((self, other.source), (other, self.source)):
                if isinstance(one.source, Attribute) and isinstance(two, tuple):
                    self.checks.append((one, two))
        return same

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = int.__hash__


def mark_attributes(tree: Tree, checks: list[tuple[Size, Dim]]) -> None:
    """Let the numbers that modules of a copied model hold say where they come from."""
    for paths in tree.paths.values():
        module = tree.modules[paths[0]]
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for name, value in list(vars(module).items()):
            if type(value) is int:
                vars(module)[name] = Size(value, Attribute(paths[0], name), checks)
            elif type(value) in (tuple, list, torch.Size) and value and all(type(each) is int for each in value):
                marked = [Size(each, Attribute(paths[0], name, n), checks) for n, each in enumerate(value)]
                vars(module)[name] = type(value)(marked)


def uses(
    name: str, args: Any, kwargs: Any, out: Any, dims: Callable[[torch.Tensor], list[Dim]]
) -> list[tuple[Size, Dim]]:
    """The sized arguments of a torch function, each with the dimension of the result that has this size."""
    rule = _RULES.get(name)
    if rule is None:
        return []
    return [(size, dim) for size, dim in rule(args, kwargs, out, dims) if isinstance(size, Size)]


Found = list[tuple[Any, Dim]]
Dimensions = Callable[[torch.Tensor], list[Dim]]


def _shape(args: Any, kwargs: Any, out: Any, dims: Dimensions) -> Found:
    """`view`, `reshape` and `expand` are given all the sizes."""
    sizes = args[1:] or (kwargs.get("shape") or kwargs.get("size"),)
    sizes = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes
    given = [(size, dim) for size, dim in zip(sizes, dims(out), strict=False)]
    return given if len(sizes) == out.dim() else []


def _unflatten(args: Any, kwargs: Any, out: Any, dims: Dimensions) -> Found:
    sizes = args[2] if len(args) > 2 else kwargs["sizes"]
    at = args[1] % args[0].dim()
    return list(zip(sizes, dims(out)[at : at + len(sizes)], strict=False))


def _split(args: Any, kwargs: Any, out: Any, dims: Dimensions) -> Found:
    sizes = (
        args[1] if len(args) > 1 else next(kwargs[n] for n in ("split_size", "split_size_or_sections") if n in kwargs)
    )
    at = args[2] if len(args) > 2 else kwargs.get("dim", 0)
    each = sizes if isinstance(sizes, (tuple, list)) else [sizes] * len(out)
    return [(size, dims(piece)[at]) for size, piece in zip(each, out, strict=False) if piece.shape[at] == size]


def _getitem(args: Any, kwargs: Any, out: Any, dims: Dimensions) -> Found:
    key = args[1] if isinstance(args[1], tuple) else (args[1],)
    if any(isinstance(each, torch.Tensor) for each in key) or any(each is None for each in key):
        return []
    if Ellipsis in key:
        at = key.index(Ellipsis)
        key = (*key[:at], *[slice(None)] * (args[0].dim() - len(key) + 1), *key[at + 1 :])
    left = [each for each in key if isinstance(each, slice)]
    return [(each.stop, dim) for each, dim in zip(left, dims(out), strict=False) if not each.start]


def _layer_norm(args: Any, kwargs: Any, out: Any, dims: Dimensions) -> Found:
    shape = args[1] if len(args) > 1 else kwargs["normalized_shape"]
    return list(zip(shape, dims(out)[-len(shape) :], strict=True))


def _narrow(args: Any, kwargs: Any, out: Any, dims: Dimensions) -> Found:
    at, length = (args[n] if len(args) > n else kwargs[k] for n, k in ((1, "dim"), (3, "length")))
    return [(length, dims(out)[at])]


_RULES: dict[str, Callable[[Any, Any, Any, Dimensions], Found]] = {
    **dict.fromkeys(("view", "reshape", "expand"), _shape),
    "unflatten": _unflatten,
    **dict.fromkeys(("split", "split_with_sizes"), _split),
    "__getitem__": _getitem,
    **dict.fromkeys(("layer_norm", "rms_norm"), _layer_norm),
    "narrow": _narrow,
}
