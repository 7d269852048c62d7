import json

import pytest
import torch
from torch import nn

from modsurg import Recipe, add, edit, freeze, insert_after, remove, rename, replace, replay, resize, wrap
from modsurg.errors import ModsurgWarning, RecipeError, TrustError


def net():
    torch.manual_seed(0)
    shared = nn.Linear(4, 4)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), shared, nn.Sequential(shared, nn.ReLU()), nn.Linear(4, 2))


class Lora(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Linear(4, 1, bias=False)

    def forward(self, x):
        return self.base(x)


EDITS = {
    "replace": lambda m: replace(m, nn.ReLU, nn.GELU),
    "replace by function": lambda m: replace(m, "-1", lambda old: nn.Sequential(nn.Dropout(0.3), nn.Linear(4, 7))),
    "insert": lambda m: insert_after(m, nn.Linear, lambda old: nn.BatchNorm1d(old.out_features)),
    "remove": lambda m: remove(m, "1"),
    "rename": lambda m: rename(m, "-1", "head"),
    "resize": lambda m: resize(m, "4", out_features=9),
    "freeze": lambda m: freeze(m, "0"),
    "add": lambda m: add(m, "5", nn.Softmax(dim=1)),
    "wrap": lambda m: wrap(m, nn.Linear, lambda old: nn.Sequential(old, nn.Tanh())),
    "untie": lambda m: replace(m, "3.0", lambda old: nn.Linear(4, 4), untie=True),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_recipe_gives_the_same_tree_names_and_shapes(name):
    model, other = net(), net()
    text = EDITS[name](model).recipe.to_json()
    json.loads(text)
    report = replay(other, Recipe.from_json(text))
    assert str(other) == str(model)
    shapes = [(key, tensor.shape) for key, tensor in model.state_dict().items()]
    assert [(key, tensor.shape) for key, tensor in other.state_dict().items()] == shapes
    assert [p.requires_grad for p in other.parameters()] == [p.requires_grad for p in model.parameters()]
    assert [m.training for m in other.modules()] == [m.training for m in model.modules()]
    assert all(torch.isfinite(p).all() for p in other.parameters())
    assert len({id(m) for m in other.modules()}) == len({id(m) for m in model.modules()})
    report.undo()
    assert str(other) == str(net())


def test_several_verbs_that_meet_each_others_modules():
    model, other = net(), net()
    with edit(model) as e:
        e.replace("4", lambda old: nn.Sequential(nn.Linear(4, 3), nn.ReLU()))
        e.resize("4.0", out_features=5)
        e.insert_after("4.0", nn.LayerNorm(5))
        e.rename("4", "head")
    replay(other, e.report.recipe)
    assert str(other) == str(model)


def test_a_class_of_ones_own_is_trusted_by_name():
    model, other = net(), net()
    recipe = wrap(model, nn.Linear, Lora).recipe
    with pytest.raises(TrustError, match=r"Lora\nIf you trust them: replay\(model, recipe, trust="):
        replay(other, recipe)
    assert str(other) == str(net())
    replay(other, recipe, trust=(Lora,))
    assert str(other) == str(model)
    assert other[2] is other[3][0]
    assert isinstance(other[0].base, nn.Linear)
    x = torch.ones(2, 4)
    assert torch.equal(other[0](x), net()[0](x))


def test_what_no_class_initialises_is_told():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))

    globals()["Bare"] = Bare
    Bare.__qualname__ = "Bare"
    recipe = replace(net(), "1", Bare()).recipe
    report = replay(net(), recipe, trust=(Bare,))
    assert "zeros until weights are loaded" in str(report)


def test_another_model_is_refused():
    recipe = replace(net(), "1", nn.GELU()).recipe
    other = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    with pytest.raises(RecipeError, match='"1" is a Tanh here and was a ReLU where the recipe was recorded'):
        replay(other, recipe)
    assert isinstance(other[1], nn.Tanh)
    with pytest.raises(RecipeError, match='met a module that is not here: nothing at "1" in Sequential'):
        replay(nn.Sequential(nn.ReLU()), recipe)


def test_a_module_that_can_not_be_described_is_told_when_asked():
    model = net()
    report = replace(model, "1", lambda old: Calling(lambda x: x))
    with pytest.raises(RecipeError, match="this edit can't be recorded: "):
        _ = report.recipe


