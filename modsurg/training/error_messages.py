"""From an exception inside a step to a message that names the batch and the fix."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from modsurg.errors import BatchError, TrainingError
from modsurg.training.batches import describe, fields, forward
from modsurg.training.distributed import is_peer_lost, peer_lost_error
from modsurg.training.state import Runtime, TrainingState

_LOOKUPS = (KeyError, IndexError, AttributeError, AssertionError, ZeroDivisionError)
EXPECTED = (RuntimeError, ValueError, TypeError, MemoryError, *_LOOKUPS)

_CASTS = {
    " and Float": "The weights are float32: inputs.float().",  # a linear layer's words
    "type (float) should be the same": "The weights are float32: inputs.float().",  # a convolution's
    "expected target dtype to be Long": "Class numbers are whole numbers: target.long().",
    "expected scalar type Long": "Class numbers are whole numbers: target.long().",  # the same in torch 2.6
    "multi-target not supported": "It takes one class number for each sample: target.squeeze(1).",
    "to the desired output type Long": "It compares with floating numbers: target.float().",
    "required positional argument": "Of a tuple the last is the target; to give the model all of it: ((a, b), target).",
}


def check_scalar(loss: Any, where: object) -> None:
    """Refuse a loss that is not a scalar.

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


def explain_forward(
    error: Exception, state: TrainingState, runtime: Runtime, where: object, batch: Any, output: Any = None
) -> Exception:
    """Give the error to raise in place of one that the model or the loss raised.

    There is an output if it was the loss that failed.
    """
    if (common := explain_common(error, where, describe(batch))) is not None:
        return common
    if (labels := _explain_labels(error, state, runtime, batch)) != "":
        return BatchError(f"{where}: {labels}")
    if "more than 1 value per channel" in str(error):
        text = f"{where}: BatchNorm can't train on {describe(batch)}, a single value of each channel"
        return BatchError(f"{text}: DataLoader(..., drop_last=True) leaves a last batch of one out.")
    model, names = type(state.model).__name__, runtime.signature.names
    said = f"{type(error).__name__}: {error}" if isinstance(error, _LOOKUPS) else str(error)
    if isinstance(error, TypeError) and (named := fields(batch)) is not None:
        if names and not names & set(named):
            return BatchError(f"{where}: {_explain_names(model, names, list(map(str, named)))}")
        said += '. The loss gets the whole batch: loss=lambda output, batch: f(output, batch["name"]).'
    has = describe(batch)
    given = f", of which {model} makes {describe(output)}" if isinstance(error, _LOOKUPS) and output is not None else ""
    return BatchError(f"{where}: {model} and the loss can't take {has}{given}: {said}{_find_cast(error, has)}")


def explain_backward(error: Exception, model: nn.Module, where: object) -> Exception:
    """Give the error to raise in place of one that the backward pass raised."""
    if (common := explain_common(error, where, "backward")) is not None:
        return common
    hint = ""
    if "does not require grad" in str(error):
        hint = ". The loss does not depend on any parameter that trains."
        if not any(p.requires_grad for p in model.parameters()):
            hint = '. Every parameter is frozen: modsurg.unfreeze(model, "...") what shall train.'
    return TrainingError(f"{where}: backward failed: {error}{hint}")


def explain_common(error: Exception, where: object, what: str) -> Exception | None:
    """Give the error in place of one that has nothing to do with the batch's contents; None for any other."""
    if is_peer_lost(error):
        return peer_lost_error(error)
    if out_of_memory(error):
        fix = "a smaller batch_size"
        if torch.is_grad_enabled():
            fix += ", with accumulate=2 for the same step"
        return TrainingError(f"{where}: out of memory in {what}. Try: {fix}. ({error})")
    return error if isinstance(error, TrainingError) or type(error) not in EXPECTED else None


def out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that the memory of a device is full.

    Example:
        >>> out_of_memory(MemoryError()), out_of_memory(ValueError("shape"))
        (True, False)
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(s in str(error) for s in ("out of memory", "can't allocate memory"))


def check_labels(where: object, loss: Any, output: Any, target: Any) -> None:
    """Look at class numbers before a loss that would bring down an accelerator over them.

    Raises:
        BatchError: They are out of range.
    """
    if not isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss) or not isinstance(target, torch.Tensor):
        return
    if target.is_floating_point() or not isinstance(output, torch.Tensor) or output.ndim < 2:
        return
    wrong = _explain_range(target[target != loss.ignore_index], output.shape[1])
    if wrong:
        raise BatchError(f"{where}: {wrong}")


def _explain_labels(error: Exception, state: TrainingState, runtime: Runtime, batch: Any) -> str:
    """What to say of class numbers that are out of range, empty if that is not what is wrong."""
    target = batch[-1] if isinstance(batch, tuple | list) and len(batch) > 1 else None
    if not isinstance(target, torch.Tensor) or target.is_floating_point() or not target.numel():
        return ""
    if "out of bounds" not in str(error):
        return ""
    try:
        with torch.no_grad():
            output = forward(state.model, runtime.signature.names, batch)[0]
    except EXPECTED:
        return ""
    return _explain_range(target, output.shape[1]) if isinstance(output, torch.Tensor) and output.ndim > 1 else ""


def _explain_range(target: torch.Tensor, classes: int) -> str:
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
    return f"labels go from {lowest} to {highest}, the model's {classes} outputs are the classes 0 to {top}: {fix}."


def _explain_names(model: str, takes: Iterable[str], has: list[str]) -> str:
    """What to say of a batch none of whose named parts is an argument of forward."""
    pair = f'[(s["{has[0]}"], s["{has[-1]}"]) for s in samples]'
    return (
        f"forward of {model} takes {', '.join(sorted(takes))}, and the batch has {', '.join(has)}: call them alike; "
        f"or, where the model is not yours, make tuples: DataLoader(..., collate_fn=lambda samples: "
        f"torch.utils.data.default_collate({pair}))."
    )


def _find_cast(error: Exception, has: str) -> str:
    """What to write where the batch has the right numbers in another dtype or shape."""
    if "ndarray" in has:
        return ". Make tensors of the arrays: torch.as_tensor(array)."
    return next((f". {fix}" for said, fix in _CASTS.items() if said in str(error)), "")
