import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from modsurg import Recipe, add, edit, replace, replay, wrap
from modsurg.errors import RecipeError
from modsurg.surgery.recipes.borrowed import give_back, loans, taken_out


class Foreign(nn.Module):
    """No recipe could build it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.function = lambda x: x

    def forward(self, x):
        return self.function(self.layer(x))


def net():
    torch.manual_seed(0)
    return nn.Sequential(Foreign(), nn.Linear(3, 3), nn.Linear(3, 3))


def replayed(report):
    other = net()
    replay(other, Recipe.from_json(report.recipe.to_json()))
    return other


def test_what_is_wrapped_is_not_described_and_need_not_be_trusted():
    model, x = net(), torch.randn(2, 3)
    was = model(x)
    other = replayed(wrap(model, "0", nn.Sequential))
    assert isinstance(model[0][0], Foreign)
    assert isinstance(other[0][0], Foreign)
    assert torch.equal(other(x), was)


def test_one_new_module_in_two_places_stays_one():
    model = net()
    with edit(model) as e:
        e.replace("1", shared := nn.Linear(3, 3))
        e.replace("2", shared)
    assert (other := replayed(e.report))[1] is other[2]
    shared = nn.ReLU()
    other = replayed(wrap(net(), nn.Linear, lambda old: nn.Sequential(shared, old)))
    assert other[0].layer[0] is other[1][0] is other[2][0]


def test_a_module_of_the_model_in_another_place_is_that_module():
    model = net()
    assert (other := replayed(replace(model, "2", lambda old: model[1])))[2] is other[1]
    model = net()
    assert (other := replayed(add(model, "3", nn.Sequential(nn.ReLU(), model[1]))))[3][1] is other[1]


def test_a_weight_of_the_model_is_that_weight():
    def tied(old):
        new = nn.Linear(3, 3)
        new.weight = old.weight
        return new

    other = replayed(replace(net(), "1", tied))
    assert torch.equal(other[1].weight, net()[1].weight)
    model = net()
    head = nn.Linear(3, 3)
    head.weight = model[1].weight
    report = replace(model, "2", head)
    assert (other := replayed(report))[2].weight is other[1].weight
    smaller = net()
    smaller[1] = nn.Linear(2, 2)
    with pytest.raises(RecipeError, match=r"1.weight is \(2, 2\) here and was \(3, 3\) where the recipe was recorded"):
        replay(smaller, report.recipe)


def test_new_modules_of_one_verb_that_share_a_weight():
    weight = nn.Parameter(torch.ones(3, 3))

    def tied(old):
        new = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
        new[0].weight = weight
        return new

    other = replayed(replace(net(), "re:1|2", tied))
    assert other[1][0].weight is other[2][0].weight
    other = replayed(replace(net(), "re:1|2", lambda old: tied(old)[0]))
    assert other[1].weight is other[2].weight
    assert other[1].bias is not other[2].bias


def test_the_new_module_is_whole_again():
    old = nn.Linear(2, 2)
    new = nn.Sequential(nn.ReLU(), old, nn.Sequential(old))
    loan = loans(new, {id(old): "fc"}, {})
    assert loan == {"modules": {"1": "fc", "2.0": "fc"}}
    with pytest.raises(ZeroDivisionError, match="division"), taken_out(new, loan):
        assert isinstance(new[1], nn.Identity)
        _ = 1 / 0
    assert new[1] is new[2][0] is old
    give_back(new, loan, {"fc": (other := nn.Linear(2, 2))}.__getitem__)
    assert new[1] is new[2][0] is other


@pytest.mark.parametrize(
    "loan",
    [
        {"modules": {"forward": "1"}},
        {"modules": {"": "1"}},
        {"modules": {"0": "9"}},
        {"modules": 3},
        {"parameters": {"x": "1.weight"}},
        {"parameters": {"weight": "1.nothing"}},
        {"new": None},
    ],
)
def test_loans_that_do_not_hold_together(loan):
    data = json.loads(replace(net(), "1", nn.Linear(3, 3)).recipe.to_json())
    data["edits"][0]["sites"][0] |= loan
    model = net()
    with pytest.raises(RecipeError, match="an edit that is not whole"):
        replay(model, Recipe.from_json(json.dumps(data)))
    assert str(model) == str(net())


def ties(model):
    """Every path and name, and which of them are one object."""
    numbers = {}
    objects = (*model.named_modules(remove_duplicate=False), *model.named_parameters(remove_duplicate=False))
    return [
        (path, numbers.setdefault(id(each), len(numbers)), getattr(each, "shape", type(each))) for path, each in objects
    ]


def tying(old, weight):
    new = nn.Linear(2, 2)
    new.weight = weight
    return new


leaves = st.sampled_from([nn.ReLU, nn.Tanh, lambda: nn.Linear(2, 2)]).map(lambda make: make())
trees = st.recursive(
    leaves, lambda inner: st.lists(inner, min_size=1, max_size=4).map(lambda cs: nn.Sequential(*cs)), max_leaves=8
)


@settings(max_examples=80, deadline=None)
@given(tree=trees, data=st.data())
@pytest.mark.filterwarnings("ignore::modsurg.errors.ModsurgWarning")
def test_random_edits_are_replayed_with_their_ties(tree, data):
    model = nn.Sequential(tree, nn.Linear(2, 2))
    model.append(data.draw(st.sampled_from(list(tree.modules()))))
    other, weight, shared = copy.deepcopy(model), model[1].weight, nn.Linear(2, 2)
    before = ties(model)
    with edit(model) as e:
        for _ in range(data.draw(st.integers(1, 4))):
            paths = [path for path, _ in model.named_modules(remove_duplicate=False) if path]
            path = data.draw(st.sampled_from(paths))
            place = data.draw(st.sampled_from([path, lambda path, module: path and not module._modules]))
            verb = data.draw(st.sampled_from(["share", "wrap", "beside", "tie", "move", "insert"]))
            if verb == "share":
                e.replace(place, lambda old: shared)
            elif verb == "wrap":
                e.wrap(place, nn.Sequential)
            elif verb == "beside":
                e.wrap(place, lambda old: nn.Sequential(shared, old))
            elif verb == "tie":
                e.replace(place, lambda old: tying(old, weight))
            elif verb == "move":
                leaf = data.draw(st.sampled_from([m for m in model.modules() if not m._modules]))
                e.replace(path, lambda old, leaf=leaf: leaf)
            else:
                e.insert_after(place, lambda old: nn.Identity())
    report = replay(other, Recipe.from_json(e.report.recipe.to_json()))
    assert ties(other) == ties(model)
    report.undo()
    e.report.undo()
    assert ties(other) == ties(model) == before


def test_a_new_module_that_holds_itself_and_one_shared_at_many_levels():
    new = nn.Sequential(nn.Sequential())
    new[0].up = new
    report = replace(net(), "1", new)
    with pytest.raises(RecipeError, match="can't be recorded"):
        _ = report.recipe
    inner = nn.Sequential(old := nn.Linear(2, 2))
    for _ in range(60):
        inner = nn.Sequential(inner, inner)
    loan = loans(inner, {id(old): "fc"}, {})
    assert len(loan["modules"]) == 1
    give_back(inner, loan, {"fc": nn.Identity()}.__getitem__)
    assert old not in list(inner.modules())
