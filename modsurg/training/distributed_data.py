"""The part of a loader that each process has."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, TypeGuard

import torch.distributed as dist
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from modsurg.errors import BatchError, counted
from modsurg.training.data import length, parts, rebuilt
from modsurg.training.distributed import gathered, rank


def split_validation(loader: Iterable[Any]) -> Iterable[Any]:
    """Give this process's part of a validation loader: each sample once in all, so not always as many for each process.

    The samples of a DataLoader are those that the sampler of the first process draws; a sampler that is distributed
    already stays. Of anything else each process takes every n-th batch.
    """
    world = dist.get_world_size()
    if _is_distributed(loader):
        return loader
    if not _by_sampler(loader):
        return islice(loader, rank(), None, world)
    sampler = _sampler(loader)
    order = range(len(sampler)) if type(sampler) is SequentialSampler else gathered(list(sampler))[0]
    return _with_order(loader, order[rank() :: world])


def split_training(loader: Iterable[Any], seed: int) -> Iterable[Any]:
    """Give this process's part of a training loader.

    The samples of a DataLoader are dealt out by a DistributedSampler, so that its batch size is that of one process; a
    sampler that is distributed already stays. Of anything else each process takes every n-th batch.

    Raises:
        BatchError: A sampler whose order would be lost.
    """
    if _is_distributed(loader):
        return loader
    if not _by_sampler(loader):
        return EveryNth(loader)
    sampler, data = _sampler(loader), loader.dataset
    shuffle = type(sampler) is RandomSampler
    plain = type(sampler) is SequentialSampler or (shuffle and not sampler.replacement)
    if not plain or len(sampler) != length(data):
        kind, fix = type(sampler).__name__, "sampler=DistributedSampler(dataset)"
        if sampler is loader.batch_sampler:
            fix = f"batch_sampler={kind}(DistributedSampler(dataset), ...), whose `sampler` is that one"
        raise BatchError(f"train_loader: {kind} gives every process all of its samples: {fix}.")
    drop_last = getattr(loader.batch_sampler, "drop_last", False)
    return _with_order(loader, DistributedSampler(data, shuffle=shuffle, seed=seed, drop_last=drop_last))


def _by_sampler(loader: object) -> TypeGuard[DataLoader[Any]]:
    return type(loader) is DataLoader and not isinstance(loader.dataset, IterableDataset)


def _sampler(loader: DataLoader[Any]) -> Any:
    """Find what gives a loader's order: its sampler, or another batch sampler than that of torch."""
    batches = loader.batch_sampler
    if batches is None:
        return loader.sampler
    return batches.sampler if type(batches) is BatchSampler else batches


def _is_distributed(loader: object) -> bool:
    return any(hasattr(part, "num_replicas") for part in parts(loader))


def _with_order(loader: DataLoader[Any], order: Any) -> DataLoader[Any]:
    """Rebuild the loader over a part of its order."""
    batches = loader.batch_sampler
    if batches is None:
        return rebuilt(loader, loader.dataset, sampler=order, batch_size=None)
    if type(batches) is not BatchSampler:
        return rebuilt(loader, loader.dataset, batch_sampler=order)
    return rebuilt(loader, loader.dataset, sampler=order, batch_size=batches.batch_size, drop_last=batches.drop_last)


class EveryNth:
    """Every n-th batch of a loader, as many for each process; those that do not go round are left out."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.world = dist.get_world_size()
        batches = length(loader)
        if batches is not None and batches < self.world:
            raise BatchError(
                f"{counted(batches, 'batch', 'batches')} for {self.world} processes: each needs one at least."
            )

    def __len__(self) -> int:
        return len(self.loader) // self.world

    def __getattr__(self, name: str) -> Any:
        if name == "loader":
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __iter__(self) -> Iterator[Any]:
        rounds = zip(*[iter(self.loader)] * self.world, strict=False)
        return (batches[rank()] for batches in rounds)
