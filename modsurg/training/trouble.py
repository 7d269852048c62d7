"""From an exception inside a step to a message that names the batch and the fix."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from modsurg.errors import BatchError, DeviceError, TrainingError
from modsurg.training.batches import count, describe, first_tensor, forward, part
from modsurg.training.processes import farewell, lost

if TYPE_CHECKING:
    from modsurg.training.epochs import Epoch

EXPECTED = (RuntimeError, ValueError, IndexError, TypeError, MemoryError)


def explain(error: Exception, epoch: "Epoch", batch: Any) -> Exception:
    """Give the error to raise in place of one that model, loss or backward raised."""
    if lost(error):
        return farewell(error)
    if out_of_memory(error):
        return TrainingError(_memory(error, epoch, batch))
    if isinstance(error, TrainingError) or type(error) not in EXPECTED:
        return error
    if batch is None:
        return TrainingError(f"{epoch}: backward failed: {error}{_no_gradient(error, epoch)}")
    labels = _labels(error, epoch, batch)
    if labels:
        return BatchError(f"{epoch}: {labels}")
    model = type(epoch.trainer.model).__name__
    return BatchError(f"{epoch}: {model} and the loss can't take {describe(batch)}: {error}")


def no_scalar(loss: Any, where: object) -> str:
    """The message for a loss that is no scalar."""
    if isinstance(loss, torch.Tensor):
        return f'{where}: the loss has shape {tuple(loss.shape)}, not (): reduction="mean", or return loss.mean().'
    return f"{where}: the loss is a {type(loss).__name__}, not a tensor: loss=lambda output, target: <a scalar tensor>."


def out_of_memory(error: BaseException) -> bool:
    """Whether the error says that there is no memory left, on any device.

    Example:
        >>> out_of_memory(MemoryError()), out_of_memory(ValueError("shape"))
        (True, False)
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(s in str(error) for s in ("out of memory", "can't allocate memory"))


def _memory(error: Exception, epoch: "Epoch", batch: Any) -> str:
    trainer = epoch.trainer
    if batch is None:
        return f"{epoch}: out of memory in backward: a smaller batch, with accumulate=2 for the same step. {error}"
    size, fits = count(batch), _largest(epoch, batch)
    if not fits:
        return f"{epoch}: out of memory, and one sample is already too much: a smaller model or input. {error}"
    more = -(-size // fits) * trainer.accumulate
    return f"{epoch}: {size} samples are out of memory, {fits} fit: batch_size={fits}, accumulate={more}. {error}"


def _largest(epoch: "Epoch", batch: Any) -> int:
    """The largest half, quarter, ... of the batch that goes forward and backward; 0 if none does."""
    trainer = epoch.trainer
    buffers = [(buffer, buffer.clone()) for buffer in trainer.model.buffers()]
    size = count(batch) // 2
    while size:
        try:
            output, target = forward(trainer.runner, trainer.accepted, part(batch, size))
            torch.autograd.backward(trainer.loss(output, target))
            break
        except EXPECTED:
            size //= 2
        finally:
            output = target = None
            epoch.window.drop()
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)
    return size


def _labels(error: Exception, epoch: "Epoch", batch: Any) -> str:
    """What to say of class numbers that are out of range, empty if that is not what is wrong."""
    trainer = epoch.trainer
    target = batch[-1] if isinstance(batch, tuple | list) and len(batch) > 1 else None
    if not isinstance(target, torch.Tensor) or target.is_floating_point() or not target.numel():
        return ""
    if "out of bounds" not in str(error):
        return ""
    try:
        with torch.no_grad():
            classes = first_tensor(forward(trainer.model, trainer.accepted, batch)[0])
    except EXPECTED:
        return ""
    return "" if classes is None or classes.ndim < 2 else _range(target, classes.shape[1])


def check_labels(where: object, loss: Any, output: Any, target: Any) -> None:
    """Look at class numbers before a loss that would bring down an accelerator over them.

    Raises:
        BatchError: They are out of range.
    """
    if not isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss) or not isinstance(target, torch.Tensor):
        return
    if target.is_floating_point() or not isinstance(output, torch.Tensor) or output.ndim < 2:
        return
    wrong = _range(target[target != loss.ignore_index], output.shape[1])
    if wrong:
        raise BatchError(f"{where}: {wrong}")


def _range(target: torch.Tensor, classes: int) -> str:
    if not target.numel():
        return ""
    lowest, highest, top = int(target.min()), int(target.max()), classes - 1
    if lowest >= 0 and highest <= top:
        return ""
    fix = f"give the last layer {highest + 1} outputs"
    if lowest == 1 and highest == classes:
        fix = "subtract 1 from the labels"
    elif lowest < 0:
        fix = f"CrossEntropyLoss(ignore_index={lowest}) leaves {lowest} out"
    return f"labels go from {lowest} to {highest}, the model's {classes} outputs stand for 0 to {top}: {fix}."


def _no_gradient(error: Exception, epoch: "Epoch") -> str:
    if "does not require grad" not in str(error):
        return ""
    if not any(p.requires_grad for p in epoch.trainer.model.parameters()):
        return '. Every parameter is frozen: modsurg.unfreeze(model, "...") what shall train.'
    return ". The loss does not depend on any parameter that trains."


def check_parameters(model: nn.Module, device: torch.device) -> None:
    """Refuse a model that is not where the run is.

    Raises:
        DeviceError: Named with the first parameter.
    """
    for name, parameter in model.named_parameters():
        if parameter.device.type != device.type:
            raise DeviceError(f"{name} is on {parameter.device}, the trainer on {device}: model.to({str(device)!r}).")