class Calling(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "this is not a recipe: "),
        ("[]", "not a recipe of version 2"),
        (
            '{"version": 1, "edits": [], "modules": []}',
            'not a recipe of version 2: its "version" is 1. Make the edit again',
        ),
        ('{"version": 7}', "not a recipe of version 2"),
        ('{"version": 2, "edits": 3, "modules": []}', 'its "edits" must be a list of objects'),
        ("[" * 100_000, "this is not a recipe"),
    ],
)
def test_texts_that_are_no_recipes(text, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.from_json(text)


def test_a_text_is_read_before_it_is_replayed():
    with pytest.raises(RecipeError, match=r"is a str, not a Recipe; .* Recipe\.from_json\(text\)"):
        replay(net(), Recipe().to_json())


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ([{"verb": "explode"}], 'the verb "explode", which this version of modsurg does not know'),
        ([{"verb": "rename"}], "an edit that is not whole"),
        ([{"verb": "freeze", "paths": "1"}], "an edit that is not whole"),
        ([{"verb": "add", "path": "x", "new": 4, "before": None, "after": None}], "names module 4 and has 0"),
    ],
)
def test_recipes_that_do_not_hold_together(edits, message):
    model = net()
    with pytest.raises(RecipeError, match=message):
        replay(model, Recipe(edits))
    assert str(model) == str(net())


def test_pickles_and_calls_have_no_way_in():
    model = net()
    recipe = replace(model, "1", nn.GELU()).recipe
    hostile = json.loads(recipe.to_json().replace("torch.nn.modules.activation:GELU", "os:system"))
    with pytest.raises((TrustError, RecipeError), match="os"):
        replay(net(), Recipe.from_json(json.dumps(hostile)))


def test_an_untied_match_inside_another_is_replayed():
    def shared():
        block = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        return nn.ModuleDict({"a": block, "b": block})

    model, other = shared(), shared()
    made = {nn.Sequential: lambda: nn.Sequential(nn.Tanh()), nn.Linear: lambda: nn.Linear(2, 2, bias=False)}
    recipe = replace(model, "re:a|..0", lambda old: made[type(old)](), untie=True).recipe
    replay(other, recipe)
    assert str(other) == str(model)
    assert (type(other["a"][0]), other["b"][0].bias) == (nn.Tanh, None)


def test_a_block_and_what_it_shares_wrapped_at_once_are_replayed():
    def make():
        shared = nn.Sequential(nn.Linear(4, 4))
        return nn.Sequential(nn.Sequential(shared, nn.ReLU()), shared)

    model, other = make(), make()
    recipe = wrap(model, "re:0|1.0", lambda old: nn.Sequential(old, nn.Tanh())).recipe
    replay(other, Recipe.from_json(recipe.to_json()))
    assert str(other) == str(model)
    assert other[1] is other[0][0][0]


def tied():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    return model


def test_a_tie_that_breaks_is_told_again():
    with pytest.warns(ModsurgWarning, match="was tied"):
        recipe = replace(tied(), "head", nn.Linear(3, 5)).recipe
    with pytest.warns(ModsurgWarning, match="was tied"):
        replay(tied(), recipe)


@pytest.mark.parametrize("change", [{"shape": [3]}, {"parameter": False}])
def test_a_module_that_its_class_can_not_initialise(change):
    recipe = json.loads(replace(net(), "1", nn.Linear(4, 4)).recipe.to_json())
    recipe["modules"][0]["tensors"][0].update(change)
    model = net()
    with pytest.raises(RecipeError, match="module 0 of the recipe, a Linear, can't be initialised: "):
        replay(model, Recipe.from_json(json.dumps(recipe)))
    assert str(model) == str(net())


def test_a_recipe_on_a_deeper_model_says_what_it_does_not_reach():
    def make(depth):
        return nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(depth)])

    recipe = replace(make(2), nn.ReLU, nn.GELU).recipe
    deeper = make(4)
    with pytest.warns(
        ModsurgWarning, match=r"changed every ReLU of its model; 2 modules of that class here are not in"
    ):
        report = replay(deeper, recipe)
    assert "! the recipe changed every ReLU" in str(report)
    assert isinstance(deeper[1][1], nn.GELU)
    assert isinstance(deeper[3][1], nn.ReLU)
    assert "every" not in str(replay(make(4), replace(make(2), "0.1", nn.GELU).recipe))


def test_a_recipe_is_read_from_a_file(tmp_path):
    recipe = replace(nn.Sequential(nn.ReLU()), "0", nn.GELU).recipe
    path = tmp_path / "edit.json"
    path.write_text(recipe.to_json())
    for given in (path, str(path), recipe.to_json()):
        assert Recipe.from_json(given).edits == recipe.edits
    with pytest.raises(FileNotFoundError, match="gone"):
        Recipe.from_json(tmp_path / "gone.json")
    with pytest.raises(RecipeError, match="this is not a recipe"):
        Recipe.from_json("gone.json")
