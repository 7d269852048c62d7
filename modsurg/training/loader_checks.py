"""What can be seen of a loader before its first batch."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from modsurg.errors import BatchError, counted
from modsurg.training.data import length


def check_loader(loader: Any, name: str, *, again: bool = True) -> None:
    """Refuse what gives no batches, what is known to be empty, and what can't be iterated `again`.

    Raises:
        BatchError: With the fix.
    """
    _check_data(loader, name)
    if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
        raise BatchError(f"{name} is a {type(loader).__name__}, which gives no batches: pass a DataLoader or a list.")
    if again and isinstance(loader, Iterator):
        raise BatchError(f"{name} is an iterator, which lasts for one epoch: pass the loader itself, or list({name}).")
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        raise BatchError(f"{name} is a dataset, which gives no batches: DataLoader({name}, batch_size=64).")
    if length(loader) == 0:
        hint = ""
        if isinstance(loader, DataLoader) and loader.drop_last and (samples := length(loader.dataset)):
            make = counted(samples, "sample makes", "samples make")
            hint = f" (drop_last=True, and {make} no batch of {loader.batch_size})"
        raise BatchError(f"{name} is empty{hint}: it must give at least one batch.")


def _check_data(loader: Any, name: str) -> None:
    """Refuse the data itself, of which each row would become a batch."""
    if isinstance(loader, Mapping | str | bytes):
        text = f"{name} is a {type(loader).__name__}, which gives its parts and not batches"
        raise BatchError(f"{text}. Try: a DataLoader, or a list of batches.")
    if _is_array(loader):
        text = f"is a {type(loader).__name__}, of which each row would be a batch"
    elif isinstance(loader, tuple | list) and _is_table(loader):
        text = (
            f"is a {type(loader).__name__} of {counted(len(loader), 'array', 'arrays')}, each of which would be a batch"
        )
    else:
        return
    fix = "DataLoader(TensorDataset(x, y), batch_size=32), of tensors x and y, or a list of batches"
    raise BatchError(f"{name} {text}. Try: {fix}.")


def _is_array(value: object) -> bool:
    return all(hasattr(value, name) for name in ("shape", "ndim", "__getitem__")) and not isinstance(value, Dataset)


def _is_table(loader: Sequence[Any]) -> bool:
    """Whether a sequence holds the columns of a dataset; a list of equal tensors is a list of batches."""
    if not loader or not all(_is_array(part) for part in loader):
        return False
    kinds = {(str(part.dtype), part.ndim) for part in loader if isinstance(part, torch.Tensor)}
    lengths = {len(part) if part.ndim else 0 for part in loader}
    return isinstance(loader, tuple) or not kinds or (len(kinds) > 1 and len(lengths) == 1)
