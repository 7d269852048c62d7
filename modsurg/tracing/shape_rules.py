"""Shapes of what the torch functions of common networks return, worked out here.

torch says the same of tensors on meta, but its rules are written in Python: the first of them costs a process that
imported only torch 0.7 seconds. A rule is for the plain call alone, with floating tensors of one dtype that are not
empty; any other call, a wrong one above all, is left to torch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

_FLOATS = frozenset({torch.float32, torch.float64, torch.float16, torch.bfloat16})


class _NotPlain(Exception):  # noqa: N818  # no error: torch is asked instead
    """Raised by a rule for a call that it does not cover."""


def shaped(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Return what the function would return, on meta; NotImplemented where no rule covers the call.

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
    except (_NotPlain, TypeError):  # TypeError: arguments that the rule does not have
        return NotImplemented


def _require(condition: object) -> None:
    if not condition:
        raise _NotPlain


def _require_plain(*tensors: Any, contiguous: bool = True) -> None:
    """Require floating tensors on meta, of one dtype, none empty."""
    for each in tensors:
        _require(isinstance(each, torch.Tensor) and each.is_meta and each.layout is torch.strided)
        _require(each.dtype in _FLOATS and each.dtype == tensors[0].dtype and each.numel())
        _require(not contiguous or each.is_contiguous())


def _require_vectors(size: int, *tensors: Any) -> None:
    """Require vectors of that size, or None in their place."""
    _require(all(each is None or each.shape == (size,) for each in tensors))


def _like(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return an empty tensor of the same shape and strides; these must leave no holes."""
    extent = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
    _require(x.numel() == extent and 0 not in x.stride())
    return torch.empty_strided(x.shape, x.stride(), dtype=dtype or x.dtype, device="meta")


def _sizes(value: Any, count: int, least: int) -> tuple[int, ...]:
    """Return one whole number for each dimension, of an argument that may be a single one."""
    values = (value,) * count if type(value) is int else tuple(value)
    _require(len(values) == count and all(type(each) is int and each >= least for each in values))
    return values


def _unary(x: Any, inplace: bool = False) -> Any:
    _require_plain(x, contiguous=False)
    _require(isinstance(inplace, bool) and (not inplace or 0 not in x.stride()))
    return x if inplace else _like(x)


def _gelu(x: Any, approximate: str = "none") -> Any:
    _require(approximate in ("none", "tanh"))
    return _unary(x)


