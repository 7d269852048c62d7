"""Taking up a loader in the middle of an epoch."""

import random

import pytest
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    WeightedRandomSampler,
    get_worker_info,
)

from modsurg.checkpoints.rng import random_states
from modsurg.training.data import ResumableLoader, length


class Decoding(Dataset):
    """Counts what is decoded, and adds noise of three kinds."""

    decoded = 0

    def __len__(self):
        return 20

    def __getitem__(self, index):
        Decoding.decoded += 1
        return torch.tensor([index, torch.rand(()).item(), random.random()])


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(20))


class Shuffled:
    """A loader of one's own that shuffles at its start."""

    def __len__(self):
        return 5

    def __iter__(self):
        for batch in torch.randperm(20).split(4):
            yield batch + torch.rand(())


def loaders():
    yield "list", lambda: list(torch.arange(20).split(4))
    yield "shuffled", lambda: DataLoader(Decoding(), batch_size=4, shuffle=True)
    yield (
        "own generator",
        lambda: DataLoader(Decoding(), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(3)),
    )
    yield "weighted", lambda: DataLoader(Decoding(), batch_size=4, sampler=WeightedRandomSampler(torch.ones(20), 20))
    yield "no batches", lambda: DataLoader(Decoding(), batch_size=None, shuffle=True)
    yield "stream", lambda: DataLoader(Stream(), batch_size=4)
    yield "own", Shuffled
    yield "workers", lambda: DataLoader(Decoding(), batch_size=4, shuffle=True, num_workers=2)


@pytest.mark.parametrize(("name", "make"), list(loaders()), ids=lambda value: value if isinstance(value, str) else "")
def test_the_rest_of_an_epoch_is_the_same(name, make):
    torch.manual_seed(0)
    random.seed(0)
    feed = ResumableLoader(make())
    list(feed.begin(0))
    batches = feed.begin(1)
    for _ in range(2):
        next(batches)
    now = random_states()
    kept = feed.states
    expected = list(batches)
    again = ResumableLoader(make())
    torch.manual_seed(9)
    from modsurg.checkpoints.rng import set_random_states

    set_random_states(now)
    rest = list(again.resume(1, 2, kept, None))
    assert len(rest) == len(expected)
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(rest, expected, strict=True))


def test_what_was_seen_is_not_decoded_again():
    feed = ResumableLoader(DataLoader(Decoding(), batch_size=4, shuffle=True))
    list(feed.begin(0))
    Decoding.decoded = 0
    assert len(list(feed.resume(0, 3, feed.states, None))) == 2
    assert Decoding.decoded == 8


def test_samplers_are_told_the_epoch():
    told = []

    class Told(list):
        def set_epoch(self, epoch):
            told.append(epoch)

    list(ResumableLoader(Told([1])).begin(4))
    assert told == [4]


def test_length():
    assert [length(loader) for loader in ([1], DataLoader(Stream()), iter([]))] == [1, None, None]


class Shifted(Dataset):
    """Adds what a worker wrote into it, and sees that workers know it as itself."""

    shift = 0

    def __len__(self):
        return 8

    def __getitem__(self, index):
        assert get_worker_info().dataset is self or isinstance(get_worker_info().dataset, Subset)
        return index + self.shift


def shift_by_ten(worker):
    dataset = get_worker_info().dataset
    inner = dataset.dataset if isinstance(dataset, Subset) else dataset
    assert type(inner) is Shifted
    inner.shift = 10


@pytest.mark.parametrize("part", [Shifted(), Subset(Shifted(), range(4, 8))], ids=["dataset", "subset"])
def test_a_worker_writes_to_the_dataset_itself(part):
    loader = DataLoader(part, batch_size=4, num_workers=1, worker_init_fn=shift_by_ten)
    expected = [batch.tolist() for batch in loader]
    assert expected[-1] == [14, 15, 16, 17]
    assert [batch.tolist() for batch in ResumableLoader(loader).begin(0)] == expected
