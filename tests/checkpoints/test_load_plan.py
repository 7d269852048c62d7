"""What `load_state` can be told: options, and what they refuse."""

import ast
import copy
import re

import pytest
import torch
from loads import net, refused
from torch import nn

from modsurg import insert_after, load_state, save_state
from modsurg.errors import LoadError, ModsurgWarning, PatternError


def tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    return model


def test_strict_off_reports():
    state = net().state_dict()
    del state["0.bias"]
    state["more"] = torch.ones(1)
    report = load_state(net(), state, strict=False)
    assert not report
    assert report.missing == ["0.bias"]
    assert report.unexpected == ["more"]
    assert str(report) == (
        "loaded 8 of 9 keys\n"
        "  missing  0.bias  not in the file; the model's value is kept\n"
        "  unexpected  more  not in the model"
    )


@pytest.mark.parametrize("model", [net(), tied()], ids=["plain", "tied"])
def test_the_error_and_the_report_count_the_same_keys(model):
    state = model.state_dict()
    del state["2.weight"], state["0.bias"]
    state["more"] = torch.ones(1)
    report = load_state(model, state, strict=False)
    lost, all_of_them = len(report.missing), len(report.missing) + len(report.loaded)
    assert str(report).startswith(f"loaded {all_of_them - lost} of {all_of_them} keys\n")
    refused(
        model, state, f"^{lost} of {all_of_them} keys do(es)? not match, and 1 key of the file is not in the model; no"
    )


def test_a_file_with_a_part_of_the_model():
    model = net()
    state = {key: value for key, value in net().state_dict().items() if not key.startswith("2.")}
    text = refused(model, state, "2 of 9 keys do not match; nothing was loaded")
    assert text.endswith('report the rest, or load_state(..., only=["0", "1"])')
    assert load_state(model, state, only=["0", "1"])
    del state["0.bias"]
    assert "only=" not in refused(net(), state, "3 of 9 keys do not match")
    state = {key: value for key, value in state.items() if key.startswith("1.")}
    assert 'only="1")' in refused(net(), state, "4 of 9 keys do not match")


def test_a_state_from_before_an_edit():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    old = {key: value.clone() for key, value in model.state_dict().items()}
    report = insert_after(model, "0", nn.ReLU())
    refused(model, old, r"\nMade before an edit\? load_state\(model, report\.remap\(state\)\), with the report of")
    assert load_state(model, report.remap(old))
    assert "Made before" not in refused(net(), {f"a.{key}": value for key, value in net().state_dict().items()}, "a.")


def test_strict_off_tells_what_would_fit():
    state = {f"backbone.{key}": value for key, value in net().state_dict().items()}
    with pytest.warns(ModsurgWarning, match=r'no keys matched(.*\n)*They match with .*rename=\{"backbone\.": ""\}'):
        report = load_state(net(), state, strict=False)
    assert report.advice == 'They match with load_state(..., rename={"backbone.": ""})'
    assert not report.loaded


def test_strict_off_still_refuses_a_wrong_shape():
    state = net().state_dict() | {"2.bias": torch.ones(5)}
    refused(net(), state, r"1 of 9 keys does not match.*\n  2\.bias  file \(5,\), model \(2,\)", strict=False)


def test_skip():
    model = net()
    own = model[2].bias.clone()
    report = load_state(model, net().state_dict() | {"2.bias": torch.ones(5)}, on_mismatch="skip")
    assert dict(report.skipped) == {"2.bias": "file (5,), model (2,)"}
    assert torch.equal(model[2].bias, own)


@pytest.mark.parametrize("theirs, mine", [((5, 3), (2, 4)), ((2, 2), (3, 3)), ((4,), (2,)), ((2, 3, 1), (2, 3, 4))])
def test_slice(theirs, mine, tmp_path):
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(mine))
    values = torch.randn(theirs)
    for state in ({"weight": values}, save_state({"weight": values}, tmp_path / "a.safetensors")):
        report = load_state(model, state, on_mismatch="slice")
        common = tuple(slice(0, min(sizes)) for sizes in zip(theirs, mine, strict=True))
        assert torch.equal(model.weight[common], values[common])
        assert model.weight.count_nonzero() == values[common].numel()
        assert dict(report.sliced) == {"weight": f"file {theirs}, model {mine}"}


def test_slice_needs_as_many_dimensions():
    refused(nn.Linear(2, 2), {"weight": torch.ones(4), "bias": torch.ones(2)}, "weight  file", on_mismatch="slice")


def test_slice_does_not_leave_meta_half_filled():
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(LoadError, match=r"weight  file \(1, 2\), model \(2, 2\)"):
        load_state(model, nn.Linear(2, 1).state_dict(), on_mismatch="slice")
    assert model.weight.is_meta


@pytest.mark.parametrize("only", ["0", "0.*", ["0.weight", "0.bias"], "re:0\\..*", lambda key: key[0] == "0"])
def test_only(only):
    model, other = net(), net()
    before = model[2].weight.clone()
    report = load_state(model, other.state_dict() | {"9.more": torch.ones(1)}, only=only)
    assert report
    assert list(report.loaded) == ["0.weight", "0.bias"]
    assert torch.equal(model[0].weight, other[0].weight)
    assert torch.equal(model[2].weight, before)


def test_only_is_strict_about_what_it_chose():
    refused(net(), {"2.weight": torch.ones(2, 4)}, r"0\.weight  not in the file", only="0")


