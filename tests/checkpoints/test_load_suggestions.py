"""The rename that a failed load suggests is the one that mends it."""

import json

import pytest
import torch
from loads import net, refused
from torch import nn

from modsurg import load_state
from modsurg.checkpoints.load.key_mapping import renamer
from modsurg.checkpoints.load.suggestions import suggest_rules
from modsurg.errors import LoadError


def test_the_text_of_a_missing_and_an_unexpected_key():
    state = net().state_dict()
    state["2.weigth"] = state.pop("2.weight")
    text = refused(net(), state, "does not match")
    assert text == (
        "1 of 9 keys does not match, and 1 key of the file is not in the model; nothing was loaded.\n"
        "  2.weight  not in the file\n"
        "  2.weigth  not in the model\n"
        'They match with load_state(..., rename={"2.weigth": "2.weight"})'
    )


def test_the_nearest_key_where_no_rename_helps():
    state = net().state_dict()
    state["2.weigth"] = state.pop("2.weight")[:1]
    refused(net(), state, r'2\.weight  not in the file; nearest: "2\.weigth"')
    del state["2.weigth"]
    refused(
        net(),
        state,
        r"1 of 9 keys does not match.*\n  2\.weight  not in the file\nTry: load_state\(\.\.\., strict=False\)",
    )


@pytest.mark.parametrize(
    "change, fix",
    [
        (lambda key: f"backbone.{key}", {"backbone.": ""}),
        (lambda key: f"model.net.{key}", {"model.net.": ""}),
        (lambda key: key.replace("0.", "stem.", 1) if key.startswith("0.") else key, {"stem": "0"}),
        (lambda key: {"0": "a", "1": "b", "2": "c"}[key[0]] + key[1:], {"b": "1", "a": "0", "c": "2"}),
        (lambda key: f"module.backbone.{key}", {"module.backbone.": ""}),
    ],
)
def test_the_suggested_rename_is_right(change, fix):
    state = {change(key): value for key, value in net().state_dict().items()}
    text = refused(net(), state, "They match with")
    suggested = json.loads(text.rpartition("rename=")[2].removesuffix(")"))
    assert suggested == fix
    assert load_state(net(), state, rename=suggested)


def test_a_prefix_that_the_file_lacks_is_suggested():
    model = nn.ModuleDict({"backbone": net()})
    text = refused(model, net().state_dict(), "They match with")
    assert text.endswith('rename={"": "backbone."})')
    assert load_state(model, net().state_dict(), rename={"": "backbone."})


class Block(nn.Module):
    def __init__(self, names):
        super().__init__()
        for number, name in enumerate(names):
            self.add_module(name, nn.Linear(4, 4) if number < 3 else nn.LayerNorm(4))


def tower(layers, *names, depth=12):
    """Blocks of the same three square layers and a norm, under these names."""
    return nn.ModuleDict({layers: nn.ModuleList([Block(names) for _ in range(depth)]), "head": nn.Linear(4, 2)})


@pytest.mark.parametrize(
    ("old", "new", "rules"),
    [
        (("layer", "query", "key", "value", "norm"), ("blocks", "q", "k", "v", "ln"), 4),
        (("blocks", "attention", "a", "b", "c"), ("blocks", "attn", "a", "b", "c"), 1),
        (("encoder", "q", "k", "v", "n"), ("h", "q", "k", "v", "n"), 1),
        (("encoder", "q", "k", "v", "norm"), ("encoder", "k", "v", "q", "n"), 1),
        (("layer", "one", "two", "three", "norm"), ("h", "x1", "x2", "x3", "y"), 4),
    ],
)
def test_one_rule_says_it_for_all_layers(old, new, rules):
    source, model = tower(*old), tower(*new)
    text = refused(model, source.state_dict(), "They match with")
    suggested = json.loads(text.rpartition("rename=")[2].removesuffix(")"))
    assert len(suggested) == rules
    assert load_state(model, source.state_dict(), rename=suggested)
    for one, other in zip(old[1:], new[1:], strict=True) if rules == 4 else ():
        assert source[old[0]][7]._modules[one].weight.equal(model[new[0]][7]._modules[other].weight)


def test_numbers_that_are_part_of_a_name():
    state = {f"layer_{n}.attn{i}.w": torch.ones(2) for n in range(12) for i in (1, 2)}
    names = {key.replace("layer_", "blocks.").replace("attn", "attention"): value for key, value in state.items()}
    rules = suggest_rules(dict.fromkeys(state, (2,)), dict.fromkeys(names, (2,)))
    assert rules == {r"re:layer_(\d+)\.attn(\d+)\.(.*)": r"blocks.\1.attention\2.\3"}


@pytest.mark.parametrize("names", [("q_proj", "k_proj", "v_proj"), ("k_proj", "v_proj", "q_proj")])
def test_layers_of_one_shape_in_another_order(names):
    source, model = tower("blocks", "query", "key", "value", "norm"), tower("h", *names, "norm")
    text = refused(model, source.state_dict(), "They match with")
    load_state(model, source.state_dict(), rename=json.loads(text.rpartition("rename=")[2].removesuffix(")")))
    for name, other in zip(("query", "key", "value"), ("q_proj", "k_proj", "v_proj"), strict=True):
        assert source["blocks"][7]._modules[name].weight.equal(model["h"][7]._modules[other].weight)


def test_norms_of_one_shape_keep_their_order():
    old = [f"layer.{n}.{name}.weight" for n in range(3) for name in ("attention.output.norm", "output.norm")]
    new = [f"blocks.{n}.{name}.weight" for n in range(3) for name in ("ln1", "ln2")]
    rules = suggest_rules(dict.fromkeys(old, (4,)), dict.fromkeys(new, (4,)))
    assert [renamer(rules, old)(key) for key in old] == new


def test_the_last_segment_is_renamed_in_every_layer():
    model = tower("blocks", "q", "k", "v", "norm")
    names = {"norm.weight": "norm.gamma", "norm.bias": "norm.beta"}
    state = {
        key if "norm" not in key else ".".join([*key.split(".")[:2], names[key.split(".", 2)[2]]]): value
        for key, value in tower("blocks", "q", "k", "v", "norm").state_dict().items()
    }
    text = refused(model, state, "They match with")
    suggested = json.loads(text.rpartition("rename=")[2].removesuffix(")"))
    assert suggested == {r"re:(.*)\.beta": r"\1.bias", r"re:(.*)\.gamma": r"\1.weight"}
    assert load_state(model, state, rename=suggested)


def test_a_suggestion_keeps_the_rules_that_were_given():
    model = nn.ModuleDict({"body": net(), "head": nn.Linear(3, 1)})
    state = {key.replace("body", "old").replace("head", "fc"): value for key, value in model.state_dict().items()}
    with pytest.raises(
        LoadError, match=r'They match with load_state\(\.\.\., rename=\{"old": "body", "fc": "head"\}\)'
    ):
        load_state(model, state, rename={"old": "body"})
    with pytest.raises(LoadError) as caught:
        load_state(model, state, rename=lambda key: key.replace("old", "body"))
    assert "rename=" not in str(caught.value)


def test_a_key_whose_last_segment_means_something_else_is_not_suggested():
    state = net().state_dict()
    state["2.scale"] = state.pop("2.bias")
    assert "rename=" not in refused(net(), state, "does not match")
