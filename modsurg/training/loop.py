"""One step after another: gradients, the optimizer's step, what is summed on the way."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from modsurg.errors import BatchError, NonFiniteError
from modsurg.training.batches import describe, fields
from modsurg.training.distributed import lost, summed
from modsurg.training.error_messages import EXPECTED, out_of_memory

Metric = Callable[[Any, Any], Any]

_UNREAD = 4096


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
        self._first = 1
        self._weight = 0.0

    def backward(self, loss: torch.Tensor, samples: int) -> bool:
        """Add one batch's gradients; says whether the window is full."""
        if self.held == 0:
            self._first, self._weight = max(samples, 1), 0.0
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
        uneven = abs(weight - 1.0) > 1e-9
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


class Meter:
    """Sums of the loss and the metrics over samples.

    The values of a window count when `keep` says that its step was made. They stay on the device, unread, until
    somebody asks for a mean or a few thousand have gathered. They are added one by one in double precision, so that it
    does not matter to the sum when that was.

    Attributes:
        sums: Of each value times its samples, as far as they are read.
        seen: How many samples gave each value.
    """

    def __init__(self, metrics: Mapping[str, Metric]) -> None:
        self.metrics = metrics
        self.sums = dict.fromkeys(("loss", *metrics), 0.0)
        self.seen = dict.fromkeys(self.sums, 0)
        self._unread: dict[str, list[tuple[torch.Tensor, int]]] = {name: [] for name in self.sums}
        self._waiting: list[tuple[str, torch.Tensor, int]] = []

    @property
    def samples(self) -> int:
        """How many gave a loss."""
        return self.seen["loss"]

    def add(self, loss: torch.Tensor, samples: int, output: Any, target: Any, where: object) -> None:
        """Add a batch: its mean loss, and each metric of `(output, target)` unless there is no output.

        Raises:
            BatchError: A metric can't take the batch `where`, or gives no number.
        """
        self._waiting.append(("loss", loss.detach(), samples))
        if self.metrics and output is not None:
            output = output.detach() if isinstance(output, torch.Tensor) else output
            with torch.no_grad():
                for name, metric in self.metrics.items():
                    try:
                        value = _mean(_measured(metric, output, target, samples), samples)
                    except BatchError as error:
                        raise BatchError(f"{where}: metric {name} {error}") from error.__cause__
                    self._waiting.append((name, value, samples))

    def keep(self) -> None:
        """Count the batches that were added."""
        for name, value, samples in self._waiting:
            unread = self._unread[name]
            unread.append((value, samples))
            self.seen[name] += samples
            if len(unread) == _UNREAD:
                self.read()
        self._waiting.clear()

    def drop(self) -> None:
        """Forget the batches that were added since `keep`."""
        self._waiting.clear()

    def read(self) -> None:
        """Bring `sums` up to date. This waits for the device."""
        for name, unread in self._unread.items():
            if unread:
                together = len({value.device for value, _ in unread}) == 1
                values = torch.stack([value if together else value.cpu() for value, _ in unread]).tolist()
                for value, (_, samples) in zip(values, unread, strict=True):
                    self.sums[name] += value * samples
                unread.clear()

    def means(self, everywhere: torch.device | None = None) -> dict[str, float]:
        """Every mean, over all processes if their device is given. This waits for the device."""
        self.read()
        sums, seen = self.sums, {name: float(samples) for name, samples in self.seen.items()}
        if everywhere is not None:
            sums, seen = summed(sums, everywhere), summed(seen, everywhere)
        return {name: total / seen[name] for name, total in sums.items() if seen[name]}


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


def _measured(metric: Metric, output: Any, target: Any, samples: int) -> Any:
    try:
        value = metric(output, target)
    except EXPECTED as error:
        if lost(error) or out_of_memory(error):
            raise
        kinds = f"output {describe(output)} and target {describe(target)}"
        raise BatchError(f"can't take {kinds}: {error!r:.200}.{_whole(target)}") from error
    if isinstance(value, bool) and samples > 1:
        fix = _whole(target) or " Compare tensors, or return float(...)."
        raise BatchError(f"gave {value}, one word for the whole batch.{fix}")
    return value


def _whole(target: Any) -> str:
    """What to say of a target that is a batch with named parts."""
    if fields(target) is None:
        return ""
    fix = 'metrics={"accuracy": lambda output, batch: output.argmax(1) == batch["label"]}'
    return f" A metric gets the whole batch: {fix}."


def _mean(value: Any, samples: int) -> torch.Tensor:
    try:
        numbers = torch.as_tensor(value, dtype=None if isinstance(value, torch.Tensor) else torch.float64).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        kind = type(value).__name__
        raise BatchError(f"gave a {kind}: give one number, or one for each sample.") from error
    if numbers.ndim == 0:
        return numbers
    if numbers.shape[0] != samples:
        shape = tuple(numbers.shape)
        raise BatchError(f"gave shape {shape}: give one number, or one for each sample.")
    return numbers.double().mean() if numbers.device.type != "mps" else numbers.float().mean()
