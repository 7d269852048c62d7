"""Losses and weights that are NaN or infinite."""

import math

import torch
from torch import nn

from modsurg.errors import NonFiniteError

_FIX = "Try a smaller lr, clip_norm=1.0, or look at that batch for NaN."


class LossCheck:
    """Looks for a loss that is NaN or infinite.

    On the CPU the loss is looked at before its gradients are computed. Elsewhere that would make the CPU wait at every
    step: a flag on the device remembers the first bad step, and is read when a number is shown or a file is written.
    """

    def __init__(self, device: torch.device) -> None:
        self.immediate = device.type == "cpu"
        self.first = torch.tensor(-1, device=device)

    def check(self, loss: torch.Tensor, step: int, where: object, model: nn.Module) -> None:
        """Look at one loss, detached.

        Raises:
            NonFiniteError: On the CPU, at once.
        """
        if not self.immediate:
            good = torch.isfinite(loss) | (self.first >= 0)
            self.first = torch.where(good, self.first, step)
        elif not math.isfinite((loss if loss.dtype is torch.float32 else loss.double()).numpy()):
            bad = [name for name, p in model.named_parameters() if not bool(torch.isfinite(p).all())]
            kept = f"the weights are those after step {step}"
            if bad:
                kept = f"{bad[0]} was already not finite: a gradient of a step before overflowed"
            raise NonFiniteError(f"{where}: the loss is {loss.item()}; {kept}. {_FIX}")

    def read(self) -> None:
        """Read the flag.

        Raises:
            NonFiniteError: A loss since the last reading was not finite.
        """
        bad = -1 if self.immediate else int(self.first)
        if bad >= 0:
            kept = "the weights went on from there; the last checkpoint is from before"
            raise NonFiniteError(f"step {bad + 1}: the loss is not finite; {kept}. {_FIX}")


def check_weights(model: nn.Module, step: int) -> None:
    """Look at the weights before they are written to a file.

    Raises:
        NonFiniteError: A gradient was not finite although the loss was.
    """
    parts = {name: p.to_local() if hasattr(p, "to_local") else p for name, p in model.named_parameters()}
    finite = [torch.isfinite(part).all() for part in parts.values()]
    if finite and not bool(torch.stack(finite).all()):
        bad = next(name for name, part in parts.items() if not bool(torch.isfinite(part).all()))
        raise NonFiniteError(
            f"after step {step} the weights are not finite: {bad}, by a gradient that overflowed. {_FIX}"
        )
