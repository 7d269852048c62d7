import pytest
import torch
from torch import nn

from modsurg import read_state
from modsurg.checkpoints.formats.torch_save.module import is_module, module_state, module_tree
from modsurg.checkpoints.formats.torch_save.reader import TorchSource
from modsurg.checkpoints.formats.torch_save.unpickler import Made, Name
from modsurg.errors import FormatError
from modsurg.structure.schema import outline, read_tree


def made(name="Net", children=None):
    state = {"_parameters": {}, "_buffers": {}, "_modules": children or {}, "size": (1, 2), "other": [3]}
    return Made(Name("gone", name), (), called=False, state=state)


def test_a_module_is_known_by_its_slots():
    assert is_module(made())
    assert not is_module(Made(Name("a", "b"), (), called=False, state={"_modules": {}}))
    assert not is_module({"_parameters": {}, "_buffers": {}, "_modules": {}})


def test_shared_modules_stay_one():
    shared = made("Shared")
    places = list(
        outline(module_tree(made(children={"a": shared, "b": made(children={"c": shared}), "none": None})).data)
    )
    assert [(place.path, place.kind) for place in places] == [
        ("", "gone.Net"),
        ("a", "gone.Shared"),
        ("b", "gone.Net"),
        ("b.c", "gone.Shared"),
    ]
    assert places[1].number == places[3].number
    assert places[0].attributes == {"size": [1, 2], "other": {"list": [3]}}


def test_modules_that_hold_one_another_end():
    first, second = made(), made()
    first.state["_modules"]["b"] = second
    second.state["_modules"]["a"] = first
    for read in (module_state, module_tree):
        with pytest.raises(FormatError, match="hold one another"):
            read(first)


def test_slots_that_are_none():
    broken = made()
    broken.state["_parameters"] = [1]
    with pytest.raises(FormatError, match=r"the _parameters of a gone\.Net are damaged"):
        module_state(broken)


def test_several_models_in_one_checkpoint(tmp_path):
    first, second = nn.Linear(2, 2), nn.Linear(2, 3)
    torch.save({"generator": first, "critic": second, "step": 3}, tmp_path / "gan.pt")
    state = read_state(tmp_path / "gan.pt")
    assert list(state) == ["generator.weight", "generator.bias", "critic.weight", "critic.bias"]
    assert torch.equal(state["critic.weight"], second.weight)


def test_the_tree_is_in_the_notes(tmp_path):
    torch.save(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), tmp_path / "m.pt")
    with TorchSource(tmp_path / "m.pt") as source:
        tree = read_tree(source.notes.metadata)
    assert [place.name for place in outline(tree)] == ["Sequential", "Linear", "ReLU"]


def test_attributes_under_keys_that_are_no_names():
    odd = made()
    odd.state[(1, 2)] = 3
    assert (1, 2) not in module_tree(odd).data["modules"][0]["attributes"]
