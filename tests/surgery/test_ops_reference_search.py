import dataclasses
import functools
from collections import ChainMap, OrderedDict, defaultdict, deque, namedtuple

import pytest
import torch
from torch import nn

from modsurg import remove, replace, wrap
from modsurg.errors import ModsurgWarning
from modsurg.surgery.ops.references import Search

Pair = namedtuple("Pair", "first second")


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    layer: nn.Module


class Slotted:
    __slots__ = ("layer",)

    def __init__(self, layer):
        self.layer = layer

    def get(self):
        return self.layer


HOLDERS = {
    "a named tuple": (lambda m: Pair(m, [m]), lambda held: held.second[0]),
    "a set": (lambda m: {m}, lambda held: next(iter(held))),
    "a frozen set": (lambda m: frozenset([m]), lambda held: next(iter(held))),
    "an ordered dict": (lambda m: OrderedDict(a=m), lambda held: held["a"]),
    "a default dict": (lambda m: defaultdict(list, a=[m]), lambda held: held["a"][0]),
    "a chain of dicts": (lambda m: ChainMap({"a": m}), lambda held: held["a"]),
    "lists ten deep": (lambda m: [[[[[[[[[[m]]]]]]]]]], lambda held: held[0][0][0][0][0][0][0][0][0][0]),
    "a function's attribute": (
        lambda m: functools.wraps(m.forward)(lambda x: x),
        lambda held: held.__wrapped__.__self__,
    ),
}


class Net(nn.Module):
    def __init__(self, hold):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        self.held = hold(self.body[0])


@pytest.mark.parametrize("kind", HOLDERS)
def test_whatever_holds_the_old_module_gets_the_new_one_and_back(kind):
    hold, get = HOLDERS[kind]
    model = Net(hold)
    old = model.body[0]
    report = replace(model, "body.0", nn.Linear(2, 2))
    assert report.warnings == ()
    assert get(model.held) is model.body[0]
    report.undo()
    assert model.body[0] is old
    assert get(model.held) is old


@pytest.mark.parametrize(
    "hold, said",
    [
        (
            lambda m: {m: 1},
            r'"held" \(a dict\) still holds the old module, and can\'t be given the new one; make it again',
        ),
        (lambda m: [Frozen(m)], r'"held\[0\].layer" \(a Frozen\) still holds the old module'),
        (Slotted, r'"held.layer" \(a Slotted\) still holds the old module'),
        (lambda m: Slotted(m).get, r'"held.layer" \(a Slotted\) still holds the old module'),
        (lambda m: deque([1, m]), r'"held" \(a deque\) still holds the old module'),
        (lambda m: {"rows": deque([m])}.values(), r'"held" \(a deque\) still holds the old module'),
        (lambda m: lambda x, layer=m: layer, r'"held \(default\)" \(a function\) still holds the old module'),
        (lambda m: lambda *, layer=m: layer, r'"held \(default\)" \(a function\) still holds the old module'),
        (
            lambda m: [nn.Sequential(m)],
            r'"held\[0\].0" is still the old module: Sequential is not part of the model and was left',
        ),
    ],
)
def test_what_can_not_be_given_the_new_module_is_reported(hold, said):
    with pytest.warns(ModsurgWarning, match=said):
        replace(Net(hold), "body.0", nn.Linear(2, 2))


def test_hooks_that_speak_of_the_old_module():
    def hook(layer, seen):
        return lambda *args: seen.append(layer)

    model, seen = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), []
    model.register_forward_hook(hook(model[0], seen))
    model[0].register_forward_pre_hook(hook(model[0], seen))
    model[1].register_forward_hook(functools.partial(lambda layer, *args: seen.append(layer), model[0]))
    old, x = model[0], model[0].weight.detach()
    report = replace(model, "0", lambda old: nn.Linear(2, 2))
    model(x)
    assert [layer is model[0] for layer in seen] == [True] * 3
    report.undo()
    model(x)
    assert [layer is old for layer in seen[3:]] == [True] * 3


def test_a_wrapper_that_is_listed_when_it_is_made_keeps_what_it_wraps():
    made = []

    class Listed(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base
            made.append(self)

    model = nn.Sequential(nn.Linear(2, 2))
    model.made = made
    wrap(model, "0", Listed)
    assert isinstance(model[0].base, nn.Linear)


def test_an_untied_place_whose_parent_holds_the_shared_module():
    shared = nn.Linear(2, 2)
    model = nn.Sequential(nn.Sequential(shared), nn.Sequential(shared))
    model[1].order = [shared]
    with pytest.warns(ModsurgWarning, match=r'"1.order\[0\]" still holds the module that was at "1.0" too'):
        replace(model, "1.0", nn.Identity(), untie=True)


def test_what_is_removed_says_nothing_of_itself():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].me = [model[0]]
    assert remove(model, "0").warnings == ()


def test_what_was_put_into_a_dict_since_stays_there():
    model = nn.Sequential(nn.Linear(2, 2))
    model.table = {"first": model[0]}
    report = replace(model, "0", nn.Identity())
    model.table["more"] = 1
    report.undo()
    assert model.table == {"first": model[0], "more": 1}


class Holder:
    def __init__(self, **held):
        self.__dict__.update(held)


def test_data_and_optimizers_are_not_gone_through():
    class Pictures(torch.utils.data.Dataset):
        def __init__(self):
            self.samples = [Untouched()]

    class Untouched:
        __slots__ = ("name",)

        @property
        def __dict__(self):
            raise AssertionError("looked at")

    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    loader = torch.utils.data.DataLoader(Pictures())
    optimizer = torch.optim.SGD(model.parameters())
    optimizer.more = Untouched()
    model.trainer = Holder(loader=loader, optimizers=[optimizer], later=torch.optim.lr_scheduler.StepLR(optimizer, 1))
    assert replace(model, "0", lambda old: nn.Linear(2, 2)).warnings == ()


def test_rows_of_plain_values_are_not_kept_one_by_one():
    rows = [("a.png", number) for number in range(10)]
    search = Search({}, {}, set())
    assert search.swap(rows, "rows") is rows
    assert search.swap({"a": 1, "b": None}, "table") == {"a": 1, "b": None}
    assert list(search._done) == [id(rows)]


def test_a_key_that_is_no_plain_value_is_not_written_out():
    class Key:
        def __repr__(self):
            raise AssertionError("written out")

    model = nn.Sequential(nn.Linear(2, 2))
    model.table = {Key(): [nn.Sequential(model[0])]}
    with pytest.warns(ModsurgWarning, match=r'"table\[Key\]\[0\].0" is still the old module'):
        replace(model, "0", nn.Linear(2, 2))


def test_an_outer_module_that_holds_the_model_follows_by_itself():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.ReLU())
    model.outer = [nn.ModuleDict({"net": model}), nn.Sequential(nn.Sequential(model[0]))]
    assert wrap(model, "0.0", nn.Sequential).warnings == ()
    model.outer.append(nn.Sequential(nn.Sequential(model[0][0])))
    with pytest.warns(
        ModsurgWarning, match=r'"outer\[2\].0.0" is still the old module: Sequential is not part'
    ) as said:
        wrap(model, "0.0", nn.Sequential)
    assert len(said) == 1
