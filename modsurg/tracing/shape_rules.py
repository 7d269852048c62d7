"""The shapes of what common torch functions return, worked out here.

torch can say the same of tensors on meta, but its own rules are python that costs a process seconds of imports, and a
batch norm a hundred times what it takes here. A call that these rules do not understand, a wrong one above all, is
left to torch.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

Rule = Callable[..., Any]

_SAME = """
    relu relu6 gelu silu sigmoid tanh hardswish hardsigmoid hardtanh leaky_relu elu selu celu mish softplus softsign
    logsigmoid dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout exp sqrt rsqrt neg cos sin abs erf
    clamp square log softmax log_softmax
"""
_BINARY = "add sub mul div true_divide __radd__ __rmul__ __rsub__ __rtruediv__"
_BINARY_INPLACE = "add_ sub_ mul_ div_ __iadd__ __isub__ __imul__ __itruediv__"


def shaped(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """What the function would return, on meta; NotImplemented where no rule is sure.

    Example:
        >>> x = torch.empty(2, 3, 8, 8, device="meta")
        >>> shaped("conv2d", (x, torch.empty(4, 3, 3, 3, device="meta")), {"padding": 1}).shape
        torch.Size([2, 4, 8, 8])
        >>> shaped("nonzero", (x,), {})
        NotImplemented
    """
    rule = _RULES.get(name)
    if rule is None or not args:
        return NotImplemented
    try:
        return rule(*args, **kwargs)
    except (TypeError, IndexError, ValueError, RuntimeError, AttributeError):  # not the call that the rule knows
        return NotImplemented


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_meta and value.is_floating_point()


def _like(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """An empty tensor of the same shape, and of the same strides where these leave no holes."""
    extent = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
    if x.numel() != extent or 0 in x.stride():
        return x.new_empty(x.shape, dtype=dtype)
    return torch.empty_strided(x.shape, x.stride(), dtype=dtype or x.dtype, device="meta")


def _same(x: Any, *args: Any, inplace: bool = False, dtype: Any = None, **kwargs: Any) -> Any:
    if not _is_float(x) or kwargs.get("out") is not None or any(isinstance(arg, torch.Tensor) for arg in args):
        return NotImplemented
    if inplace or args[-1:] == (True,):
        return NotImplemented if dtype is not None else x
    return _like(x, dtype)


def _softmax(x: Any, dim: Any = None, _stacklevel: int = 3, dtype: Any = None, **kwargs: Any) -> Any:
    if not isinstance(dim, int) or kwargs or not -x.dim() <= dim < x.dim() or isinstance(_stacklevel, torch.dtype):
        return NotImplemented
    return _same(x, dtype=dtype)


def _dropout(x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    return _same(x, inplace=inplace) if 0 <= p <= 1 else NotImplemented


def _batch_norm(x: Any, mean: Any, var: Any, weight: Any = None, bias: Any = None, *args: Any, **kwargs: Any) -> Any:
    training = args[0] if args else kwargs.get("training", False)
    channels = x.shape[1]
    fits = all(each is None or each.shape == (channels,) for each in (mean, var, weight, bias))
    if not fits or (training and x.numel() <= channels) or (mean is None and not training):
        return NotImplemented
    return _same(x)


def _layer_norm(x: Any, normalized_shape: Sequence[int], weight: Any = None, bias: Any = None, eps: Any = None) -> Any:
    shape = tuple(normalized_shape)
    if tuple(x.shape[-len(shape) :]) != shape or not _is_float(x):
        return NotImplemented
    if any(each is not None and (tuple(each.shape) != shape or each.dtype != x.dtype) for each in (weight, bias)):
        return NotImplemented
    return x.new_empty(x.shape)


def _binary(x: Any, y: Any, *, alpha: float = 1) -> Any:
    if isinstance(y, (int, float)):
        return _like(x) if _is_float(x) else NotImplemented
    if isinstance(x, (int, float)):
        return _like(y) if _is_float(y) else NotImplemented
    if not (_is_float(x) and _is_float(y)) or x.dtype != y.dtype:
        return NotImplemented
    if x.shape == y.shape or y.dim() == 0:
        return _like(x)
    return x.new_empty(_broadcast(x.shape, y.shape))


def _binary_inplace(x: Any, y: Any, *, alpha: float = 1) -> Any:
    if not _is_float(x):
        return NotImplemented
    if isinstance(y, torch.Tensor) and (not y.is_meta or tuple(_broadcast(x.shape, y.shape)) != tuple(x.shape)):
        return NotImplemented
    return x


def _broadcast(one: Sequence[int], other: Sequence[int]) -> list[int]:
    width = max(len(one), len(other))
    pairs = zip((1,) * (width - len(one)) + tuple(one), (1,) * (width - len(other)) + tuple(other), strict=True)
    sizes = []
    for a, b in pairs:
        if a != b and 1 not in (a, b):
            raise ValueError("these do not broadcast")
        sizes.append(b if a == 1 else a)
    return sizes


def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    fits = weight.dim() == 2 and input.shape[-1] == weight.shape[1] and input.dtype == weight.dtype
    if not fits or (bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != input.dtype)):
        return NotImplemented
    return input.new_empty((*input.shape[:-1], weight.shape[0])) if input.is_meta else NotImplemented


def _matmul(x: Any, y: Any) -> Any:
    fits = min(x.dim(), y.dim()) >= 2 and x.shape[-1] == y.shape[-2] and x.dtype == y.dtype
    if not fits or not (x.is_meta and y.is_meta) or not (x.layout is y.layout is torch.strided):
        return NotImplemented
    return x.new_empty((*_broadcast(x.shape[:-2], y.shape[:-2]), x.shape[-2], y.shape[-1]))


def _bmm(x: Any, y: Any) -> Any:
    return _matmul(x, y) if x.dim() == y.dim() == 3 and x.shape[0] == y.shape[0] else NotImplemented


def _each(value: Any, count: int) -> tuple[int, ...]:
    return (value,) * count if isinstance(value, int) else tuple(value) * (count // len(value))


def _conv(
    input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Any:
    count = weight.dim() - 2
    fits = input.dim() == count + 2 and input.shape[1] == weight.shape[1] * groups and input.dtype == weight.dtype
    if not fits or weight.shape[0] % groups or not input.is_meta or isinstance(padding, str):
        return NotImplemented
    if bias is not None and bias.shape != weight.shape[:1]:
        return NotImplemented
    options = zip(*(_each(value, count) for value in (stride, padding, dilation)), strict=True)
    sizes = [
        (size + 2 * pad - spread * (kernel - 1) - 1) // step + 1
        for size, kernel, (step, pad, spread) in zip(input.shape[2:], weight.shape[2:], options, strict=True)
    ]
    return input.new_empty((input.shape[0], weight.shape[0], *sizes)) if min(sizes) > 0 else NotImplemented


def _pool(count: int) -> Rule:
    def rule(input: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, *args: Any, **kwargs: Any) -> Any:
        if (args and args[0] not in (1, False)) or any(args[1:]) or kwargs.get("return_indices"):
            return NotImplemented
        if kwargs.get("dilation", 1) not in (1, (1,) * count) or kwargs.get("ceil_mode") or not _is_float(input):
            return NotImplemented
        kernels, pads = _each(kernel_size, count), _each(padding, count)
        steps = _each(kernel_size if stride is None or stride == [] else stride, count)
        if input.dim() != count + 2 or any(2 * pad > kernel for pad, kernel in zip(pads, kernels, strict=True)):
            return NotImplemented
        sides = zip(input.shape[2:], kernels, steps, pads, strict=True)
        sizes = [(size + 2 * pad - kernel) // step + 1 for size, kernel, step, pad in sides]
        return input.new_empty((*input.shape[:2], *sizes)) if min(sizes) > 0 else NotImplemented

    return rule


def _adaptive(input: Any, output_size: Any) -> Any:
    count = input.dim() - 2
    wanted = [output_size] * count if isinstance(output_size, int) else list(output_size)
    if len(wanted) != count or not _is_float(input):
        return NotImplemented
    sizes = [old if new is None else new for old, new in zip(input.shape[2:], wanted, strict=True)]
    return input.new_empty((*input.shape[:2], *sizes))


def _adaptive_of(count: int) -> Rule:
    return lambda input, output_size: _adaptive(input, output_size) if input.dim() == count + 2 else NotImplemented


def _embedding(input: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
    if input.is_floating_point() or input.dtype not in (torch.int64, torch.int32) or weight.dim() != 2:
        return NotImplemented
    return weight.new_empty((*input.shape, weight.shape[1])) if weight.is_meta else NotImplemented


def _cat(tensors: Any, dim: int = 0) -> Any:
    first = tensors[0]
    dim = dim + first.dim() if dim < 0 else dim
    for each in tensors:
        others = [size for at, size in enumerate(each.shape) if at != dim]
        if not each.is_meta or each.dtype != first.dtype or others != [*first.shape[:dim], *first.shape[dim + 1 :]]:
            return NotImplemented
    return first.new_empty((*first.shape[:dim], sum(each.shape[dim] for each in tensors), *first.shape[dim + 1 :]))


def _mean(input: Any, dim: Any, keepdim: bool = False) -> Any:
    dims = {at % input.dim() for at in ((dim,) if isinstance(dim, int) else dim)}
    if not _is_float(input) or not dims:
        return NotImplemented
    sizes = [1 if at in dims else size for at, size in enumerate(input.shape) if keepdim or at not in dims]
    return input.new_empty(sizes)


def _sdpa(query: Any, key: Any, value: Any, attn_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
    fits = query.dim() == key.dim() == value.dim() >= 3 and query.shape[:-2] == key.shape[:-2] == value.shape[:-2]
    if not fits or query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2] or not query.is_meta:
        return NotImplemented
    scores = (*query.shape[:-1], key.shape[-2])
    if attn_mask is not None and tuple(_broadcast(scores, attn_mask.shape)) != scores:
        return NotImplemented
    if query.dtype != key.dtype or query.dtype != value.dtype:
        return NotImplemented
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


def _attention_layer(query: Any, key: Any, value: Any, width: int, heads: int, *args: Any, **kwargs: Any) -> Any:
    weight, _, bias_k, _, zeros, _, out_weight, _ = args
    special = ("attn_mask", "key_padding_mask", "use_separate_proj_weight", "is_causal", "static_k", "static_v")
    if weight is None or bias_k is not None or zeros or any(kwargs.get(name) not in (None, False) for name in special):
        return NotImplemented
    fits = query.dim() == 3 and key.shape == value.shape and query.shape[1:] == key.shape[1:] and _is_float(query)
    sizes = weight.shape == (3 * width, width) and out_weight.shape == (width, width) and query.shape[-1] == width
    if not (fits and sizes) or width % heads or weight.dtype != query.dtype:
        return NotImplemented
    out = query.new_empty(query.shape)
    if not kwargs.get("need_weights", True):
        return out, None
    scores = (query.shape[1], query.shape[0], key.shape[0])
    return out, query.new_empty(scores if kwargs.get("average_attn_weights", True) else (scores[0], heads, *scores[1:]))


def _lstm(input: Any, hidden: Any, weights: Any, *args: Any) -> Any:
    if len(args) != 6 or not isinstance(hidden, (tuple, list)) or input.dim() != 3 or not input.is_meta:
        return NotImplemented
    layers, _, _, both, batch_first = args[1:]
    state, cell = hidden
    directions = 2 if both else 1
    batch = input.shape[0 if batch_first else 1]
    if state.shape[:2] != (layers * directions, batch) or input.shape[-1] != weights[0].shape[1]:
        return NotImplemented
    out = input.new_empty((*input.shape[:2], state.shape[-1] * directions))
    return out, _like(state), _like(cell)


def _arange(*bounds: Any, dtype: Any = None, device: Any = None, **kwargs: Any) -> Any:
    if kwargs or not 1 <= len(bounds) <= 3 or str(device) != "meta" or not all(type(each) is int for each in bounds):
        return NotImplemented
    return torch.empty(max(0, math.ceil(len(range(*bounds)))), dtype=dtype or torch.int64, device="meta")


_RULES: dict[str, Rule] = {
    **dict.fromkeys(_SAME.split(), _same),
    **dict.fromkeys(("softmax", "log_softmax"), _softmax),
    **dict.fromkeys(("dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout"), _dropout),
    **dict.fromkeys(_BINARY.split(), _binary),
    **dict.fromkeys(_BINARY_INPLACE.split(), _binary_inplace),
    **dict.fromkeys(("relu_", "clamp_", "sigmoid_", "tanh_"), lambda x, *args: x if _is_float(x) else NotImplemented),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _conv),
    **{f"{kind}_pool{n}d": _pool(n) for kind in ("max", "avg") for n in (1, 2, 3)},
    **{f"adaptive_avg_pool{n}d": _adaptive_of(n) for n in (1, 2, 3)},
    **dict.fromkeys(("matmul", "__matmul__"), _matmul),
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "linear": _linear,
    "bmm": _bmm,
    "embedding": _embedding,
    "cat": _cat,
    "mean": _mean,
    "multi_head_attention_forward": _attention_layer,
    "scaled_dot_product_attention": _sdpa,
    "lstm": _lstm,
    "arange": _arange,
}
