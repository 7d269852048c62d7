"""What a batch is."""

import collections
import dataclasses
import types

import pytest
import torch
from torch import nn

from modsurg.training.batches import describe, fields, forward, move, read_signature

Pair = collections.namedtuple("Pair", "image label")


class Open(dict):
    """Fields by attribute, of any name."""

    __getattr__ = dict.__getitem__


@dataclasses.dataclass(frozen=True)
class Sample:
    x: torch.Tensor
    name: str = "a"


@dataclasses.dataclass
class Movable:
    name: str
    x: torch.Tensor

    def to(self, device):
        return Movable(self.name, self.x.to(device))


def test_every_structure_is_moved_and_keeps_its_class():
    x = torch.ones(2)
    batch = (Pair(x, [x]), {"a": x, "b": 3}, Sample(x))
    moved = move(batch, torch.device("meta"))
    assert type(moved[0]) is Pair
    assert type(moved[2]) is Sample
    assert {str(t.device) for t in (moved[0].image, moved[0].label[0], moved[1]["a"], moved[2].x)} == {"meta"}
    assert batch[2].x is x
    assert str(x.device) == "cpu"


@pytest.mark.parametrize("kind", [Open, collections.UserDict, collections.OrderedDict])
def test_a_mapping_of_a_class_of_its_own_keeps_it(kind):
    batch = kind({"x": torch.ones(2)})
    moved = move(batch, torch.device("meta"))
    assert type(moved) is kind
    assert (str(moved["x"].device), str(batch["x"].device)) == ("meta", "cpu")
    assert move(types.MappingProxyType(batch), torch.device("meta"))["x"].is_meta


def test_what_is_there_already_is_not_copied():
    x = torch.ones(2)
    assert move([x], torch.device("cpu"))[0] is x


def test_an_object_that_can_move_itself_is_asked():
    packed = nn.utils.rnn.pack_sequence([torch.ones(3, 1), torch.ones(1, 1)])
    assert move(packed, torch.device("meta")).data.is_meta


def test_descriptions():
    x = torch.ones(4, 2)
    assert describe(Pair(x, {"y": x})) == "(float32[4, 2], dict(y=float32[4, 2]))"
    assert describe(Sample(x)) == "Sample(x=float32[4, 2], name=str)"


class TestForward:
    def test_pairs_and_longer_tuples(self):
        class Two(nn.Module):
            def forward(self, a, b):
                return a + b

        x, y = torch.ones(2), torch.zeros(2)
        accepted = read_signature(Two()).names
        assert forward(Two(), accepted, (x, x, y))[1] is y
        assert forward(Two(), accepted, ((x, x), y))[0].tolist() == [2, 2]
        assert forward(Two(), accepted, ({"a": x, "b": x}, y))[0].tolist() == [2, 2]
        assert forward(nn.ReLU(), None, Pair(x, y))[1] is y

    def test_fields(self):
        class Named(nn.Module):
            def forward(self, x):
                return x

        class Anything(nn.Module):
            def forward(self, **fields):
                return fields

        batch = {"x": torch.ones(2), "y": torch.zeros(2)}
        assert forward(Named(), read_signature(Named()).names, batch) == (batch["x"], batch)
        assert forward(Anything(), read_signature(Anything()).names, batch)[0] == batch
        assert read_signature(Anything()).names is None
        assert read_signature(torch.compile(Named())).names == {"x"}
        assert forward(Named(), read_signature(Named()).names, Sample(batch["x"]))[0] is batch["x"]
        assert fields(Sample) is None
