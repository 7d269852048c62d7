"""Freezing parameters by their own paths."""

import pytest
import torch
from torch import nn

from modsurg import Recipe, freeze, replay, unfreeze
from modsurg.errors import CountError, NoMatchError, UndoError


class Vit(nn.Module):
    def __init__(self):
        super().__init__()
        self.class_token = nn.Parameter(torch.zeros(4))
        self.blocks = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.blocks(x + self.class_token))


def trainable(model):
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_a_parameter_alone_is_frozen_with_its_gradient():
    model = Vit()
    model(torch.randn(3, 4)).sum().backward()
    report = freeze(model, "class_token")
    assert model.class_token.grad is None
    assert model.head.weight.grad is not None
    assert "class_token" not in trainable(model)
    assert str(report) == "~ class_token  1 parameter frozen"
    report.undo()
    assert "class_token" in trainable(model)


def test_patterns_and_lists():
    model = Vit()
    freeze(model, ["class_token", "**.bias"])
    assert trainable(model) == ["blocks.0.weight", "blocks.1.weight", "head.weight"]
    assert model.train().blocks[1].training  # its weight is not frozen, nor are its statistics
    unfreeze(model, "blocks.*.bias")
    assert trainable(model) == ["blocks.0.weight", "blocks.0.bias", "blocks.1.weight", "blocks.1.bias", "head.weight"]
    freeze(model, ["head", "blocks.0.bias"])
    assert trainable(model) == ["blocks.0.weight", "blocks.1.weight", "blocks.1.bias"]


def test_a_pattern_that_matches_modules_means_modules():
    model = Vit()
    with pytest.warns(UserWarning, match="class_token of Vit itself still trains"):
        freeze(model, "*")
    assert trainable(model) == ["class_token"]


def test_what_does_not_match():
    with pytest.raises(NoMatchError, match=r"class_tokne.*class_token"):
        freeze(Vit(), "class_tokne")
    with pytest.raises(CountError, match="count=2, but 3 sites match"):
        freeze(Vit(), "**.bias", count=2)


def test_a_recipe_names_the_parameters():
    model, other = Vit(), Vit()
    recipe = freeze(model, ["blocks.1", "class_token"]).recipe
    replay(other, Recipe.from_json(recipe.to_json()))
    assert trainable(other) == trainable(model) == ["blocks.0.weight", "blocks.0.bias", "head.weight", "head.bias"]


def test_undo_of_one_of_two():
    model = Vit()
    first = freeze(model, "head.bias")
    freeze(model, "head")
    with pytest.raises(UndoError, match=r'"head\.bias" was changed since'):
        first.undo()
    assert not model.head.bias.requires_grad