def _dropout(x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    _require(type(p) is float and 0 <= p <= 1 and training is True)
    return _unary(x, inplace)


def _softmax(x: Any, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
    _require_plain(x)
    _require(type(dim) is int and -x.dim() <= dim < x.dim() and type(_stacklevel) is int)
    _require(dtype is None or dtype in _FLOATS)
    return _like(x, dtype)


def _batch_norm(
    x: Any, mean: Any, var: Any, weight: Any = None, bias: Any = None, training: bool = False, *rest: Any, **named: Any
) -> Any:
    _require_plain(x, *(each for each in (mean, var, weight, bias) if each is not None))
    _require(x.dim() >= 2 and (mean is None) == (var is None) and isinstance(training, bool))
    _require(x.numel() > x.shape[1] if training else mean is not None)
    _require(all(type(each) in (int, float) for each in (*rest, *named.values())))
    _require(len(rest) <= 2 and named.keys() <= {"momentum", "eps"})
    _require_vectors(x.shape[1], mean, var, weight, bias)
    return _like(x)


def _layer_norm(x: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    _require_plain(x, *(each for each in (weight, bias) if each is not None), contiguous=False)
    shape = tuple(normalized_shape)
    _require(shape and x.shape[-len(shape) :] == shape and type(eps) is float)
    _require(all(each is None or each.shape == shape for each in (weight, bias)))
    return x.new_empty(x.shape)


def _binary(x: Any, y: Any) -> Any:
    if type(y) in (int, float):
        return _unary(x)
    _require_plain(x, y)
    return x.new_empty(_broadcast(x.shape, y.shape))


def _binary_inplace(x: Any, y: Any) -> Any:
    _require_plain(x, *([] if type(y) in (int, float) else [y]))
    _require(type(y) in (int, float) or _broadcast(x.shape, y.shape) == x.shape)
    return x


def _broadcast(one: Sequence[int], other: Sequence[int]) -> tuple[int, ...]:
    width = max(len(one), len(other))
    pairs = zip((1,) * (width - len(one)) + tuple(one), (1,) * (width - len(other)) + tuple(other), strict=True)
    sizes = []
    for a, b in pairs:
        _require(a == b or 1 in (a, b))
        sizes.append(b if a == 1 else a)
    return tuple(sizes)


def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    _require_plain(input, weight, *([] if bias is None else [bias]), contiguous=False)
    _require(input.dim() and weight.dim() == 2 and input.shape[-1] == weight.shape[1])
    _require_vectors(weight.shape[0], bias)
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


def _matmul(x: Any, y: Any) -> Any:
    _require_plain(x, y, contiguous=False)
    _require(min(x.dim(), y.dim()) >= 2 and x.shape[-1] == y.shape[-2])
    return x.new_empty((*_broadcast(x.shape[:-2], y.shape[:-2]), x.shape[-2], y.shape[-1]))


def _window(sizes: Sequence[int], kernels: Any, steps: Any, pads: Any, spreads: Any) -> list[int]:
    sides = zip(sizes, kernels, steps, pads, spreads, strict=True)
    found = [(size + 2 * pad - spread * (kernel - 1) - 1) // step + 1 for size, kernel, step, pad, spread in sides]
    _require(min(found) > 0)
    return found


def _conv_of(count: int) -> Callable[..., Any]:
    def rule(
        input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
    ) -> Any:
        _require_plain(input, weight, *([] if bias is None else [bias]))
        _require(input.dim() == weight.dim() == count + 2 and type(groups) is int and groups > 0)
        _require(input.shape[1] == weight.shape[1] * groups and weight.shape[0] % groups == 0)
        _require(not isinstance(padding, str))
        _require_vectors(weight.shape[0], bias)
        steps, pads, spreads = _sizes(stride, count, 1), _sizes(padding, count, 0), _sizes(dilation, count, 1)
        sizes = _window(input.shape[2:], weight.shape[2:], steps, pads, spreads)
        return input.new_empty((input.shape[0], weight.shape[0], *sizes))

    return rule


def _max_pool2d(
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    _require_plain(input)
    _require(input.dim() == 4 and ceil_mode is return_indices is False)
    kernels, pads = _sizes(kernel_size, 2, 1), _sizes(padding, 2, 0)
    _require(all(2 * pad <= kernel for kernel, pad in zip(kernels, pads, strict=True)))
    steps = kernels if stride is None else _sizes(stride, 2, 1)
    return input.new_empty((*input.shape[:2], *_window(input.shape[2:], kernels, steps, pads, _sizes(dilation, 2, 1))))


def _adaptive_avg_pool2d(input: Any, output_size: Any) -> Any:
    _require_plain(input)
    _require(input.dim() == 4)
    return input.new_empty((*input.shape[:2], *_sizes(output_size, 2, 1)))


def _embedding(
    input: Any,
    weight: Any,
    padding_idx: Any = None,
    max_norm: Any = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    _require_plain(weight)
    _require(isinstance(input, torch.Tensor) and input.dtype in (torch.int64, torch.int32) and max_norm is None)
    rows = weight.shape[0]
    _require(weight.dim() == 2 and (padding_idx is None or (type(padding_idx) is int and -rows <= padding_idx < rows)))
    return weight.new_empty((*input.shape, weight.shape[1]))


def _cat(tensors: Any, dim: int = 0) -> Any:
    _require(isinstance(tensors, (list, tuple)) and tensors)
    _require_plain(*tensors)
    first = tensors[0].shape
    _require(type(dim) is int and -len(first) <= dim < len(first))
    dim %= len(first)
    _require(all((*each.shape[:dim], *each.shape[dim + 1 :]) == (*first[:dim], *first[dim + 1 :]) for each in tensors))
    return tensors[0].new_empty((*first[:dim], sum(each.shape[dim] for each in tensors), *first[dim + 1 :]))


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    _require_plain(query, key, value, contiguous=False)
    _require(query.dim() == key.dim() == value.dim() == 4 and enable_gqa is False)
    _require(query.shape[:-2] == key.shape[:-2] == value.shape[:-2])
    _require(query.shape[-1] == key.shape[-1] and key.shape[-2] == value.shape[-2])
    _require(type(dropout_p) in (int, float) and 0 <= dropout_p <= 1 and (scale is None or type(scale) is float))
    _require(attn_mask is None or (is_causal is False and attn_mask.dtype in (torch.bool, query.dtype)))
    scores = (*query.shape[:-1], key.shape[-2])
    _require(attn_mask is None or _broadcast(scores, attn_mask.shape) == scores)
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


def _attention_layer(
    query: Any, key: Any, value: Any, width: int, heads: int, weight: Any, bias: Any, *rest: Any, **named: Any
) -> Any:
    bias_k, bias_v, zeros, dropout, out_weight, out_bias = rest
    _require_plain(query, key, value, weight, bias, out_weight, out_bias, contiguous=False)
    _require(bias_k is bias_v is None and zeros is False and 0 <= dropout <= 1)
    _require(all(each is None or each is False or name in _HANDLED for name, each in named.items()))
    _require(query.dim() == 3 and key.shape == value.shape and query.shape[1:] == key.shape[1:])
    _require(query.shape[-1] == width and width % heads == 0)
    _require(weight.shape == (3 * width, width) and out_weight.shape == (width, width))
    _require_vectors(width, out_bias)
    _require_vectors(3 * width, bias)
    length, batch, source = query.shape[0], query.shape[1], key.shape[0]
    average = (batch, length, source) if named.get(_AVERAGE, True) else (batch, heads, length, source)
    return query.new_empty(query.shape), query.new_empty(average) if named.get("need_weights", True) else None


_AVERAGE = "average_attn_weights"
_HANDLED = frozenset({"training", "need_weights", _AVERAGE})


def _arange(*bounds: Any, dtype: Any = None, device: Any = None) -> Any:
    _require(1 <= len(bounds) <= 3 and str(device) == "meta" and all(type(each) is int for each in bounds))
    _require(dtype in (None, torch.int64, torch.int32) and (len(bounds) < 3 or bounds[2]))
    size = len(range(*bounds))
    _require(size)
    return torch.empty(size, dtype=dtype or torch.int64, device="meta")


_RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("relu", "silu", "hardswish", "relu6", "hardsigmoid"), _unary),
    **dict.fromkeys(("sigmoid", "tanh", "rsqrt", "exp"), lambda x: _unary(x)),
    "gelu": _gelu,
    "dropout": _dropout,
    "softmax": _softmax,
    **dict.fromkeys(("add", "sub", "mul", "div", "__radd__", "__rmul__", "__rsub__", "__rtruediv__"), _binary),
    **dict.fromkeys(("add_", "sub_", "mul_", "div_", "__iadd__", "__imul__"), _binary_inplace),
    **{f"conv{count}d": _conv_of(count) for count in (1, 2, 3)},
    **dict.fromkeys(("matmul", "__matmul__"), _matmul),
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "linear": _linear,
    "max_pool2d": _max_pool2d,
    "adaptive_avg_pool2d": _adaptive_avg_pool2d,
    "embedding": _embedding,
    "cat": _cat,
    "scaled_dot_product_attention": _attention,
    "multi_head_attention_forward": _attention_layer,
    "arange": _arange,
}
