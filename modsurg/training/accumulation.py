"""The gradients of several batches, and the step that they make."""

import torch
from torch import nn
from torch.optim import Optimizer

from modsurg.training.distributed import summed


class GradientWindow:
    """The batches that make one optimizer step, and that step.

    Each batch counts by its samples, and the gradient is averaged over what the window holds, also when the epoch ends
    before it is full.

    Attributes:
        everywhere: The device of this process, if batches of other processes count too.
        held: How many batches' gradients wait for the step.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        size: int,
        clip_norm: float | None,
        scaler: torch.GradScaler | None,
        everywhere: torch.device | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.size = size
        self.clip_norm = clip_norm
        self.scaler = scaler
        self.everywhere = everywhere
        self.held = 0
        self._unit = 0.0
        self._weight = 0.0

    def backward(self, loss: torch.Tensor, samples: float) -> bool:
        """Add one batch's gradients; says whether the window is full."""
        if self.held == 0:
            self._weight = 0.0
            if self.everywhere is None:
                self._unit = samples or 1.0
            elif self._unit == 0.0:  # the same for all processes and steps
                total = summed({"samples": samples, "processes": 1.0}, self.everywhere)
                self._unit = total["samples"] / total["processes"] or 1.0
        share = samples / self._unit / self.size
        if share or self.everywhere is not None:  # a mean over nothing is NaN, and the gradient of no use
            loss = loss if share == 1.0 else loss * share
            torch.autograd.backward(loss if self.scaler is None else self.scaler.scale(loss))
        self.held += 1
        self._weight += share
        return self.held >= self.size

    def step(self) -> None:
        """Move the weights, and empty the window."""
        weight = self._weight
        if self.everywhere is not None:  # the gradient is the mean over all processes
            total = summed({"weight": weight, "processes": 1.0}, self.everywhere)
            weight = total["weight"] / total["processes"]
        uneven = abs(weight - 1.0) > 1e-9 and weight > 0
        if self.clip_norm is not None or uneven:
            self._prepare(1.0 / weight if uneven else 1.0)
        if self.scaler is None or weight == 0:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad()
        self.held = 0

    def drop(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad()
        self.held = 0

    def _prepare(self, factor: float) -> None:
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if factor != 1.0:
            for parameter in parameters:
                assert parameter.grad is not None
                parameter.grad.mul_(factor)
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, self.clip_norm)