def test_a_sparse_place():
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.eye(2).to_sparse())
    state = {**nn.Linear(2, 2).state_dict(), "mask": torch.eye(2)}
    before = model.weight.clone()
    with pytest.raises(LoadError, match=r"mask  file a dense tensor, model a sparse one \(sparse_coo\)"):
        load_state(model, state)
    assert torch.equal(model.weight, before)
    assert load_state(model, state, on_mismatch="skip").skipped.keys() == {"mask"}


def test_arguments_that_fit_nothing():
    refused(net(), net().state_dict(), r"only='encoder' matches no key of the model", only="encoder")
    refused(net(), net().state_dict(), r"rename: 'fc' matches no key.*The keys are like 0\.weight", rename={"fc": "a"})
    refused(net(), net().state_dict(), r"on_mismatch='crop' must be", on_mismatch="crop")
    refused(net(), net().state_dict(), r"rename: 're:\(': 'a' does not parse", PatternError, rename={"re:(": "a"})
    refused(
        net(), net().state_dict(), r"'0\.weight' the name 3, which is not a string.*None leaves", rename=lambda key: 3
    )
    for wrong in ([("0", "1")], {"0": 3}, {3: "0"}, "0"):
        refused(net(), net().state_dict(), r'must be a dict such as {"old": "new", .*or a function', rename=wrong)
    for wrong in (3, [3], b"0", nn.Linear, net()[0], net()):
        refused(net(), net().state_dict(), "chooses no keys: give a name, a glob or 're:...'", only=wrong)
    for new in (r"\2", r"\g<layer>"):
        refused(net(), net().state_dict(), "does not parse: .*group", PatternError, rename={"re:(.*)": new})


def test_rename():
    model, other = net(), net()
    state = {f"old.{key}": value for key, value in other.state_dict().items()} | {"junk.a": torch.ones(1)}
    for rename in (
        {"old": "", "junk": None},
        {"old.": "", "junk.": None},
        {r"re:old\.(.*)": r"\1", r"re:junk\..*": None},
        lambda key: None if key.startswith("junk") else key.removeprefix("old."),
    ):
        assert load_state(copy.deepcopy(model), state, rename=rename)


def test_two_keys_for_one_name():
    state = net().state_dict()
    refused(
        net(),
        state,
        r"'0\.weight' and '1\.weight' both become 'x'",
        rename=lambda key: "x" if "weight" in key else key,
    )
    refused(
        net(),
        state | {"module.0.weight": torch.ones(4, 3)},
        r"'0\.weight' and 'module\.0\.weight' both mean '0\.weight'.*rename={'module\.0\.weight': None}",
    )


@pytest.mark.parametrize(
    "file, model, fits",
    [
        (torch.complex64, torch.float32, False),
        (torch.float32, torch.int64, False),
        (torch.int64, torch.bool, False),
        (torch.float32, torch.bool, False),
        (torch.float32, torch.float16, True),
        (torch.float64, torch.bfloat16, True),
        (torch.float32, torch.float8_e4m3fn, True),
        (torch.int64, torch.float32, True),
        (torch.bool, torch.uint8, True),
        (torch.int32, torch.int64, True),
        (torch.float32, torch.complex64, True),
    ],
)
def test_dtypes(file, model, fits):
    place = nn.Module()
    place.register_buffer("x", torch.zeros(3).to(model))
    state = {"x": torch.ones(3).to(file)}
    if fits:
        assert load_state(place, state)
        assert torch.equal(place.x, torch.ones(3).to(model)) or model is torch.float8_e4m3fn
    else:
        names = [str(each).removeprefix("torch.") for each in (file, model)]
        refused(place, state, f"x  file {names[0]}, model {names[1]}, which loses values")
        report = load_state(place, state, on_mismatch="skip")
        assert list(report.skipped) == ["x"]


@pytest.mark.parametrize(
    "file, model, bad",
    [
        (torch.int64, torch.int32, 2**40),
        (torch.int64, torch.uint8, -1),
        (torch.int64, torch.uint64, -1),
        (torch.uint64, torch.int64, 2**63),
        (torch.uint8, torch.int8, 200),
    ],
)
def test_whole_numbers_that_do_not_fit(file, model, bad):
    place = nn.Module()
    place.register_buffer("x", torch.zeros(2, dtype=model))
    assert load_state(place, {"x": torch.tensor([1, 100], dtype=file)})
    assert place.x.tolist() == [1, 100]
    names = [str(each).removeprefix("torch.") for each in (file, model)]
    refused(
        place, {"x": torch.tensor([1, bad], dtype=file)}, f"x  file {names[0]}, model {names[1]}, which loses values"
    )


def test_a_suggestion_can_be_pasted_also_with_a_rule_that_leaves_keys_out():
    state = {"head.weight": torch.ones(2, 2), **{f"backbone.{key}": value for key, value in net().state_dict().items()}}
    text = refused(net(), state, "They match with load_state", rename={"head": None})
    rules = re.search(r"rename=(\{.*\})", text)[1]
    assert ast.literal_eval(rules) == {"head": None, "backbone.": ""}


def test_one_file_of_several_names_the_index(tmp_path):
    index = save_state(net(), tmp_path / "a.safetensors", shard_size=64)
    part = sorted(tmp_path.glob("a-*"))[0]
    refused(net(), part, rf"a-00001-of-\d+\.safetensors is one of several files: load_state\(model, \"{index}\"\)$")
    assert "is one of several files" in str(load_state(net(), part, strict=False))
    index.unlink()
    assert "several files" not in refused(net(), part, "not in the file")
