"""How many samples a batch holds: as its parts agree, or as the user says."""

import math
from collections.abc import Callable, Iterable, Iterator
from numbers import Real
from typing import Any

import torch

from modsurg.errors import BatchError
from modsurg.training.batches import describe, fields

Samples = Callable[[Any], "float | torch.Tensor"]

_CHANNELS = (1, 3, 4)


def count_samples(
    batch: Any, output: Any = None, said: Samples | float | torch.Tensor | None = None, where: object = "batch 1"
) -> float:
    """Count the samples of a batch, by which its loss and metrics are weighted.

    Args:
        batch: Each of its tensors, and each list in it, has as many entries as there are samples.
        output: Of the model; one of its tensors, or a list, has that length too. None if it is not known.
        said: The number, or a function that gives it for the batch; then the parts need not agree.
        where: The batch, by its number.

    Raises:
        BatchError: The lengths disagree and nothing was said, or what was said is not a number.

    Example:
        >>> count_samples((torch.ones(4, 3), torch.ones(4)), torch.ones(4, 2))
        4
        >>> count_samples((torch.ones(7, 4), torch.ones(4)), said=lambda batch: len(batch[1]))
        4.0
    """
    if said is not None:
        return _said_samples(said, batch, where)
    lengths, found = batch_lengths(batch), _output_lengths(output)
    if lengths is None:
        lengths = tuple(dict.fromkeys(found)) or (1,)
        lengths = lengths if len(lengths) == 1 else ()
    elif found:
        lengths = tuple(length for length in lengths if length in found)
    if not lengths:
        raise BatchError(f"{where}: {_describe_disagreement(batch, output, found)}")
    return lengths[0]


def batch_lengths(batch: Any) -> tuple[int, ...] | None:
    """Give the numbers of samples on which all parts of a batch agree, the likeliest first; None without tensors.

    Example:
        >>> batch_lengths([[torch.ones(3, 8, 8), torch.ones(3, 9, 9)], torch.zeros(2)])
        (2,)
        >>> batch_lengths({"x": torch.ones(8, 2), "lengths": torch.ones(3)})
        ()
    """
    if type(batch) in (tuple, list):
        if len(batch) == 2 and isinstance(batch[0], torch.Tensor) and isinstance(batch[1], torch.Tensor):
            first, second = batch
            if first.ndim and second.ndim:
                return (len(first),) if len(first) == len(second) else ()
        return _agreed_lengths(batch)
    return _agreed_lengths(batch) if isinstance(batch, tuple) else _part_lengths(batch)


def _part_lengths(part: Any) -> tuple[int, ...] | None:
    if isinstance(part, torch.Tensor):
        return (len(part),) if part.ndim else None
    named = fields(part)
    if named is not None:
        return _agreed_lengths(named.values())
    if isinstance(part, tuple | list) and not callable(getattr(type(part), "to", None)):
        inner = _agreed_lengths(part)
        if inner is None:
            return None
        if any(fields(item) is not None for item in part):  # a mapping for each sample
            return (len(part),)
        pictures = all(isinstance(item, torch.Tensor) and item.ndim == 3 and len(item) in _CHANNELS for item in part)
        return (len(part), *inner) if pictures else (*inner, len(part))
    shape = getattr(part, "shape", None)  # an array of numpy
    return (int(shape[0]),) if isinstance(shape, tuple) and shape else None


def _agreed_lengths(parts: Iterable[Any]) -> tuple[int, ...] | None:
    parts = list(parts)
    known = [lengths for lengths in map(_part_lengths, parts) if lengths is not None]
    if not known:
        return None
    agreed = tuple(length for length in known[0] if all(length in lengths for lengths in known))
    if len(agreed) > 1:  # a list of numbers or words tells which it is
        plain = {len(part) for part in parts if isinstance(part, list | tuple) and _part_lengths(part) is None}
        agreed = tuple(sorted(agreed, key=lambda length: length not in plain))
    return agreed


def _output_lengths(output: Any) -> list[int]:
    """Every length in an output: it may hold more than one value for each sample."""
    if isinstance(output, torch.Tensor):
        return [len(output)] if output.ndim else []
    named = fields(output)
    if named is not None:
        return [length for value in named.values() for length in _output_lengths(value)]
    if isinstance(output, tuple | list):
        inner = [length for value in output for length in _output_lengths(value)]
        return [*inner, len(output)] if inner else []
    return []


def _said_samples(said: Any, batch: Any, where: object) -> float:
    try:
        value = said(batch) if callable(said) else said
        number = value.item() if isinstance(value, torch.Tensor) else value
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise BatchError(f"{where}: samples= failed on {describe(batch)}: {error!r:.200}") from error
    if not isinstance(number, Real) or not math.isfinite(number) or number < 0:
        raise BatchError(
            f"{where}: samples= gave {number!r:.80} for {describe(batch)}: it must be a number, 0 or more."
        )
    return float(number)


def _describe_disagreement(batch: Any, output: Any, found: list[int]) -> str:
    made = "" if output is None else f", output {describe(output)}"
    expressions = list(_length_expressions(batch))
    likely = [text for text, length in expressions if {length} == set(found)] or [text for text, _ in expressions]
    fix = f"Trainer(..., samples=lambda batch: {likely[-1] if likely else 1})"
    if output is None:
        fix += ", or epoch.step(loss, samples=...)"
    return f"batch {describe(batch)}{made}: their lengths differ, so the number of samples is not known. Try: {fix}."


def _length_expressions(batch: Any) -> Iterator[tuple[str, int]]:
    """Code that gives the length of a part of a batch, and that length."""
    named = None if isinstance(batch, torch.Tensor) else fields(batch)
    if named is not None:
        attribute = "batch[{!r}]" if hasattr(type(batch), "__getitem__") else "batch.{}"
        parts = [(attribute.format(name), value) for name, value in named.items()]
    elif isinstance(batch, tuple | list):
        parts = [(f"batch[{i}]", value) for i, value in enumerate(batch)]
    else:
        parts = [("batch", batch)]
    for text, value in parts:
        if isinstance(value, torch.Tensor | list | tuple) and (not isinstance(value, torch.Tensor) or value.ndim):
            yield f"len({text})", len(value)
