"""What stands in the way of changing a layer's tensors in place."""

from collections.abc import Mapping
from math import prod

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from modsurg.errors import ResizeError
from modsurg.surgery.resize.axes import Axes, old_shape
from modsurg.tree.walk import Tree


def refuse_rewritten(path: str, module: nn.Module) -> None:
    """Refuse a layer whose weight is made of something else, with the line that makes it plain.

    Raises:
        ResizeError: It is parametrized, weight-normed, pruned or lazy.
    """
    here, utils = f'model.get_submodule("{path}")', "torch.nn.utils"
    if any(is_lazy(t) for t in (*module.parameters(), *module.buffers())):
        raise ResizeError(f'"{path}" is lazy and has no sizes yet; run a batch through it first: model(batch).')
    for inner, owner in module.named_modules():
        spot = f'model.get_submodule("{path}.{inner}")' if inner else here
        for name in getattr(owner, "parametrizations", ()):
            fix = f'{utils}.parametrize.remove_parametrizations({spot}, "{name}")'
            raise ResizeError(f'"{path}" has a parametrized {name}; make it plain first: {fix}.')
        names = {*owner._parameters, *owner._buffers}
        for name in sorted(names):
            stem, _, tail = name.rpartition("_")
            if tail == "g" and f"{stem}_v" in names:
                fix = f'{utils}.remove_weight_norm({spot}, "{stem}")'
                raise ResizeError(f'"{path}" has a weight-normed {stem}; make it plain first: {fix}.')
            if tail == "orig":
                pruned = f"{stem}_mask" in names
                fix = f'{utils}.prune.remove({spot}, "{stem}")' if pruned else f"{utils}.remove_spectral_norm({spot})"
                how = "pruned" if pruned else "spectral-normed"
                raise ResizeError(f'"{path}" has a {how} {stem}; make it plain first: {fix}.')


def refuse_unknown(path: str, module: nn.Module, axes: dict[str, Axes]) -> list[str]:
    """Refuse a layer with a tensor that may have to change, and of which the layer's family says nothing.

    Returns:
        The further tensors that can stay as they are: none of their dimensions is a size that changes.

    Raises:
        ResizeError: A further tensor, one of another shape, a quantised one or one of a subclass.
    """
    kind = type(module).__name__
    changing = {prod(axis.old) for each in axes.values() for axis in each if axis.old != axis.new}
    staying = []
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if name not in axes:
            if not changing.isdisjoint(tensor.shape):
                raise ResizeError(f'"{path}" ({kind}) has a {name} of its own, of which nothing is known here.')
            staying.append(name)
            continue
        if old_shape(axes[name]) != tuple(tensor.shape):
            wanted = old_shape(axes[name])
            raise ResizeError(f'"{path}" ({kind}): its {name} is {tuple(tensor.shape)}, its sizes say {wanted}.')
    refuse_values(path, module, axes)
    return staying


def refuse_values(path: str, module: nn.Module, axes: dict[str, Axes]) -> None:
    """Refuse a layer of which a tensor that changes is quantised, or of a subclass.

    Raises:
        ResizeError: There is one.
    """
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        plain = type(tensor.data) is torch.Tensor
        if name in axes and not (plain and (tensor.is_floating_point() or tensor.is_complex())):
            what = tensor.dtype if plain else type(tensor.data).__name__
            kind = type(module).__name__
            raise ResizeError(f'"{path}" ({kind}): its {name} is a {what}, not a plain floating-point tensor.')


def refuse_shared_memory(tree: Tree, changing: Mapping[str, torch.Tensor]) -> None:
    """Refuse to give a tensor other memory that another one of the model lies in too, as a view of it does.

    Args:
        tree: The model.
        changing: The tensors that are about to change, by name.

    Raises:
        ResizeError: Such a tensor; the message has the line that gives it memory of its own.
    """
    known: dict[int, list[tuple[str, torch.Tensor]]] = {}
    for mine, other in changing.items():
        if _has_memory(other):
            known.setdefault(other.untyped_storage().data_ptr(), []).append((mine, other))
    for path, module in tree.modules.items() if known else ():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or not _has_memory(tensor):
                continue
            for mine, other in known.get(tensor.untyped_storage().data_ptr(), ()):
                if tensor is not other and _overlap(tensor, other):
                    raise ResizeError(
                        f'"{path}.{name}" lies in the memory of "{mine}" and can\'t follow it; give it its own first: '
                        f't = model.get_submodule("{path}").{name}; t.data = t.data.clone().'
                    )


def _has_memory(tensor: torch.Tensor) -> bool:
    plain = not is_lazy(tensor) and type(tensor.data) is torch.Tensor and tensor.layout is torch.strided
    return plain and not tensor.is_meta and tensor.numel() > 0


def _overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    (first, last), (start, end) = _span(one), _span(other)
    return first < end and start < last


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()
