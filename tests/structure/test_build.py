import collections
import dataclasses

import pytest
import torch
from blueprints import Net, again, assert_same
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from modsurg.errors import TrustError
from modsurg.structure.build import build, describe

HERE = __name__


@dataclasses.dataclass
class Config:
    width: int


def test_no_constructor_is_called(monkeypatch):
    data = describe(nn.Sequential(nn.Linear(2, 2), Net(a=nn.ReLU()))).data

    def refuse(*_, **__):
        raise AssertionError("a constructor was called")

    for kind in (nn.Module, nn.Linear, nn.Sequential, nn.ReLU, Net):
        monkeypatch.setattr(kind, "__init__", refuse)
    assert isinstance(build(data, Net)[1].a, nn.ReLU)


def test_without_values_the_tensors_are_on_meta():
    model = build(describe(nn.BatchNorm1d(3)).data)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert model.weight.requires_grad


def test_order_modes_and_empty_slots():
    model = nn.Sequential(
        collections.OrderedDict(z=nn.Linear(2, 2, bias=False), a=nn.BatchNorm1d(2), m=nn.Dropout(0.3))
    )
    model.add_module("none", None)
    model.z.requires_grad_(False)
    model.a.eval()
    model.register_parameter("gain", None)
    model.register_buffer("mask", None)
    back = again(model)
    assert_same(model, back)
    assert list(back._modules) == ["z", "a", "m", "none"]
    assert back.none is None
    assert back.z.bias is None
    assert (back.gain, back.mask) == (None, None)


def test_ties_shared_modules_and_aliases():
    shared = nn.Linear(3, 3)
    model = Net(a=shared, b=nn.Sequential(shared, nn.Linear(3, 3)))
    model.b[1].weight = shared.weight
    model.blocks = [model.a, model.b]
    model.weights = {"w": shared.weight}
    model.go = model.b.forward
    back = again(model)
    assert_same(model, back)
    assert back.a is back.b[0]
    assert back.b[1].weight is back.a.weight
    assert back.blocks[1] is back.b
    assert back.weights["w"] is back.a.weight
    assert back.go.__self__ is back.b


def test_one_config_in_many_modules_stays_one():
    config = Config(3)
    model = nn.Sequential(*[Net(config=config, sizes=[1, 2]) for _ in range(5)])
    back = again(model)
    assert all(module.config is back[0].config for module in back)
    assert back[0].sizes is not back[1].sizes
    assert back[0].config == config


def test_lists_alike_do_not_become_one():
    back = again(nn.Sequential(Net(sizes=[1]), Net(sizes=[1])))
    back[0].sizes.append(2)
    assert back[1].sizes == [1]


def test_extra_containers():
    model = Net(
        items=nn.ParameterList([nn.Parameter(torch.ones(1)), torch.zeros(2)]),
        table=nn.ParameterDict({"b": nn.Parameter(torch.ones(1)), "a": torch.zeros(2)}),
        names=nn.ModuleDict({"z": nn.ReLU(), "a": nn.Tanh()}),
    )
    back = again(model)
    assert_same(model, back)
    assert len(back.items) == 2
    assert list(back.table) == list(model.table)


def test_a_class_inside_a_function_opens_with_the_class_itself():
    class Local(nn.Module):
        pass

    data = describe(Local()).data
    assert isinstance(build(data, [Local]), Local)
    with pytest.raises(TrustError, match=r"not trusted[\s\S]*Local"):
        build(data)


LAYERS = st.deferred(
    lambda: (
        st.builds(nn.Linear, st.integers(1, 3), st.integers(1, 3), st.booleans())
        | st.builds(nn.BatchNorm1d, st.integers(1, 3))
        | st.builds(nn.Dropout)
        | st.lists(LAYERS, max_size=3).map(lambda layers: nn.Sequential(*layers))
        | st.lists(LAYERS, max_size=3).map(nn.ModuleList)
        | st.tuples(LAYERS, LAYERS).map(lambda pair: Net(a=pair[0], b=pair[1], again=pair[0]))
        | st.dictionaries(st.sampled_from("abc"), st.integers() | st.text(), max_size=2).map(lambda d: Net(info=d))
    )
)


@given(LAYERS, st.randoms(use_true_random=False))
def test_any_tree_comes_back(model, random):
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if len(layers) > 1 and layers[0].weight.shape == layers[1].weight.shape:
        layers[1].weight = layers[0].weight
    for module in model.modules():
        module.training = random.random() < 0.5
    back = again(model)
    assert_same(model, back)
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    assert [name for name, _ in back.named_modules(remove_duplicate=False)] == names
