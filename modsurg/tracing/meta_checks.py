"""Calls that torch refuses on every real device and lets pass on meta."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._C._functorch import is_functorch_wrapped_tensor


def check(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise what a real device would raise.

    Args:
        name: A torch function's name.
        args: Its arguments; those by which it is recognised must be given by position.
        kwargs: Its keyword arguments.

    Raises:
        RuntimeError: Dtypes that don't go together, another number of channels.
        IndexError: A number that the table does not have.

    Example:
        >>> check("linear", (torch.zeros(2, 4), torch.zeros(3, 4, dtype=torch.half)), {})
        Traceback (most recent call last):
        RuntimeError: it takes tensors of one dtype, not float32 and float16: convert the input, x.to(torch.float16)
    """
    rule = _RULES.get(name)
    if rule is not None:
        named = kwargs.values() if rule is _norms else ()  # which of them is which, does not matter there alone
        given = [arg for arg in (*args, *named) if isinstance(arg, torch.Tensor)]
        if args and len(given) > 1:
            rule(*given)


def _products(*tensors: torch.Tensor) -> None:
    names = list(dict.fromkeys(_named(each) for each in tensors if not each.is_quantized))
    if len(names) > 1 and not _is_autocast():
        both = " and ".join(names)
        raise RuntimeError(f"it takes tensors of one dtype, not {both}: convert the input, x.to(torch.{names[1]})")


def _norms(x: torch.Tensor, *weights: torch.Tensor) -> None:
    for weight in weights:
        if weight.dtype != x.dtype and weight.dtype in (torch.float16, torch.bfloat16) and not _is_autocast():
            raise RuntimeError(f"expected parameters of {_named(x)}, the input's dtype, but got {_named(weight)}")


def _transposed(x: torch.Tensor, weight: torch.Tensor, *rest: torch.Tensor) -> None:
    _products(x, weight, *(rest if weight.dim() == 5 else ()))  # only in three dimensions must the bias be of it too
    channels = x.shape[1 - (x.dim() < weight.dim())]
    if channels != weight.shape[0]:
        raise RuntimeError(
            f"given a transposed weight of size {list(weight.shape)}, expected an input of {weight.shape[0]} channels, "
            f"but got {channels}"
        )


def _lookups(numbers: torch.Tensor, table: torch.Tensor, *rest: torch.Tensor) -> None:
    if is_functorch_wrapped_tensor(numbers):  # torch.vmap does not tell what they are
        return
    if not numbers.is_meta and numbers.numel() and not numbers.is_floating_point():
        low, high = (int(each) for each in numbers.aminmax())
        if low < 0 or high >= table.shape[0]:
            raise IndexError(f"{high if low >= 0 else low} is looked up in a table of {table.shape[0]} rows")


def _named(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _is_autocast() -> bool:
    return any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))


_MULTIPLYING = "linear matmul __matmul__ bmm mm addmm conv1d conv2d conv3d multi_head_attention_forward"
_RULES: dict[str, Callable[..., None]] = {
    **dict.fromkeys(_MULTIPLYING.split(), _products),
    **dict.fromkeys(("layer_norm", "group_norm", "batch_norm"), _norms),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _transposed),
    "embedding": _lookups,
}
