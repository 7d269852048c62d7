"""A second model like the first, whatever it holds."""

import copy
import enum
import functools
import weakref
from collections import OrderedDict, defaultdict, deque, namedtuple
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from modsurg.tracing.meta_copy import Cloner, is_own_hook, to_meta, to_real

Pair = namedtuple("Pair", "left right")


class Mode(enum.Enum):
    FAST = 1


class Stubborn:
    def __copy__(self):
        raise TypeError("not me")


class Stateful(list):
    def __copy__(self):
        raise TypeError("not me")


def test_containers_are_new_and_what_they_hold_once():
    tensor = torch.ones(2)
    value = {
        "list": [tensor],
        "tuple": (tensor, 1),
        "pair": Pair(tensor, 2),
        "ordered": OrderedDict(a=tensor),
        "default": defaultdict(list, a=[tensor]),
        "deque": deque([tensor], maxlen=3),
        "space": SimpleNamespace(a=tensor),
    }
    new = Cloner(to_meta).value(value)
    one = new["list"][0]
    assert one.is_meta
    assert all(each is one for each in (new["tuple"][0], new["pair"].left, new["ordered"]["a"], new["default"]["a"][0]))
    assert new["deque"][0] is new["space"].a is one
    assert new["deque"].maxlen == 3
    assert [type(each) for each in new.values()] == [type(each) for each in value.values()]
    assert value["list"][0] is tensor


def test_what_holds_nothing_of_the_model_stays_itself():
    value = (1, "a", None, Mode.FAST, torch.float32, len, lambda: 3, ("nested", 2.0), Stubborn(), Stateful([1]))
    assert all(a is b for a, b in zip(Cloner(to_meta).value(value), value, strict=True))


def test_a_value_that_holds_itself():
    value = [torch.ones(2)]
    value.append(value)
    new = Cloner(to_meta).value(value)
    assert new[1] is new is not value


def test_tied_parameters_stay_tied_and_attributes_of_parameters_are_kept():
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    model[1].weight = model[0].weight
    model[0].weight.mark = "here"
    new = Cloner(to_real).model(model)
    assert new[0].weight is new[1].weight is not model[0].weight
    assert new[0].weight.mark == "here"
    assert torch.equal(new[0].weight, model[0].weight)


def test_a_partial_and_a_closure_follow_their_module():
    model = nn.Sequential(nn.Linear(2, 2))
    inner = model[0]
    model.call = functools.partial(inner.forward)
    model.closure = lambda: inner
    new = Cloner(to_meta).model(model)
    assert new.call.func.__self__ is new[0]
    assert new.closure() is new[0]
    assert model.closure() is inner


def test_a_weak_proxy_follows_its_module_and_a_dead_one_stays():
    class Child(nn.Module):
        def __init__(self, parent):
            super().__init__()
            object.__setattr__(self, "parent", weakref.proxy(parent))
            vars(self)["gone"] = weakref.proxy(Stateful())

        def forward(self, x):
            return x * self.parent.scale

    model = nn.Module()
    model.scale, model.child = 2.0, Child(model)
    copied = Cloner(to_meta).model(model)
    copied.scale = 3.0
    assert (copied.child(1.0), model.child(1.0)) == (3.0, 2.0)
    assert vars(copied.child)["gone"] is vars(model.child)["gone"]


def test_only_the_hooks_of_torch_are_kept():
    layer = nn.utils.spectral_norm(nn.Linear(2, 2))
    layer.register_forward_hook(print)
    assert [is_own_hook(hook) for hook in layer._forward_pre_hooks.values()] == [True]
    assert not is_own_hook(print)
    new = Cloner(to_meta).model(layer)
    assert (len(new._forward_pre_hooks), len(new._forward_hooks)) == (1, 0)
    assert (len(layer._forward_pre_hooks), len(layer._forward_hooks)) == (1, 1)


def test_layouts_that_are_not_plain():
    sparse = torch.eye(3).to_sparse()
    assert to_meta(sparse).shape == (3, 3)
    turned = torch.ones(2, 3).T
    assert to_meta(turned).stride() == turned.stride()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_model_that_deepcopy_refuses():
    model = nn.Linear(2, 2)
    model.cached = model.weight * 2  # not a leaf
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    assert Cloner(to_real).model(model).cached.shape == (2, 2)
