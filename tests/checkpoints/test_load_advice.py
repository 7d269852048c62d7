"""The line that a failed load recommends does what it says."""

import re

import pytest
import torch
from loads import net, refused
from torch import nn

from modsurg import load_state
from modsurg.errors import ModsurgWarning


def follow(model, state, text, **options):
    """Run the `load_state(...)` that a message recommends."""
    found = re.search(r"load_state\(\.\.\., (.*?)\)(?: to |$|;|, or| leaves)", text, re.MULTILINE)
    return eval(f"load_state(model, state, **{options!r}, {found[1]})", {"load_state": load_state, **locals()})


def wide():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 5))


def test_another_shape():
    state = wide().state_dict()
    report = follow(net(), state, refused(net(), state, 'Try: load_state.*on_mismatch="skip"'))
    assert list(report.skipped) == ["2.weight", "2.bias"]


def test_another_shape_and_a_missing_key():
    state = wide().state_dict()
    del state["0.bias"]
    report = follow(net(), state, refused(net(), state, r'Try: load_state\(\.\.\., strict=False, on_mismatch="skip"\)'))
    assert (report.missing, list(report.skipped)) == (["0.bias"], ["2.weight", "2.bias"])


def test_a_rename_that_leaves_something_missing_does_not_say_that_all_match():
    state = {f"backbone.{key}": value for key, value in net().state_dict().items()}
    assert load_state(net(), state, rename={"backbone.": ""})
    del state["backbone.2.bias"]
    text = refused(net(), state, r'8 of them match with load_state\(.*rename=\{"backbone\.": ""\}, strict=False\)')
    assert "They match" not in text
    assert follow(net(), state, text).missing == ["2.bias"]
    state["backbone.2.bias"] = torch.ones(7)
    text = refused(net(), state, "rename=")
    assert "They match" not in text
    assert list(follow(net(), state, text).skipped) == ["2.bias"]


def test_a_rename_beside_another_shape():
    state = {f"backbone.{key}": value for key, value in wide().state_dict().items()}
    text = refused(net(), state, "of them match with")
    assert "They match" not in text
    assert list(follow(net(), state, text).skipped) == ["2.weight", "2.bias"]


def test_what_cannot_be_skipped_is_not_recommended():
    model = nn.Module()
    model.register_buffer("w", torch.zeros(2, 3))
    model.register_buffer("t", model.w.t())
    state = {"w": torch.ones(2, 3), "t": torch.zeros(3, 2)}
    text = refused(model, state, "shares memory")
    assert "Try:" not in text
    follow(model, state, text)


@pytest.mark.parametrize("name", ["w\x1b[2J", "w\u202e", "w\x85", 'w"\\'])
def test_characters_of_a_file_do_not_reach_the_terminal(name):
    model = nn.Linear(2, 2, bias=False)
    state = {f"{name}.weight": torch.ones(2, 2)}
    text = refused(model, state, "They match with")
    assert text.replace("\n", "").isprintable()
    assert follow(model, state, text)
    with pytest.warns(ModsurgWarning, match="no keys matched"):
        report = load_state(model, state, strict=False)
    assert str(report).replace("\n", "").isprintable()
