"""From an exception inside a step to a message that names the batch and the fix."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from modsurg.errors import BatchError, TrainingError, counted
from modsurg.training.batches import count, describe, fields, first_tensor, forward, part
from modsurg.training.distributed import farewell, lost

if TYPE_CHECKING:
    from modsurg.training.trainer import Trainer

_LOOKUPS = (KeyError, IndexError, AttributeError, AssertionError, ZeroDivisionError)
EXPECTED = (RuntimeError, ValueError, TypeError, MemoryError, *_LOOKUPS)

_CASTS = {
    " and Float": "The weights are float32: inputs.float().",  # a linear layer's words
    "type (float) should be the same": "The weights are float32: inputs.float().",  # a convolution's
    "expected target dtype to be Long": "Class numbers are whole numbers: target.long().",
    "expected scalar type Long": "Class numbers are whole numbers: target.long().",  # the same in torch 2.6
    "multi-target not supported": "It takes one class number for each sample: target.squeeze(1).",
    "to the desired output type Long": "It compares with floating numbers: target.float().",
}


def measured(trainer: "Trainer", model: Any, batch: Any, where: object, *, look: bool) -> tuple[torch.Tensor, Any, Any]:
    """Loss, output and target of a batch on the device, in the trainer's precision.

    Args:
        trainer: For its loss.
        model: What to call.
        batch: See `forward`.
        where: The batch's name in messages.
        look: Look at class numbers before an accelerator does.

    Raises:
        BatchError: Model or loss can't take the batch.
    """
    output = None
    try:
        with trainer.autocast:
            output, target = forward(model, trainer.signature.names, batch)
            if look and trainer.place.type != "cpu":
                check_labels(where, trainer.loss, output, target)
            loss = trainer.loss(output, target)
    except EXPECTED as error:
        raise explain(error, trainer, where, batch, output) from error
    if look and isinstance(batch, tuple | list) and len(batch) > 1:
        trainer.has_targets = True
    return loss, output, target


def check_scalar(loss: Any, where: object) -> None:
    """Refuse a loss that is no scalar.

    Raises:
        BatchError: With the fix.
    """
    if isinstance(loss, torch.Tensor) and loss.ndim == 0:
        return
    if isinstance(loss, torch.Tensor):
        fix = f'has shape {tuple(loss.shape)}, not (): reduction="mean", or return loss.mean().'
    else:
        fix = f"is a {type(loss).__name__}, not a tensor: loss=lambda output, target: <a scalar tensor>."
    raise BatchError(f"{where}: the loss {fix}")


def explain(error: Exception, trainer: "Trainer", where: object, batch: Any, output: Any = None) -> Exception:
    """Give the error to raise in place of one that model, loss or backward (then there is no batch) raised.

    The output is there if the model came to its end, so that the loss failed.
    """
    if lost(error):
        return farewell(error)
    if out_of_memory(error):
        return TrainingError(f"{where}: {_memory(trainer, batch)} {error}")
    if isinstance(error, TrainingError) or type(error) not in EXPECTED:
        return error
    if batch is None:
        return TrainingError(f"{where}: backward failed: {error}{_no_gradient(error, trainer)}")
    labels = _labels(error, trainer, batch)
    if labels:
        return BatchError(f"{where}: {labels}")
    if "more than 1 value per channel" in str(error):
        fix = "DataLoader(..., drop_last=True) leaves a last batch of one out"
        return BatchError(
            f"{where}: BatchNorm can't train on {describe(batch)}, a single value of each channel: {fix}."
        )
    model = type(trainer.model).__name__
    if isinstance(error, TypeError) and (named := fields(batch)) is not None:
        if trainer.signature.names and not trainer.signature.names & set(named):
            return BatchError(f"{where}: {_unlike(model, trainer.signature.names, list(map(str, named)))}")
        error = TypeError(
            f'{error}. The loss gets the whole batch: loss=lambda output, batch: f(output, batch["name"]).'
        )
    has = describe(batch)
    said = f"{type(error).__name__}: {error}" if isinstance(error, _LOOKUPS) else str(error)
    given = f", of which {model} makes {describe(output)}" if isinstance(error, _LOOKUPS) and output is not None else ""
    return BatchError(f"{where}: {model} and the loss can't take {has}{given}: {said}{_cast(error, has)}")


def out_of_memory(error: BaseException) -> bool:
    """Whether the error says that there is no memory left, on any device.

    Example:
        >>> out_of_memory(MemoryError()), out_of_memory(ValueError("shape"))
        (True, False)
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(s in str(error) for s in ("out of memory", "can't allocate memory"))


def _memory(trainer: "Trainer", batch: Any) -> str:
    if batch is None:
        return "out of memory in backward: a smaller batch, with accumulate=2 for the same step."
    size = count(batch)
    if not torch.is_grad_enabled():
        return counted(size, "sample is", "samples are") + " out of memory: a smaller batch_size in this loader."
    fits = _largest(trainer, batch)
    if not fits:
        return "out of memory, and one sample is already too much: a smaller model or input."
    more = -(-size // fits) * trainer.accumulate
    return f"{size} samples are out of memory, {fits} fit: batch_size={fits}, accumulate={more}."


def _largest(trainer: "Trainer", batch: Any) -> int:
    """The largest half, quarter, ... of the batch that goes forward and backward; 0 if none does."""
    buffers = [(buffer, buffer.clone()) for buffer in trainer.model.buffers()]
    size = count(batch) // 2
    while size:
        try:
            _try(trainer, part(batch, size))
            break
        except EXPECTED:
            size //= 2
        finally:
            trainer.optimizer.zero_grad()
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)
    return size


def _try(trainer: "Trainer", batch: Any) -> None:
    with trainer.autocast:
        loss = trainer.loss(*forward(trainer.model, trainer.signature.names, batch))
    torch.autograd.backward(loss)


def _labels(error: Exception, trainer: "Trainer", batch: Any) -> str:
    """What to say of class numbers that are out of range, empty if that is not what is wrong."""
    target = batch[-1] if isinstance(batch, tuple | list) and len(batch) > 1 else None
    if not isinstance(target, torch.Tensor) or target.is_floating_point() or not target.numel():
        return ""
    if "out of bounds" not in str(error):
        return ""
    try:
        with torch.no_grad():
            classes = first_tensor(forward(trainer.model, trainer.signature.names, batch)[0])
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


def _unlike(model: str, takes: Iterable[str], has: list[str]) -> str:
    """What to say of a batch none of whose named parts is an argument of forward."""
    pair = f'[(s["{has[0]}"], s["{has[-1]}"]) for s in samples]'
    return (
        f"forward of {model} takes {', '.join(sorted(takes))}, and the batch has {', '.join(has)}: call them alike; "
        f"or, where the model is not yours, make tuples: DataLoader(..., collate_fn=lambda samples: "
        f"torch.utils.data.default_collate({pair}))."
    )


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


def _cast(error: Exception, has: str) -> str:
    """What to write where the batch has the right numbers in another dtype or shape."""
    if "required positional argument" in str(error):
        return ". Of a tuple the last is the target; to give the model all of it: ((a, b), target)."
    if "ndarray" in has:
        return ". Make tensors of the arrays: torch.as_tensor(array)."
    return next((f". {fix}" for said, fix in _CASTS.items() if said in str(error)), "")


def _no_gradient(error: Exception, trainer: "Trainer") -> str:
    if "does not require grad" not in str(error):
        return ""
    if not any(p.requires_grad for p in trainer.model.parameters()):
        return '. Every parameter is frozen: modsurg.unfreeze(model, "...") what shall train.'
    return ". The loss does not depend on any parameter that trains."
