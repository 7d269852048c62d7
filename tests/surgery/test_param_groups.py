"""Groups of an optimizer by path: each trainable parameter once, rates by layer."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchvision.models import resnet18, vit_b_16

from modsurg import freeze, param_groups, replace, sync
from modsurg.errors import EditError, NoMatchError, OptimizerError


class Vit(nn.Module):
    def __init__(self, depth=4):
        super().__init__()
        self.class_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.patches = nn.Linear(12, 8)
        self.blocks = nn.ModuleList([nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(depth)])
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)


def names(model, groups):
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[known[id(parameter)] for parameter in group["params"]] for group in groups]


def test_the_first_match_wins_and_the_rest_is_one_group():
    model = Vit(1)
    where = {"**.bias": {"weight_decay": 0.0}, "class_token": {"weight_decay": 0.0, "lr": 1.0}, nn.Linear: {"lr": 0.1}}
    groups = param_groups(model, where, lr=0.01, weight_decay=0.05)
    assert names(model, groups) == [
        ["patches.bias", "blocks.0.0.bias", "blocks.0.1.bias", "norm.bias", "head.bias"],
        ["class_token"],
        ["patches.weight", "blocks.0.1.weight", "head.weight"],
        ["blocks.0.0.weight", "norm.weight"],
    ]
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [
        (0.01, 0),
        (1.0, 0),
        (0.1, 0.05),
        (0.01, 0.05),
    ]
    torch.optim.AdamW(groups)


@given(st.lists(st.sampled_from(["**.bias", "blocks.*", "head", "**.0.weight", "class_token"]), unique=True))
def test_every_parameter_is_in_one_group(patterns):
    model = Vit(2)
    model.head.weight.requires_grad_(False)
    groups = param_groups(model, {pattern: {"lr": 0.1} for pattern in patterns}, lr=1.0)
    found = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(found) == len(set(found))
    assert set(found) == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert all(group["params"] for group in groups)


def test_tied_and_frozen_parameters():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    freeze(model, "2")
    groups = param_groups(model, {"1": {"lr": 0.1}}, lr=1.0)
    assert names(model, groups) == [["0.weight", "1.bias"], ["0.bias"]]
    freeze(model, "**")
    with pytest.raises(OptimizerError, match=r"no parameter of the model requires a gradient\. Try: unfreeze"):
        param_groups(model)


def test_what_is_refused():
    model = Vit(1)
    with pytest.raises(NoMatchError, match="haed"):
        param_groups(model, {"haed": {"lr": 1.0}})
    with pytest.raises(EditError, match="the pattern says which they are"):
        param_groups(model, {"head": {"params": []}})
    with pytest.raises(OptimizerError, match="layer_decay needs a learning rate"):
        param_groups(Vit(), layer_decay=0.5)
    with pytest.raises(OptimizerError, match="needs numbered blocks"):
        param_groups(nn.Linear(2, 2), lr=0.1, layer_decay=0.5)
    for decay in (0, 2, True, "x"):
        with pytest.raises(OptimizerError, match="must be a number above 0"):
            param_groups(Vit(), lr=0.1, layer_decay=decay)


def test_rates_by_layer():
    model = Vit(4)
    groups = param_groups(model, {"**.bias": {"weight_decay": 0.0}}, lr=1.0, weight_decay=0.1, layer_decay=0.5)
    rates = {name: group["lr"] for group, found in zip(groups, names(model, groups), strict=True) for name in found}
    assert rates["class_token"] == rates["patches.weight"] == rates["patches.bias"] == 0.5**5
    assert [rates[f"blocks.{n}.1.weight"] for n in range(4)] == [0.5**4, 0.5**3, 0.5**2, 0.5]
    assert rates["norm.weight"] == rates["head.bias"] == 1.0
    assert {group["weight_decay"] for group in groups} == {0.0, 0.1}


def test_rates_of_torchvisions_transformer():
    model = vit_b_16()
    groups = param_groups(model, lr=1.0, layer_decay=0.75)
    rates = {name: group["lr"] for group, found in zip(groups, names(model, groups), strict=True) for name in found}
    layers = [name for name in rates if name.startswith("encoder.layers.encoder_layer_")]
    assert layers
    assert rates["heads.head.weight"] == 1.0
    assert rates["class_token"] == rates["conv_proj.weight"] == pytest.approx(0.75**13)
    assert rates["encoder.layers.encoder_layer_11.mlp.0.weight"] == pytest.approx(0.75)


def test_new_parameters_enter_the_right_group():
    model = Vit(1)
    optimizer = torch.optim.SGD(param_groups(model, {"head": {"lr": 1.0}}, lr=0.1))
    replace(model, "head", nn.Linear(8, 3), optimizer=optimizer)
    head = next(group for group in optimizer.param_groups if any(p is model.head.weight for p in group["params"]))
    assert head["lr"] == 1.0
    assert len(optimizer.param_groups) == 2
    model.norm = nn.LayerNorm(8)
    sync(optimizer, model)
    norm = next(group for group in optimizer.param_groups if any(p is model.norm.weight for p in group["params"]))
    assert norm["lr"] == 0.1


def test_stages_of_a_convolutional_network():
    model = resnet18(num_classes=3)
    groups = param_groups(model, lr=1.0, layer_decay=0.5)
    rates = {name: group["lr"] for group, found in zip(groups, names(model, groups), strict=True) for name in found}
    assert [rates[f"layer{n}.0.conv1.weight"] for n in (1, 2, 3, 4)] == [0.5**4, 0.5**3, 0.5**2, 0.5]
    assert (rates["conv1.weight"], rates["fc.weight"]) == (0.5**5, 1.0)
