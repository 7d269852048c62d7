"""The rename that a failed load suggests is the one that mends it."""

import json

import pytest
from loads import net, refused
from torch import nn

from modsurg import load_state


def test_the_text_of_a_missing_and_an_unexpected_key():
    state = net().state_dict()
    state["2.weigth"] = state.pop("2.weight")
    text = refused(net(), state, "do not fit")
    assert text == (
        "2 of 10 keys do not fit; nothing was loaded.\n"
        "  2.weight  not in the file\n"
        "  2.weigth  not in the model\n"
        'They fit with load_state(..., rename={"2.weigth": "2.weight"})'
    )


def test_the_nearest_key_where_no_rename_helps():
    state = net().state_dict()
    state["2.weigth"] = state.pop("2.weight")[:1]
    refused(net(), state, r'2\.weight  not in the file; nearest: "2\.weigth"')
    del state["2.weigth"]
    refused(
        net(), state, r"1 of 9 keys does not fit.*\n  2\.weight  not in the file\nload_state\(\.\.\., strict=False\)"
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
    text = refused(net(), state, "They fit with")
    suggested = json.loads(text.rpartition("rename=")[2].removesuffix(")"))
    assert suggested == fix
    assert load_state(net(), state, rename=suggested)


def test_a_prefix_that_the_file_lacks_is_suggested():
    model = nn.ModuleDict({"backbone": net()})
    text = refused(model, net().state_dict(), "They fit with")
    assert text.endswith('rename={"": "backbone."})')
    assert load_state(model, net().state_dict(), rename={"": "backbone."})
