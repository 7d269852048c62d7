"""Calls that torch refuses on every real device and accepts on meta."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from modsurg.tracing.functorch import is_transforming, is_wrapped


def check(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise what a real device would raise.

    Args:
        function: A torch function, known by its name.
        args: Its arguments; those that a rule looks at must be given by position.
        kwargs: Its keyword arguments.

    Raises:
        RuntimeError: Dtypes that don't go together, another number of channels.
        IndexError: A row that the table does not have, a dimension that the tensor does not have.

    Example:
        >>> check(torch.nn.functional.linear, (torch.zeros(2, 4), torch.zeros(3, 4, dtype=torch.half)), {})
        Traceback (most recent call last):
        RuntimeError: it takes tensors of one dtype, not float32 and float16: convert the input, x.to(torch.float16)
    """
    name = getattr(function, "__name__", "")
    if not args or not isinstance(args[0], torch.Tensor):
        return
    if (kwargs.get("inplace") is True and kwargs.get("training", True)) or name.startswith("__i") or name in _IN_PLACE:
        _check_overlap(args[0])
    if name in _PROBED and not is_transforming() and _is_unusual(name, args):
        try:
            function(*map(_as_single, args), **kwargs)
        except NotImplementedError as error:  # a dtype that no kernel has, and nothing that meta lacks
            raise RuntimeError(str(error)) from None
    rule = _RULES.get(name)
    if rule is not None:
        named = kwargs.values() if rule is _check_norm else ()  # which of them is which, does not matter there alone
        given = [arg for arg in (*args, *named) if isinstance(arg, torch.Tensor)]
        if len(given) > 1 and all(each.numel() for each in given):
            rule(*given)
    if name in ("conv1d", "conv2d", "conv3d"):
        _check_convolution(*args, **kwargs)
    elif name == "batch_norm":
        _check_statistics(*args[:3])


def _is_unusual(name: str, args: Sequence[Any]) -> bool:
    return "softmax" in name or any(isinstance(arg, (torch.Tensor, bool)) and not _is_float(arg) for arg in args)


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _as_single(value: Any) -> Any:
    """Return one real number for a tensor: of as many dimensions, and of the dtype by which a call can be refused."""
    return torch.ones((1,) * value.dim(), dtype=value.dtype) if isinstance(value, torch.Tensor) else value


def _check_overlap(x: torch.Tensor) -> None:
    strided = x.layout is torch.strided and not x.is_nested
    if strided and x.numel() and any(size > 1 and not stride for size, stride in zip(x.shape, x.stride(), strict=True)):
        raise RuntimeError("an expanded tensor has places that share memory and can't be written to: clone() it first")


def _check_products(*tensors: torch.Tensor) -> None:
    names = list(dict.fromkeys(_named(each) for each in tensors if not each.is_quantized))
    if len(names) > 1 and not _is_autocast():
        both = " and ".join(names)
        raise RuntimeError(f"it takes tensors of one dtype, not {both}: convert the input, x.to(torch.{names[1]})")


def _check_linear(x: torch.Tensor, weight: torch.Tensor, *bias: torch.Tensor) -> None:
    _check_products(x, weight, *(bias if x.is_contiguous() else ()))
    if any(each.numel() not in (1, weight.shape[0]) for each in bias):
        raise RuntimeError(f"expected a bias of {weight.shape[0]} numbers, but got one of {list(bias[0].shape)}")


def _check_norm(x: torch.Tensor, *weights: torch.Tensor) -> None:
    for weight in weights:
        low = weight.dtype in (torch.float16, torch.bfloat16) or not weight.is_floating_point()
        if weight.dtype != x.dtype and low and not _is_autocast():
            raise RuntimeError(f"expected parameters of {_named(x)}, the input's dtype, but got {_named(weight)}")


def _check_statistics(x: torch.Tensor, mean: Any = None, var: Any = None) -> None:
    if x.dim() < 2:
        raise RuntimeError(f"expected an input of at least 2 dimensions, but got {list(x.shape)}")
    if (mean is None) != (var is None):
        raise RuntimeError("running_mean and running_var must both be there, or both be None")


def _check_convolution(
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: Any = 1,
) -> None:
    if bias is not None and bias.shape != weight.shape[:1]:
        raise RuntimeError(f"expected a bias of {weight.shape[0]} numbers, but got one of {list(bias.shape)}")
    if groups < 1 or weight.shape[0] % groups:
        raise RuntimeError(f"{weight.shape[0]} output channels can't be divided into groups={groups}")
    for name, value in (("stride", stride), ("dilation", dilation)):
        if any(each < 1 for each in (value if isinstance(value, (tuple, list)) else (value,))):
            raise RuntimeError(f"{name}={value} must be positive")


def _check_transposed(x: torch.Tensor, weight: torch.Tensor, *rest: torch.Tensor) -> None:
    _check_products(x, weight, *(rest if weight.dim() == 5 else ()))  # in three dimensions alone the bias counts too
    channels = x.shape[1 - (x.dim() < weight.dim())]
    if channels != weight.shape[0]:
        raise RuntimeError(
            f"given a transposed weight of size {list(weight.shape)}, expected an input of {weight.shape[0]} channels, "
            f"but got {channels}"
        )


def _check_rows(rows: torch.Tensor, table: torch.Tensor, *rest: torch.Tensor) -> None:
    if is_wrapped(rows):  # torch.vmap does not tell what they are
        return
    if not rows.is_meta and rows.numel() and not rows.is_floating_point():
        low, high = (int(each) for each in rows.aminmax())
        if low < 0 or high >= table.shape[0]:
            raise IndexError(f"{high if low >= 0 else low} is looked up in a table of {table.shape[0]} rows")


def _named(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _is_autocast() -> bool:
    return any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))


_PRODUCTS = "matmul __matmul__ bmm mm addmm conv1d conv2d conv3d multi_head_attention_forward"
_RULES: dict[str, Callable[..., None]] = {
    **dict.fromkeys(_PRODUCTS.split(), _check_products),
    **dict.fromkeys(("layer_norm", "group_norm", "batch_norm"), _check_norm),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _check_transposed),
    "linear": _check_linear,
    "embedding": _check_rows,
}
_IN_PLACE = frozenset(
    [
        "add_",
        "sub_",
        "mul_",
        "div_",
        "copy_",
        "fill_",
        "zero_",
        "relu_",
        "clamp_",
        "sigmoid_",
        "tanh_",
        "exp_",
        "masked_fill_",
    ]
)
_PROBED = frozenset(
    [
        "softmax",
        "log_softmax",
        "relu",
        "relu6",
        "gelu",
        "silu",
        "hardswish",
        "hardsigmoid",
        "hardtanh",
        "leaky_relu",
        "elu",
        "selu",
        "mish",
        "softplus",
        "logsigmoid",
        "sub",
        "rsub",
        "__sub__",
        "__rsub__",
        "clamp",
        "add_",
        "sub_",
        "mul_",
        "div_",
        "__iadd__",
        "__isub__",
        "__imul__",
        "__itruediv__",
        "bmm",
        "matmul",
        "__matmul__",
        "adaptive_avg_pool1d",
        "adaptive_avg_pool2d",
        "adaptive_avg_pool3d",
    ]
)
