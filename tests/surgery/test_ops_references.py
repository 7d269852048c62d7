import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from modsurg import remove, replace, wrap
from modsurg.errors import ModsurgWarning
from modsurg.surgery.ops import references


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)
        self.blocks = [self.a, self.b]
        self.table = {"first": self.a, "more": {"inner": [self.a]}}
        self.pair = (self.a, 3)
        self.call = self.a.forward
        self.later = partial(self.a, torch.ones(1, 2))
        held = self.a
        self.closure = lambda x: held(x)
        self.config = SimpleNamespace(layer=self.a)

    def routes(self, x):
        yield self.a(x)
        yield self.blocks[0](x)
        yield self.table["first"](x)
        yield self.table["more"]["inner"][0](x)
        yield self.pair[0](x)
        yield self.call(x)
        yield self.later()
        yield self.closure(x)
        yield self.config.layer(x)


def test_every_reference_is_rewired_and_undone():
    model, x = Net(), torch.ones(1, 2)
    before = list(model.routes(x))
    blocks = model.blocks
    report = replace(model, "a", nn.Linear(2, 2))
    assert all(torch.equal(out, model.a(x)) for out in model.routes(x))
    assert model.blocks is blocks
    report.undo()
    assert all(torch.equal(out, was) for out, was in zip(model.routes(x), before, strict=True))


def test_a_wrapper_is_met_through_every_reference():
    class Doubled(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return 2 * self.base(x)

    model, x = Net(), torch.ones(1, 2)
    before = list(model.routes(x))
    wrap(model, "a", Doubled)
    assert all(torch.equal(out, 2 * was) for out, was in zip(model.routes(x), before, strict=True))


def test_what_is_deleted_is_reported():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
            self.order = [self.layers[1]]

    model = Listed()
    with pytest.warns(ModsurgWarning, match=r'"order\[0\]" still holds "layers.1", which left the model'):
        remove(model, "layers.1")


def test_a_part_of_a_replaced_block_is_reported():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
            self.shortcut = [self.block[0]]

    with pytest.warns(ModsurgWarning, match=r'"shortcut\[0\]" still holds "block.0"'):
        replace(Outer(), "block", nn.Identity())


def test_a_method_that_the_new_module_lacks_is_reported():
    class Special(nn.Linear):
        def extra(self):
            return 1

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Special(2, 2)
            self.extra = self.layer.extra

    with pytest.warns(ModsurgWarning, match='"extra" is still the method extra of the old module; Linear has none'):
        replace(Outer(), "layer", nn.Linear(2, 2))


def test_a_tied_weight_that_comes_apart_is_reported():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    with pytest.warns(ModsurgWarning, match=r'"head.weight" was tied to "embed.weight" and no longer is'):
        replace(model, "head", nn.Linear(3, 7))


def test_removing_one_of_two_tied_says_nothing():
    shared = nn.Linear(3, 3)
    model = nn.Sequential(shared, nn.Sequential(shared), nn.Linear(3, 3))
    assert remove(model, "1").warnings == ()
    model = nn.Sequential(shared, nn.Sequential(shared))
    model[1].kept = [shared]
    with pytest.warns(ModsurgWarning, match='"1.kept.0." still holds "0", which left the model'):
        remove(model, "0")


def test_a_replacement_that_keeps_the_tie_says_nothing():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["embed"].weight

    def scaled(old):
        new = copy.copy(nn.Linear(3, 5, bias=False))
        new.weight = old.weight
        return new

    assert replace(model, "head", scaled).warnings == ()
    assert model["head"].weight is model["embed"].weight


def test_a_parent_that_its_child_knows():
    class Child(nn.Module):
        def __init__(self, parent):
            super().__init__()
            self.up = [parent]

    model = nn.Sequential(nn.Sequential())
    model[0].add_module("child", Child(model[0]))
    wrap(model, "0", lambda old: nn.Sequential(old))
    assert model[0][0].child.up[0] is model[0][0]


def test_many_places_that_come_apart_are_searched_once_for_each_parent(monkeypatch):
    searches = []
    search = references.Search
    monkeypatch.setattr(references, "Search", lambda *given: searches.append(given) or search(*given))
    shared = [nn.Linear(2, 2) for _ in range(5)]
    model = nn.Sequential(nn.Sequential(*shared), nn.Sequential(*shared))
    replace(model, "1.*", nn.Identity, untie=True)
    assert len(searches) == 2
