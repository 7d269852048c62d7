"""The order of the batches: a loader that can go on in the middle of an epoch."""

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from modsurg.checkpoints.rng import random_states, seed, set_random_states


class ResumableLoader:
    """A training loader whose position can be kept.

    A `DataLoader` draws what a plain loop would draw from torch's generator, so that the same seed gives the same
    order. Its workers are seeded for every batch, so that a batch does not depend on those before it.

    Attributes:
        states: The random states at the beginning of the epoch, from which its order follows.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader
        self.order: _ResumableOrder | None = None
        self.source = loader
        if type(loader) is DataLoader and not isinstance(loader.dataset, IterableDataset):
            self.order = _ResumableOrder(
                loader.sampler if loader.batch_sampler is None else loader.batch_sampler, loader.num_workers > 0
            )
            self.source = _with_resumable_order(loader, self.order)
        self.states: dict[str, Any] = {}

    def __len__(self) -> int:
        return length(self.loader) or 0

    def begin(self, epoch: int) -> Iterator[Any]:
        """Give the batches of an epoch, from its first."""
        for part in parts(self.loader):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        self.states = {**random_states(), "generators": [g.get_state() for g in generators(self.loader)]}
        return iter(self.source)

    def resume(self, epoch: int, skip: int, states: dict[str, Any], position: Any) -> Iterator[Any]:
        """Give the batches of an epoch that was left after `skip` of them.

        Args:
            epoch: Its number.
            skip: How many batches were seen.
            states: `states` of the feed that was interrupted.
            position: What `position` gave, None for a loader without a state.
        """
        if position is not None:
            self.loader.load_state_dict(position)  # type: ignore[attr-defined]  # position() found it there
            batches = self.begin(epoch)
            self.states = states
            return batches
        now = random_states()
        set_random_states(states)
        for generator, state in zip(generators(self.loader), states["generators"], strict=True):
            generator.set_state(state)
        batches = self._after(epoch, skip)
        set_random_states(now)
        return batches

    def close(self) -> None:
        """Let the workers go."""
        self.source = ()

    def position(self) -> Any:
        """Give the loader's own state, if it has one."""
        return self.loader.state_dict() if hasattr(self.loader, "state_dict") else None

    def _after(self, epoch: int, skip: int) -> Iterator[Any]:
        if self.order is not None:
            self.order.skip = skip
            batches = self.begin(epoch)
            self.order.prime()
            self.order.skip = 0
            return batches
        if isinstance(self.loader, Sequence):
            return islice(self.begin(epoch), skip, None)
        batches = self.begin(epoch)
        for _ in islice(batches, skip):
            pass
        return batches


def length(loader: object) -> int | None:
    """Count the batches of a loader, None if it does not know.

    Example:
        >>> length([1, 2]), length(iter([]))
        (2, None)
    """
    try:
        return len(loader) if isinstance(loader, Sized) else None
    except TypeError:
        return None


def generators(*loaders: Any) -> list[torch.Generator]:
    """Find the generators of their own from which loaders draw.

    Example:
        >>> generators(DataLoader([1, 2], shuffle=True, generator=torch.Generator()), [3])
        [<torch._C.Generator object at ...>]
    """
    found = [getattr(part, "generator", None) for loader in loaders for part in parts(loader)]
    return [g for i, g in enumerate(found) if isinstance(g, torch.Generator) and g not in found[:i]]


def rebuilt(loader: DataLoader[Any], dataset: Any, **options: Any) -> DataLoader[Any]:
    """Make a loader with the workers and options of another one, but other samples or another order.

    Example:
        >>> rebuilt(DataLoader([1, 2], num_workers=2), [3, 4, 5], batch_size=2).num_workers
        2
    """
    same = ["collate_fn", "generator", "in_order", "multiprocessing_context", "num_workers", "persistent_workers"]
    same += ["pin_memory", "prefetch_factor", "timeout", "worker_init_fn"]
    return DataLoader(dataset, **{name: getattr(loader, name) for name in same} | options)


class _ResumableOrder:
    """A sampler's order, from the batch after `skip` on; every key comes with a seed if workers need one."""

    def __init__(self, sampler: Iterable[Any], seeded: bool) -> None:
        self.sampler = sampler
        self.seeded = seeded
        self.skip = 0
        self.seed = 0
        self.ready: list[Any] = []
        self.rest: Iterator[Any] = iter(())

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]  # as a DataLoader does: a TypeError where it has no length

    def __iter__(self) -> Iterator[Any]:
        self.seed = zlib.crc32(torch.get_rng_state().numpy().tobytes()) if self.seeded else 0
        self.rest = islice(enumerate(self.sampler), self.skip, None)
        self.ready = []
        return self

    def __next__(self) -> Any:
        number, key = self.ready.pop() if self.ready else next(self.rest)
        return ((self.seed << 32) + number, key) if self.seeded else key

    def prime(self) -> None:
        """Let the sampler draw now what it draws at its start."""
        if not self.seeded and not self.ready:
            self.ready = list(islice(self.rest, 1))


class _SeededDataset(Dataset[Any]):
    """Seed the random generators for each batch, in a worker that reads another dataset."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, Any]) -> Any:
        seed(key[0])
        return self.dataset[key[1]]

    def __getitems__(self, key: tuple[int, list[Any]]) -> Any:
        seed(key[0])
        if getattr(self.dataset, "__getitems__", None):
            return self.dataset.__getitems__(key[1])
        return [self.dataset[index] for index in key[1]]

    def __len__(self) -> int:
        return len(self.dataset)


class _WorkerInit:
    """Let a worker see the user's own dataset, then call the user's `worker_init_fn`."""

    def __init__(self, function: Callable[[int], object] | None) -> None:
        self.function = function

    def __call__(self, worker: int) -> None:
        info: Any = get_worker_info()
        object.__setattr__(info, "dataset", info.dataset.dataset)  # the class of `info` is frozen
        if self.function is not None:
            self.function(worker)


def _with_resumable_order(loader: DataLoader[Any], order: _ResumableOrder) -> DataLoader[Any]:
    """Make the same loader over another order."""
    single = loader.batch_sampler is None
    options: dict[str, Any] = {"sampler": order, "batch_size": None} if single else {"batch_sampler": order}
    if loader.persistent_workers:  # they draw their seed once a loader: not from the generator of the order
        options["generator"] = torch.Generator()
    if not loader.num_workers:
        return rebuilt(loader, loader.dataset, **options)
    options["worker_init_fn"] = _WorkerInit(loader.worker_init_fn)
    return rebuilt(loader, _SeededDataset(loader.dataset), **options)


def parts(loader: Any) -> list[Any]:
    """Give a loader, its samplers and its dataset, as far as it has them."""
    samplers = [getattr(loader, name, None) for name in ("sampler", "batch_sampler")]
    inner = getattr(samplers[1], "sampler", None)
    found = [loader, *samplers, inner, getattr(loader, "dataset", None)]
    return [part for i, part in enumerate(found) if part is not None and not any(part is p for p in found[:i])]
