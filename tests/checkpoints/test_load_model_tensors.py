"""The places that a state fills are those of `state_dict()`."""

import pytest
import torch
import torchvision
from torch import nn

from modsurg import load_state
from modsurg.checkpoints.load.model_tensors import fill_meta, find_targets, overlaps_itself, shared_groups
from modsurg.errors import LoadError


def models():
    shared = nn.Linear(2, 2)
    return {
        "resnet": torchvision.models.resnet18(),
        "vit": torchvision.models.VisionTransformer(8, 4, 2, 2, 8, 8),
        "shared": nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.BatchNorm1d(2))}),
        "rnn": nn.LSTM(2, 3, 2, bidirectional=True),
        "normed": nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 1)),
        "nothing": nn.ReLU(),
    }


@pytest.mark.parametrize("name", models())
def test_keys_and_order(name):
    model = models()[name]
    targets = find_targets(model)
    state = model.state_dict()
    assert list(targets.tensors) == list(state)
    assert all(target.tensor.data_ptr() == state[key].data_ptr() for key, target in targets.tensors.items())


def test_what_is_no_part_of_a_state():
    model = nn.Module()
    model.register_buffer("kept", torch.ones(1))
    model.register_buffer("passing", torch.ones(1, device="meta"), persistent=False)
    model.register_parameter("none", None)
    model.plain = torch.ones(1, device="meta")
    targets = find_targets(model)
    assert list(targets.tensors) == ["kept"]
    assert targets.unfilled == ["passing", "plain"]


def test_who_has_loading_code():
    vit = find_targets(torchvision.models.VisionTransformer(8, 4, 1, 2, 8, 8))
    assert vit.custom == []
    assert vit.migrating == ["encoder.layers.encoder_layer_0.mlp"]
    resnet = find_targets(torchvision.models.resnet18())
    assert resnet.custom == resnet.migrating == []
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].register_load_state_dict_pre_hook(lambda *rest: None)
    assert find_targets(model).custom == ["0"]
    assert find_targets(nn.Sequential(nn.LazyLinear(2))).custom == ["0"]


class Tagged(nn.Parameter):
    pass


def test_meta_parameters_keep_their_class_and_attributes():
    model = nn.Module()
    model.weight = Tagged(torch.empty(2, device="meta"), requires_grad=False)
    model.weight.group = "slow"
    load_state(model, {"weight": torch.ones(2)})
    assert type(model.weight) is Tagged
    assert model.weight.group == "slow"
    assert model.weight.tolist() == [1, 1]
    assert not model.weight.requires_grad
    assert isinstance(model.weight, nn.Parameter)


def test_meta_is_filled_and_taken_back():
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    weight = model.weight
    undo = fill_meta(find_targets(model).tensors.values())
    assert model.weight.device.type == "cpu"
    undo(None)
    assert model.weight is weight


def test_values_in_several_places_are_refused():
    class Elsewhere(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            raise NotImplementedError

    model = nn.Module()
    model.weight = torch.Tensor._make_wrapper_subclass(Elsewhere, (2,))
    model.register_buffer("shards", torch.Tensor._make_wrapper_subclass(Elsewhere, (2,)))
    with pytest.raises(LoadError, match="shards is a Elsewhere, whose values are not in one place; nothing was loaded"):
        load_state(model, {"shards": torch.ones(2)})


@pytest.mark.parametrize(
    "tensor, overlaps",
    [
        (torch.ones(3, 4), False),
        (torch.ones(3, 4).t(), False),
        (torch.ones(3, 4)[:, ::2], False),
        (torch.ones(1, 4).expand(3, 4), True),
        (torch.ones(9).as_strided((3, 3), (1, 1)), True),
        (torch.ones(()), False),
        (torch.ones(1, 1).expand(1, 1), False),
    ],
)
def test_overlap(tensor, overlaps):
    assert overlaps_itself(tensor) is overlaps


def test_groups_of_shared_memory():
    base = torch.zeros(8)
    model = nn.Module()
    for name, view in {"a": base[:3], "b": base[2:5], "c": base[5:], "d": torch.ones(8), "e": base[:0]}.items():
        model.register_buffer(name, view)
    groups = shared_groups(find_targets(model).tensors.values())
    assert [[target.name for target in group] for group in groups] == [["a", "b"]]
