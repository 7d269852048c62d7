"""The version of a module's state comes along, so that nothing is migrated twice."""

import pytest
import torch
from torch import nn

from modsurg import convert, load_state, read_state, save_state
from modsurg.checkpoints.formats.derived import rename_versions


class Doubled(nn.Module):
    """Up to version 1 its weight was stored as half of what it is."""

    _version = 2

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        if local_metadata.get("version", 1) < 2 and prefix + "weight" in state_dict:
            state_dict[prefix + "weight"] = state_dict[prefix + "weight"] * 2
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def net():
    return nn.ModuleDict({"body": nn.Sequential(Doubled(), nn.Linear(2, 2)), "head": Doubled()})


def renamed(model):
    """A state as a wrapper gives it, with its versions."""
    return nn.ModuleDict({"module": model}).state_dict()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_through_a_wrapper_rename_and_only(suffix, tmp_path):
    path = save_state(renamed(net()), tmp_path / f"a{suffix}")
    model = net()
    load_state(model, path)
    assert model["head"].weight.tolist() == [1, 1]
    load_state(model, path, only="head")
    assert model["head"].weight.tolist() == [1, 1]
    other = nn.ModuleDict({"tail": Doubled()})
    load_state(other, path, rename={"head": "tail"}, only="tail")
    assert other["tail"].weight.tolist() == [1, 1]


@pytest.mark.parametrize("target", ["b.safetensors", "b.pt", "b.safetensors.index.json", "folder"])
def test_through_convert(target, tmp_path):
    path = save_state(net(), tmp_path / "a.pt")
    convert(path, tmp_path / target, rename={"body.0": "first", "head": "last.one"}, only=["body.0", "head"])
    model = nn.ModuleDict({"first": Doubled(), "last": nn.ModuleDict({"one": Doubled()})})
    load_state(model, tmp_path / target)
    assert model["first"].weight.tolist() == model["last"]["one"].weight.tolist() == [1, 1]


def test_through_a_state_that_is_saved_again(tmp_path):
    path = save_state(net(), tmp_path / "a.pt")
    again = save_state(read_state(path, "head"), tmp_path / "b.safetensors")
    model = nn.ModuleDict({"head": Doubled()})
    load_state(model, again)
    assert model["head"].weight.tolist() == [1, 1]


def test_an_old_state_is_migrated_once(tmp_path):
    state = {"module.head.weight": torch.ones(2)}
    model = nn.ModuleDict({"head": Doubled()})
    load_state(model, state)
    assert model["head"].weight.tolist() == [2, 2]


def test_renamed_paths():
    names = {"a.n.weight": "n.gamma", "b.x.y.w": "x.y.w", "z.w": "q.y.w"}
    assert rename_versions({"n": 2, "x": 3, "q": 4, "gone": 5}, names) == {"a.n": 2, "b.x": 3}
    assert rename_versions({"": 2}, {"net.w": "w"}) == {"net": 2}
    assert rename_versions({"net": 2}, {"w": "net.w"}) == {"": 2}
