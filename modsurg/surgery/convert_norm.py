"""Replace normalisation layers by another kind: `convert_norm`."""

from collections import Counter, OrderedDict
from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from modsurg.errors import EditError
from modsurg.surgery.api import edit
from modsurg.surgery.ops.norms import activation_of
from modsurg.surgery.preflight import Example
from modsurg.surgery.report import Report
from modsurg.tree.selection import Selection, Where, select

NormKind: TypeAlias = Literal["group", "sync", "batch", "layer"]

_GROUPS = 32
_BATCH_NORMS: dict[int, type[_BatchNorm]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_NORMS = (_BatchNorm, _InstanceNorm, nn.GroupNorm)


def convert_norm(
    model: nn.Module,
    where: Where,
    to: NormKind,
    *,
    count: int | None = None,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    scheduler: LRScheduler | Sequence[LRScheduler] | None = None,
    example: Example | None = None,
) -> Report:
    """Replace BatchNorm, InstanceNorm and GroupNorm layers by another kind; weight and bias are carried over.

    Args:
        model: Edited in place.
        where: Which norms: a path, glob, class, ...; see `select`. Layers of other classes below it are left alone.
        to: The new kind, over C channels:

            - `"group"`: `nn.GroupNorm` with 32 groups, or the largest divisor of C below (Wu and He, "Group
              Normalization", 2018).
            - `"layer"`: `nn.GroupNorm` with one group: normalises each sample over channels and space, with a weight
              for each channel.
            - `"sync"`: `nn.SyncBatchNorm`; running statistics are carried over.
            - `"batch"`: `nn.BatchNorm1d`, `2d` or `3d`, as the old class or the example tells; running statistics are
              carried over from another BatchNorm, and otherwise start at mean 0 and variance 1.

            Of timm's norms with an activation, the activation stays, behind the new norm.
        count: Expected number of matches.
        optimizer: Follows the edit.
        scheduler: Likewise.
        example: What forward takes: the edited model is tried on it.

    Returns:
        The report; it says what was not carried over.

    Raises:
        EditError: Something that can't be converted, by its path; nothing was changed.
        NoMatchError: Nothing at `where`.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 48, 3), nn.BatchNorm2d(48), nn.ReLU())
        >>> report = convert_norm(model, nn.BatchNorm2d, "group")
        >>> model[1]
        GroupNorm(24, 48, eps=1e-05, affine=True...)
    """
    if to not in get_args(NormKind):
        raise EditError(f"to={to!r} must be one of {', '.join(map(repr, get_args(NormKind)))}; nothing was changed.")
    selection = _select_norms(model, where, count)
    dimensions = _usual_dimensions(model)
    new = {id(site.module): _convert(site.path, site.module, to, dimensions) for site in selection}
    with edit(model, optimizer=optimizer, scheduler=scheduler, example=example) as e:
        e.replace(selection, lambda old: new[id(old)])
        for text in _notes(selection, to):
            e.note(text)
    return e.report


def _select_norms(model: nn.Module, where: Where, count: int | None) -> Selection:
    """Return the norms at `where` and below it."""
    found = select(model, where, count=count)
    norms = select(model, lambda path, module: isinstance(module, (*_NORMS, nn.LayerNorm)))
    inside = {id(module) for site in found for module in site.module.modules()}
    chosen = Selection(norms.model, tuple(site for site in norms if id(site.module) in inside))
    if not len(chosen):
        raise EditError(f"no normalisation layer at {where!r}; nothing was changed.")
    return chosen


def _convert(path: str, old: nn.Module, to: NormKind, dimensions: int) -> nn.Module:
    if isinstance(old, nn.LayerNorm):
        raise EditError(
            f'"{path}" is a LayerNorm over the last dimensions, which are not channels to BatchNorm and GroupNorm; '
            f'nothing was changed. Try: replace(model, "{path}", ...)'
        )
    if isinstance(old, nn.modules.lazy.LazyModuleMixin) and old.has_uninitialized_params():
        raise EditError(f'"{path}" has no size yet; nothing was changed. Run the model once before')
    new = _make(old, to, dimensions)
    if to in ("batch", "sync") and isinstance(old, _BatchNorm):
        for name, buffer in old._buffers.items():
            new._buffers[name] = None if buffer is None else buffer.clone()
    for name in ("weight", "bias"):
        parameter = old._parameters.get(name)
        if parameter is not None:
            new._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
    act = activation_of(old)
    return new if act is None else nn.Sequential(OrderedDict(norm=new, act=act))


def _make(old: nn.Module, to: NormKind, dimensions: int) -> nn.Module:
    """Return a new norm of as many channels, with the old one's options where both have them."""
    channels = _channels(old)
    epsilon = float(old.eps)  # type: ignore[arg-type]  # a number in each of these classes
    affine = old._parameters.get("weight") is not None
    if to in ("group", "layer"):
        groups = 1 if to == "layer" else max(n for n in range(1, _GROUPS + 1) if channels % n == 0)
        return nn.GroupNorm(groups, channels, epsilon, affine)
    momentum = old.momentum if isinstance(old, _BatchNorm) else 0.1
    tracks = not isinstance(old, _BatchNorm) or old.track_running_stats
    kind = nn.SyncBatchNorm if to == "sync" else _BATCH_NORMS[_dimensions(old) or dimensions]
    return kind(channels, epsilon, momentum, affine, tracks)


def _channels(old: nn.Module) -> int:
    channels = old.num_channels if isinstance(old, nn.GroupNorm) else old.num_features
    assert isinstance(channels, int)
    return channels


def _dimensions(norm: nn.Module) -> int | None:
    """Return the number of spatial dimensions that the class tells."""
    kinds = {1: (nn.BatchNorm1d, nn.InstanceNorm1d), 2: (nn.BatchNorm2d, nn.InstanceNorm2d)}
    kinds[3] = (nn.BatchNorm3d, nn.InstanceNorm3d)
    return next((number for number, classes in kinds.items() if isinstance(norm, classes)), None)


def _usual_dimensions(model: nn.Module) -> int:
    """Return the number of spatial dimensions of most convolutions; 2 where there are none."""
    kinds = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
    found = Counter(number for module in model.modules() for kind, number in kinds.items() if isinstance(module, kind))
    return found.most_common(1)[0][0] if found else 2


def _notes(selection: Selection, to: NormKind) -> list[str]:
    """Say what was not carried over."""
    dropped = sum(_has_statistics(module) for module in selection.modules) if to in ("group", "layer") else 0
    fresh = sum(not isinstance(module, _BatchNorm) for module in selection.modules) if to in ("batch", "sync") else 0
    notes = [f"running statistics of {dropped} norms were dropped: the new ones have none"] if dropped else []
    if fresh:
        notes.append(f"running statistics of {fresh} norms start at mean 0 and variance 1: train before evaluating")
    return notes


def _has_statistics(norm: nn.Module) -> bool:
    return isinstance(norm._buffers.get("running_mean"), torch.Tensor)
