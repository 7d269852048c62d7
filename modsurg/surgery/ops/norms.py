"""What the norms of torch, torchvision and timm have in common."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def is_batch_norm(module: nn.Module) -> bool:
    """Tell whether a module normalises over the batch with running statistics: BatchNorm of any kind."""
    return isinstance(module, _BatchNorm)


def is_frozen_norm(module: nn.Module) -> bool:
    """Tell whether a module is a BatchNorm whose statistics and weights are constants, as torchvision and timm have."""
    return type(module).__name__ == "FrozenBatchNorm2d" and {"running_mean", "running_var"} <= module._buffers.keys()


def activation_of(norm: nn.Module) -> nn.Module | None:
    """Return the activation that one of timm's norms applies after it; None for a norm that only normalises."""
    act = norm._modules.get("act")
    if act is None or not type(norm).__module__.startswith("timm."):
        return None
    drop = norm._modules.get("drop")
    if drop is None or isinstance(drop, nn.Identity):
        return act
    return nn.Sequential(drop, act)


def affine_of(norm: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """Return weight, bias, running mean, running variance, all in float64 of shape (channels,), and epsilon."""
    held: dict[str, Any] = {**norm._buffers, **norm._parameters}
    mean, variance = (held[name].detach().double() for name in ("running_mean", "running_var"))
    weight = torch.ones_like(mean) if held.get("weight") is None else held["weight"].detach().double()
    bias = torch.zeros_like(mean) if held.get("bias") is None else held["bias"].detach().double()
    return weight, bias, mean, variance, float(norm.eps)  # type: ignore[arg-type]  # a number in each of these classes
