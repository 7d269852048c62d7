"""Rules from a file's keys to a model's."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modsurg.checkpoints.load.key_mapping import chooser, pair, renamer, unwrapped
from modsurg.errors import LoadError

KEYS = ["a.b.weight", "a.b.bias", "a.bc.weight", "head"]


@pytest.mark.parametrize(
    "rules, expected",
    [
        ({"a.b": "x"}, ["x.weight", "x.bias", "a.bc.weight", "head"]),
        ({"a.b.": "x."}, ["x.weight", "x.bias", "a.bc.weight", "head"]),
        ({"a": "", "a.b": "y"}, ["y.weight", "y.bias", "bc.weight", "head"]),
        ({"head": "fc.weight"}, ["a.b.weight", "a.b.bias", "a.bc.weight", "fc.weight"]),
        ({"": "m"}, ["m.a.b.weight", "m.a.b.bias", "m.a.bc.weight", "m.head"]),
        ({"head": None}, ["a.b.weight", "a.b.bias", "a.bc.weight", None]),
        ({r"re:a\.(\w+)\.(.*)": r"\1_\2"}, ["b_weight", "b_bias", "bc_weight", "head"]),
        ({r"re:.*bias": None}, ["a.b.weight", None, "a.bc.weight", "head"]),
    ],
)
def test_rules(rules, expected):
    new_name = renamer(rules, KEYS)
    assert [new_name(key) for key in KEYS] == expected


@pytest.mark.parametrize("old", ["a.c", "b", "weight", "re:head.", "a.b.weigh"])
def test_a_rule_that_fits_nothing_is_a_mistake(old):
    with pytest.raises(LoadError, match="matches no key; nothing was loaded"):
        renamer({old: "x"}, KEYS)


@pytest.mark.parametrize("old", ["backbone.c1", "module.backbone.c1", r"re:backbone\.c1"])
def test_what_wrappers_put_in_does_not_count(old):
    keys = ["module.backbone.c1.weight", "module.fc.weight", "module.fc._orig_mod.bias"]
    rules = {old + (r"\.(.*)" if "re:" in old else ""): "stem" + (r".\1" if "re:" in old else ""), "fc.bias": "b"}
    new = renamer(rules, keys)
    bare = "stem.weight" if old.startswith("module") else "module.stem.weight"
    assert [new(key) for key in keys] == [bare, "module.fc.weight", "b"]
    assert renamer({"backbone": None}, keys)(keys[0]) is None


def test_a_rule_that_fits_a_key_as_it_is_looks_no_further():
    new = renamer({"fc": "head"}, ["fc.weight", "module.fc.weight"])
    assert [new("fc.weight"), new("module.fc.weight")] == ["head.weight", "module.fc.weight"]


def test_choosing_by_what_holds_a_key():
    assert list(filter(chooser("a.b"), KEYS)) == ["a.b.weight", "a.b.bias"]
    assert list(filter(chooser("a.b*"), KEYS)) == KEYS[:3]
    assert list(filter(chooser(None), KEYS)) == KEYS


WRAPPERS = st.lists(st.sampled_from(["module", "_orig_mod"]), max_size=3)


@given(st.lists(st.tuples(WRAPPERS, st.sampled_from("abc")), min_size=1, max_size=4), WRAPPERS)
def test_wrappers_go_away_wherever_they_are(parts, end):
    plain = ".".join(name for _, name in parts) + ".weight"
    wrapped = ".".join([*(segment for before, name in parts for segment in (*before, name)), *end, "weight"])
    assert unwrapped(wrapped) == plain
    assert pair([wrapped], [plain]) == {wrapped: plain}
    assert pair([plain], [wrapped]) == {plain: wrapped}


def test_an_ambiguous_name_of_the_model_is_left_alone():
    assert pair(["_orig_mod.w"], ["w", "module.w"]) == {}
    assert pair(["w", "module.w"], ["w", "module.w"]) == {"w": "w", "module.w": "module.w"}
