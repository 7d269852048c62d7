"""What sets a module apart from another of its class, live and in a file."""

import dataclasses
import enum
import functools

import pytest
import torch
from torch import nn

from modsurg.structure.build import describe
from modsurg.structure.schema import outline
from modsurg.views.diff.attributes import attributes, packed_attributes, text_of


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Config:
    width: int
    shape: tuple[int, ...]


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rate = 0.5
        self.sizes = [1, (2, 3)]
        self.names = {"a": 1}
        self.kind = torch.float16
        self.act = nn.functional.softplus
        self.nothing = None
        self._private = 3


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Colour.RED, "Colour.RED"),
        (Config(3, (1, 2)), "(3, (1, 2))"),
        ({2, 1}, "{1, 2}"),
        (functools.partial(nn.LayerNorm, eps=1.0), "(torch.nn.modules.normalization.LayerNorm, (), {'eps': 1.0})"),
        (torch.float32, "torch.float32"),
        (torch.Size([2, 3]), "(2, 3)"),
        (int, "int"),
        ([object()], None),
    ],
)
def test_text(value, text):
    assert text_of(value) == text


def test_private_attributes_and_the_mode_are_left_out():
    assert list(attributes(Custom())) == ["rate", "sizes", "names", "kind", "act", "nothing"]


@pytest.mark.parametrize("make", [Custom, lambda: nn.Conv2d(3, 4, 3, padding="same"), lambda: nn.LSTM(2, 3)])
def test_a_file_tells_the_same(make):
    module = make()
    data = describe(module).data
    (place,) = outline(data)
    assert packed_attributes(place.attributes, data["names"]) == attributes(module)
