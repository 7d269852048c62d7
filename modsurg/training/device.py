"""The device a run is on, and the precision that it has there."""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import nn

from modsurg.errors import DeviceError, listed

Precision = Literal["fp32", "bf16", "fp16"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(device: str | torch.device) -> torch.device:
    """The device to train on; `"auto"` is the accelerator that torch finds, else the CPU.

    Raises:
        DeviceError: No such device here; the message names those that are.

    Example:
        >>> pick_device("cpu")
        device(type='cpu')
    """
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if str(device) == "auto":
        return found or torch.device("cpu")
    if found is not None and str(device) == found.type:
        return found  # untried: under torchrun each process would try it on the first of several
    available = ["cpu", *(f"{found.type}:{i}" for i in range(torch.accelerator.device_count()))] if found else ["cpu"]
    try:
        wanted = torch.device(device)
        torch.empty(1, device=wanted).add_(1)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        hint = f'device="{available[-1]}" or device="auto"'
        raise DeviceError(f"device={str(device)!r} is not there; here are {', '.join(available)}: {hint}.") from error
    if wanted.type == "meta":
        raise DeviceError('device="meta" computes nothing: device="auto".')
    return wanted


def place(model: nn.Module, device: torch.device, *, channels_last: bool) -> None:
    """Move a model to the device, in place; with `channels_last`, weights of 2-d convolutions change their layout.

    Raises:
        DeviceError: Parameters without values (meta).

    Example:
        >>> model = nn.Conv2d(3, 8, 3)
        >>> place(model, torch.device("cpu"), channels_last=True)
        >>> model.weight.is_contiguous(memory_format=torch.channels_last)
        True
    """
    empty = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if empty:
        raise DeviceError(f"{listed(empty, 1)} of the model has no values (meta): load_state(model, path) first.")
    model.to(device)
    if channels_last:
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                module.to(memory_format=torch.channels_last)


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """A context of the forward pass for a precision that `check_precision` let through, to be entered once.

    Example:
        >>> with autocast(torch.device("cpu"), "bf16"):
        ...     nn.Linear(2, 2)(torch.ones(1, 2)).dtype
        torch.bfloat16
    """
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, _DTYPES[precision])


def check_precision(device: torch.device, precision: Precision) -> None:
    """Compute a little in a precision.

    Raises:
        DeviceError: An unknown precision, or one that the device can't compute in.
    """
    if precision not in _DTYPES:
        raise DeviceError(f'precision={precision!r}: one of "fp32", "bf16", "fp16".')
    if precision == "fp32":
        return
    dtype = _DTYPES[precision]
    other = "fp32" if precision == "bf16" else "bf16"
    refusal = f'{device.type} can\'t compute in {precision}: precision="{other}".'
    if not torch.amp.is_autocast_available(device.type):
        raise DeviceError(refusal)
    if device.type == "cuda" and precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise DeviceError(refusal)
    try:
        weight = torch.ones(8, 8, device=device, dtype=dtype, requires_grad=True)
        with torch.enable_grad():
            torch.autograd.backward((weight @ weight).sum())
    except RuntimeError as error:
        raise DeviceError(refusal) from error
