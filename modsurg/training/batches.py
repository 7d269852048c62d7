"""What a batch is: how it reaches the device, and what of it goes to the model."""

import copy
import dataclasses
import inspect
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from modsurg.errors import BatchError
from modsurg.tree.wrappers import unwrap


def move(batch: Any, device: torch.device) -> Any:
    """Give the batch with every tensor in it on the device; the structure and the classes stay.

    Args:
        batch: A tensor, or tuples, named tuples, lists, mappings and dataclasses of them, nested. An object with a
            method `to` is asked; anything else is passed on.
        device: Copies from pinned memory do not wait.

    Example:
        >>> move((torch.ones(2), {"y": "cat"}), torch.device("meta"))
        (tensor(..., device='meta', size=(2,)), {'y': 'cat'})
    """
    kind = type(batch)
    if kind is torch.Tensor and batch.device == device:
        return batch
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=device.type == "cuda")
    if callable(getattr(kind, "to", None)):
        return batch.to(device)
    if kind is list or kind is tuple:
        return kind([move(item, device) for item in batch])
    if isinstance(batch, tuple):
        return kind(*[move(item, device) for item in batch])
    if isinstance(batch, Mapping):
        return _move_mapping(batch, device)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        copied = copy.copy(batch)
        for field in dataclasses.fields(batch):
            object.__setattr__(copied, field.name, move(getattr(batch, field.name), device))
        return copied
    return batch


def fields(batch: Any) -> Mapping[str, Any] | None:
    """Give the named parts of a mapping or a dataclass, None for anything else.

    Example:
        >>> fields({"x": 1}), fields((1, 2))
        ({'x': 1}, None)
    """
    if isinstance(batch, Mapping):
        return batch
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return None


def forward(model: Callable[..., Any], accepted: frozenset[str] | None, batch: Any) -> tuple[Any, Any]:
    """Call the model on a batch.

    - A pair `(inputs, target)`: the model gets the inputs; a tuple or mapping of inputs is spread over its arguments.
    - A longer tuple: the last is the target, the model gets the others.
    - A mapping or dataclass: the model gets the fields that its `forward` names, and the loss gets the whole batch.
    - Anything else, and what is in a tuple of one: input and target at once.

    Args:
        model: What to call, a module as a rule.
        accepted: The names in `read_signature(model)`.
        batch: On the model's device.

    Returns:
        The model's output, and the target.

    Example:
        >>> output, target = forward(nn.Linear(3, 2), frozenset(["input"]), (torch.ones(4, 3), torch.zeros(4)))
        >>> output.shape, target.shape
        (torch.Size([4, 2]), torch.Size([4]))
    """
    if isinstance(batch, tuple | list):
        if len(batch) == 2:
            return _spread(model, batch[0]), batch[1]
        if len(batch) > 2:
            return model(*batch[:-1]), batch[-1]
        batch = batch[0]
    named = None if isinstance(batch, torch.Tensor) else fields(batch)
    if named is None:
        return _spread(model, batch), batch
    if accepted is None:
        return model(**named), batch
    known = {name: value for name, value in named.items() if name in accepted}
    return (model(**known) if known else model(batch)), batch


@dataclass(frozen=True)
class Signature:
    """The arguments of a model's forward.

    Attributes:
        names: What they are called; None if any keyword is taken.
        required: How many have to be given.
        most: How many can be given by position; None if any number.
    """

    names: frozenset[str] | None
    required: int = 1
    most: int | None = 1


def read_signature(model: nn.Module) -> Signature:
    """Read the arguments of the model's forward; torch.compile is unwrapped.

    Example:
        >>> read_signature(nn.Linear(1, 1))
        Signature(names=frozenset({'input'}), required=1, most=1)
    """
    parameters = inspect.signature(unwrap(model).forward).parameters
    kinds = [p.kind for p in parameters.values()]
    by_position = [p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return Signature(
        names=None if inspect.Parameter.VAR_KEYWORD in kinds else frozenset(parameters),
        required=sum(p.default is p.empty for p in by_position),
        most=None if inspect.Parameter.VAR_POSITIONAL in kinds else len(by_position),
    )


def predict_batch(
    model: Callable[..., Any], signature: Signature, batch: Any, *, has_targets: bool, where: object = "batch 1"
) -> Any:
    """Call the model on a batch that may come without a target.

    Args:
        model: What to call.
        signature: Of its forward.
        batch: On the model's device. Of a tuple the model gets everything if its forward requires as much, and all
            but the last if it takes no more.
        has_targets: The last of a tuple is known to be the target.
        where: The batch, by its number.

    Raises:
        BatchError: The last of a tuple may be an optional input or a target.

    Example:
        >>> predict_batch(nn.Linear(3, 2), Signature(None), (torch.ones(4, 3), torch.zeros(4)), has_targets=False).shape
        torch.Size([4, 2])
    """
    parts = len(batch) if isinstance(batch, tuple | list) else 1
    if parts == 1 or (parts == 2 and not isinstance(batch[0], torch.Tensor)):
        return forward(model, signature.names, batch)[0]
    if signature.required >= parts:
        return model(*batch)
    if not has_targets and (signature.most is None or signature.most >= parts):
        most = "any number of" if signature.most is None else f"up to {signature.most}"
        text = f"{where}: of {describe(batch)} the last may be a target or an input, as forward takes {most} inputs"
        raise BatchError(f"{text}. Try: batches ((a, b),) or dicts to give the model all of it, (a,) to leave b out.")
    return forward(model, signature.names, batch)[0]


def describe(batch: Any) -> str:
    """Describe a batch in a few words, for messages.

    Example:
        >>> print(describe([torch.ones(4, 3), torch.zeros(4, dtype=torch.int64)]))
        (float32[4, 3], int64[4])
    """
    if isinstance(batch, torch.Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')}{list(batch.shape)}"
    if isinstance(batch, tuple | list):
        return f"({', '.join(describe(item) for item in batch)})"
    named = fields(batch)
    if named is None:
        return type(batch).__name__
    return f"{type(batch).__name__}({', '.join(f'{name}={describe(value)}' for name, value in named.items())})"


def _spread(model: Callable[..., Any], inputs: Any) -> Any:
    if isinstance(inputs, torch.Tensor):
        return model(inputs)
    if isinstance(inputs, tuple | list):
        return model(*inputs)
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def _move_mapping(batch: Mapping[Any, Any], device: torch.device) -> Mapping[Any, Any]:
    parts = {key: move(item, device) for key, item in batch.items()}
    if type(batch) is dict or not isinstance(batch, MutableMapping):
        return parts
    copied = copy.copy(batch)
    for key, item in parts.items():
        copied[key] = item
    return copied
