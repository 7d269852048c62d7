"""Fold BatchNorm into the layer before it: `fuse`."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from modsurg.errors import EditError, ExampleError, counted
from modsurg.surgery.api import edit
from modsurg.surgery.ops.norms import activation_of, affine_of, is_batch_norm, is_frozen_norm
from modsurg.surgery.preflight import Example
from modsurg.surgery.report import Report
from modsurg.tracing.data_flow import DataFlow, ModuleCall, record_data_flow
from modsurg.tree.walk import Tree, walk
from modsurg.tree.wrappers import unwrap

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)


def fuse(
    model: nn.Module,
    *,
    example: Example,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    scheduler: LRScheduler | Sequence[LRScheduler] | None = None,
) -> Report:
    r"""Fold each BatchNorm into the convolution or Linear before it, for the same output in less time.

    A pair is found by data flow, not by name: the norm is the only user of what the layer returns. The layer gets new
    weights, the norm becomes `nn.Identity` (of timm's norms with an activation, that activation stays). In evaluation
    the output is the same up to rounding; the weights are computed in float64:
    \(w' = w \gamma / \sqrt{v + \epsilon}\), \(b' = (b - m) \gamma / \sqrt{v + \epsilon} + \beta\) (Jacob et al.,
    "Quantization and Training of Neural Networks", 2018, section 3.2).

    Args:
        model: Edited in place; its norms must be in evaluation mode.
        example: What forward takes, or a shape: a copy runs on meta, nothing is computed.
        optimizer: Follows the edit.
        scheduler: Likewise.

    Returns:
        The report: what was folded, and how many norms were left alone and why.

    Raises:
        EditError: A norm is in training mode, or none can be folded.
        ExampleError: The model does not run on the example.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> print(fuse(model, example=(1, 3, 8, 8)))
        ~ 0  Conv2d(3, 8, ...) -> Conv2d(3, 8, ...)
        ~ 1  BatchNorm2d(8, ...) -> Identity
          1 norm was folded into the layer before it
    """
    root = unwrap(model)
    tree = walk(root)
    norms = {id(module): module for module in tree.modules.values() if is_batch_norm(module) or is_frozen_norm(module)}
    training = next((tree.paths[key][0] for key, norm in norms.items() if norm.training and is_batch_norm(norm)), None)
    if training is not None:
        raise EditError(
            f'"{training}" is in training mode, and its statistics would go on changing. '
            "Try: fuse(model.eval(), example=...)"
        )
    pairs, left = _find_pairs(tree, _record(root, example), norms)
    if not pairs:
        raise EditError(f"no BatchNorm can be folded{_reasons(left)}; nothing was changed.")
    new = {id(pair.layer): _fold(pair.layer, pair.norm) for pair in pairs}
    new |= {id(pair.norm): activation_of(pair.norm) or nn.Identity() for pair in pairs}
    with edit(model, optimizer=optimizer, scheduler=scheduler, example=example) as e:
        e.replace(lambda path, module: id(module) in new, lambda old: new[id(old)])
        e.note(f"{counted(len(pairs), 'norm was', 'norms were')} folded into the layer before it{_reasons(left)}")
    return e.report


@dataclass(frozen=True, slots=True)
class _Pair:
    """A layer, and the norm that alone uses what it returns."""

    layer_path: str
    layer: nn.Module
    norm_path: str
    norm: nn.Module


def _record(root: nn.Module, example: Example) -> DataFlow:
    try:
        return record_data_flow(root, example)
    except Exception as error:
        raise ExampleError(f"the model does not run on the example; nothing was changed. {error}") from error


def _find_pairs(tree: Tree, flow: DataFlow, norms: dict[int, nn.Module]) -> tuple[list[_Pair], Counter[str]]:
    """Return the pairs, and how many norms are left alone for each reason."""
    calls = Counter(call.path for call in flow.calls)
    makers = {
        id(tensor): call for call in flow.calls for tensor in call.outputs if isinstance(_at(tree, call), _LAYERS)
    }
    returned = {id(tensor) for tensor in flow.outputs}
    users = Counter(id(each) for module in tree.modules.values() for each in _own_tensors(module))
    pairs, left = [], Counter[str]()
    for call in flow.calls:
        norm = _at(tree, call)
        if id(norm) not in norms:
            continue
        maker = makers.get(id(call.inputs[0])) if call.inputs else None
        if maker is None:
            left["do not follow a convolution or Linear"] += 1
            continue
        pair = _Pair(maker.path, _at(tree, maker), call.path, norm)
        output = call.inputs[0]
        if calls[pair.layer_path] > 1 or calls[pair.norm_path] > 1:
            left["are called several times, or their layer is"] += 1
        elif flow.uses[id(output)] > 1 or id(output) in returned:
            left["share what the layer returns with something else"] += 1
        elif reason := _obstacle(pair, output, users, tree):
            left[reason] += 1
        else:
            pairs.append(pair)
    if uncalled := sum(not calls.keys() & set(tree.paths[key]) for key in norms):
        left["are not called in evaluation"] = uncalled
    return pairs, left


def _obstacle(pair: _Pair, output: Tensor, users: Counter[int], tree: Tree) -> str:
    """Say why a pair can't be folded; empty where it can."""
    layer, norm = pair.layer, pair.norm
    if type(layer).forward not in {kind.forward for kind in _LAYERS} or layer._modules:
        return "follow a layer that changes its weights in forward"
    if isinstance(norm, nn.BatchNorm1d) and isinstance(layer, nn.Linear) and output.ndim != 2:
        return "normalise another dimension than that of the Linear before"
    if is_batch_norm(norm) and norm.running_mean is None:
        return "have no running statistics"
    if any(hooks for module in (layer, norm) for hooks in (module._forward_hooks, module._forward_pre_hooks)):
        return "have hooks, or their layer has"
    if any(users[id(each)] > 1 for module in (layer, norm) for each in _own_tensors(module)):
        return "share weights with another layer, or their layer does"
    if activation_of(norm) is None and not _is_plain_norm(norm):
        return "are of a class that does more than normalise"
    return ""


def _is_plain_norm(norm: nn.Module) -> bool:
    return is_frozen_norm(norm) or type(norm).forward in {nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward}


def _fold(layer: nn.Module, norm: nn.Module) -> nn.Module:
    """Return the layer with the weights that do the work of both."""
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]
    assert weight is not None
    gamma, beta, mean, variance, epsilon = affine_of(norm)
    scale = gamma / torch.sqrt(variance + epsilon)
    wide = weight.detach().double()
    if isinstance(layer, _ConvTransposeNd):
        groups = layer.groups
        split = wide.reshape(groups, wide.shape[0] // groups, *wide.shape[1:])
        folded = (split * scale.reshape(groups, 1, -1, *[1] * (wide.ndim - 2))).reshape(wide.shape)
    else:
        folded = wide * scale.reshape(-1, *[1] * (wide.ndim - 1))
    old_bias = torch.zeros_like(mean) if bias is None else bias.detach().double()
    new = copy(layer)
    new._parameters = dict(layer._parameters)
    for name, value in (("weight", folded), ("bias", (old_bias - mean) * scale + beta)):
        new._parameters[name] = nn.Parameter(value.to(weight.dtype), requires_grad=weight.requires_grad)
    return new


def _at(tree: Tree, call: ModuleCall) -> nn.Module:
    return tree.modules[call.path]


def _own_tensors(module: nn.Module) -> Iterator[Tensor]:
    held: Iterable[Tensor | None] = (*module._parameters.values(), *module._buffers.values())
    return (tensor for tensor in held if tensor is not None)


def _reasons(left: Counter[str]) -> str:
    return "".join(f"; {count} {reason}" for reason, count in left.most_common())
