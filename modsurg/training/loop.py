"""One step after another: gradients, the optimizer's step, what is summed on the way."""

import math

import torch
from torch import nn
from torch.optim import Optimizer

from modsurg.errors import NonFiniteError
from modsurg.training.distributed import summed


class Window:
    """The batches that make one optimizer step, and that step.

    Each batch counts by its samples, and the gradient is averaged over what the window holds, also when the epoch ends
    before it is full.

    Attributes:
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
        self._first = 1.0
        self._weight = 0.0

    def backward(self, loss: torch.Tensor, samples: float) -> bool:
        """Add one batch's gradients; says whether the window is full."""
        if self.held == 0:
            self._first, self._weight = samples or 1.0, 0.0
        share = samples / self._first / self.size
        loss = loss if share == 1.0 else loss * share
        torch.autograd.backward(loss if self.scaler is None else self.scaler.scale(loss))
        self.held += 1
        self._weight += share
        return self.held >= self.size

    def step(self) -> None:
        """Move the weights, and empty the window."""
        weight = self._weight
        if self.everywhere is not None and self.size > 1:  # the gradient is the mean over all processes
            total = summed({"weight": weight, "processes": 1.0}, self.everywhere)
            weight = total["weight"] / total["processes"]
        uneven = abs(weight - 1.0) > 1e-9 and weight > 0
        if self.clip_norm is not None or uneven:
            self._prepare(1.0 / weight if uneven else 1.0)
        if self.scaler is None:
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


class Watch:
    """Looks for a loss that is NaN or infinite.

    On the CPU the loss is looked at before its gradients are computed. Elsewhere that would make the CPU wait at every
    step: a flag on the device remembers the first bad step, is read when a number is shown, and a copy of the weights
    from the last such moment is what remains.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model = model
        self.near = device.type == "cpu"
        self.first = torch.tensor(-1, device=device)
        self.spare: dict[str, torch.Tensor] = {}

    def check(self, loss: torch.Tensor, step: int, where: object) -> None:
        """Look at one loss, detached.

        Raises:
            NonFiniteError: On the CPU, at once.
        """
        if not self.near:
            good = torch.isfinite(loss) | (self.first >= 0)
            self.first = torch.where(good, self.first, step)
        elif not math.isfinite((loss if loss.dtype is torch.float32 else loss.double()).numpy()):
            raise NonFiniteError(self._message(f"{where}: the loss is {loss.item()}", step))

    def look(self) -> None:
        """Read the flag; while all is well, keep the weights.

        Raises:
            NonFiniteError: A loss since the last look was not finite; the weights are those of the last look.
        """
        if self.near:
            return
        bad = int(self.first)
        if bad >= 0:
            self.model.load_state_dict(self.spare, strict=False)
            raise NonFiniteError(self._message(f"step {bad + 1}: the loss is not finite", bad))
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                if isinstance(value, torch.Tensor):
                    self.spare.setdefault(name, torch.empty_like(value)).copy_(value)

    def check_weights(self, step: int) -> None:
        """Look at the weights, before they are kept.

        Raises:
            NonFiniteError: A gradient was not finite although the loss was.
        """
        parts = [p.to_local() if hasattr(p, "to_local") else p for p in self.model.parameters()]
        finite = [torch.isfinite(part).all() for part in parts]
        if finite and not bool(torch.stack(finite).all()):
            raise NonFiniteError(self._message(f"after step {step} the weights are not finite", step))

    def _message(self, what: str, step: int) -> str:
        spoilt = [name for name, p in self.model.named_parameters() if not bool(torch.isfinite(p).all())]
        kept = f"the weights are those after step {step}"
        if spoilt:
            kept = f"{spoilt[0]} was already not finite: a gradient of a step before overflowed"
        elif not self.near:
            kept = "the weights are those of the last good look"
        return f"{what}; {kept}. Try a smaller lr, clip_norm=1.0, or look at that batch for NaN."
