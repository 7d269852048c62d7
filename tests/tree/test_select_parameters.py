"""Parameters by path."""

import pytest
import torch
from torch import nn

from modsurg import select, select_parameters
from modsurg.errors import CountError, NoMatchError, WhereError


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.class_token = nn.Parameter(torch.zeros(1, 4))
        self.blocks = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
        self.head = nn.Linear(4, 2)


@pytest.fixture
def model():
    return Tokens()


@pytest.mark.parametrize(
    "where, names",
    [
        ("class_token", ["class_token"]),
        ("blocks.0.weight", ["blocks.0.weight"]),
        ("blocks.-1.weight", ["blocks.2.weight"]),
        ("**.bias", ["blocks.0.bias", "blocks.1.bias", "blocks.2.bias", "head.bias"]),
        (r"re:blocks\.\d\.weight", ["blocks.0.weight", "blocks.1.weight", "blocks.2.weight"]),
        ("head", ["head.weight", "head.bias"]),
        (nn.LayerNorm, ["blocks.1.weight", "blocks.1.bias"]),
        (["head.bias", "blocks.1"], ["head.bias", "blocks.1.weight", "blocks.1.bias"]),
        (lambda path, module: path == "head", ["head.weight", "head.bias"]),
    ],
)
def test_each_form(model, where, names):
    assert list(select_parameters(model, where)) == names


def test_a_pattern_over_modules_and_parameters_means_both(model):
    assert next(iter(select_parameters(model, "*"))) == "class_token"
    assert len(select_parameters(model, "**")) == len(list(model.parameters()))


def test_a_parameter_object_and_a_selection(model):
    assert list(select_parameters(model, [model.head.bias, select(model, "blocks.1")])) == [
        "head.bias",
        "blocks.1.weight",
        "blocks.1.bias",
    ]


def test_a_shared_parameter_comes_once(model):
    model.blocks[2].weight = model.blocks[0].weight
    assert list(select_parameters(model, "**.weight")) == ["blocks.0.weight", "blocks.1.weight", "head.weight"]
    assert list(select_parameters(model, "blocks.2.weight")) == ["blocks.2.weight"]


def test_modules_without_parameters_match_nothing_but_are_no_error(model):
    model.blocks.append(nn.ReLU())
    assert select_parameters(model, nn.ReLU) == {}


@pytest.mark.parametrize(
    "where, said",
    [
        ("class_tokn", 'at "class_tokn" in Tokens. Nearest: "class_token"'),
        ("blocks.0.wieght", 'no module and no parameter at "blocks.0.wieght" in Tokens. Nearest: .*"blocks.0.weight"'),
        ("**.biass", 'no module and no parameter matches ".*biass" in Tokens. Nearest: "blocks.0.bias"'),
        ("blocks.7", "has 3 children, 0 to 2"),
        (nn.LSTM, "no LSTM in Tokens"),
        (nn.Parameter(torch.zeros(1)), "this Parameter is not in Tokens"),
    ],
)
def test_no_match_names_the_nearest(model, where, said):
    with pytest.raises(NoMatchError, match=said):
        select_parameters(model, where)
    assert select_parameters(model, where, count=0) == {}


def test_count_is_of_parameters(model):
    assert len(select_parameters(model, "**.bias", count=4)) == 4
    with pytest.raises(CountError, match='count=1, but 4 sites match in Tokens: "blocks.0.bias"'):
        select_parameters(model, "**.bias", count=1)


def test_another_kind_of_where_is_refused(model):
    with pytest.raises(WhereError, match="where=5 is a int"):
        select_parameters(model, 5)
