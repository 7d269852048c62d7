"""Models, states and files as one kind of tree."""

import json

import pytest
import torch
from torch import nn

import modsurg
from modsurg import diff
from modsurg.checkpoints.formats.memory import MemorySource
from modsurg.checkpoints.formats.registry import open_source
from modsurg.checkpoints.formats.safetensors.source import write_safetensors
from modsurg.errors import FormatError
from modsurg.structure.build import describe
from modsurg.structure.schema import KEY
from modsurg.views.diff import nodes
from modsurg.views.diff.build import two_sides
from modsurg.views.diff.nodes import StoredLeaf, TensorLeaf


def paths(side) -> list[str]:
    return [node.path for node in side.root.below()]


def test_two_models_keep_classes_and_unsaved_buffers():
    model = nn.Sequential(nn.ReLU(), nn.Module())
    model[1].register_buffer("mask", torch.ones(2), persistent=False)
    model[1].scale = torch.ones(1)
    old, _ = two_sides(model, nn.ReLU())
    assert old.is_model
    assert paths(old) == ["", "0", "1", "1.mask", "1.scale"]
    assert [node.leaf.role for node in old.root.below() if node.leaf] == ["buffer, not saved", "attribute"]


def test_a_model_beside_a_state_is_cut_down_to_one():
    model = nn.Sequential(nn.ReLU(), nn.Linear(1, 1))
    model.register_buffer("mask", torch.ones(2), persistent=False)
    old, new = two_sides(model, model.state_dict())
    assert not old.is_model
    assert paths(old) == paths(new) == ["", "1", "1.weight", "1.bias"]


def test_a_model_that_can_t_be_described_is_a_state_beside_a_file(tmp_path):
    model = nn.Sequential(nn.Linear(1, 1))
    modsurg.save_model(model, tmp_path / "a.safetensors")
    model.act = lambda x: x
    with open_source(tmp_path / "a.safetensors") as source:
        assert [side.is_model for side in two_sides(model, source)] == [False, False]


def test_extra_state_is_a_value():
    class Counting(nn.Module):
        def get_extra_state(self) -> dict[str, int]:
            return {"calls": 3}

    old, new = two_sides(Counting(), Counting().state_dict())
    assert paths(old) == paths(new) == ["", "_extra_state", "_extra_state.calls"]


def test_a_sample_is_the_same_in_memory_and_in_a_file(tmp_path):
    values = torch.randn(1000, 3)
    path = modsurg.save_state({"a": values}, tmp_path / "a.safetensors")
    with open_source(path) as source:
        assert torch.equal(StoredLeaf(source, "a").sample(), TensorLeaf(values, 0).sample())
        assert len(StoredLeaf(source, "a").sample()) == 64


def test_bytes_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(nodes, "PIECE", 64)
    values = torch.randn(100)
    other = values.clone()
    other[99] += 1
    state = {"a": values, "b": other, "c": values.to(torch.float64), "d": torch.ones(0)}
    with open_source(modsurg.save_state(state, tmp_path / "a.safetensors")) as source:
        a, b, c, d = (StoredLeaf(source, key) for key in "abcd")
        assert nodes.same_bytes(a, StoredLeaf(source, "a"))
        assert nodes.same_bytes(d, d)
        assert not any(nodes.same_bytes(a, leaf) for leaf in (b, c, TensorLeaf(values, 0)))


def test_a_key_that_is_also_the_start_of_another():
    old, _ = two_sides({"a": torch.ones(1), "a.b": torch.ones(2)}, {})
    assert paths(old) == ["", "a", "a.b"]


def test_a_tree_that_names_what_the_file_has_not(tmp_path):
    description = describe(nn.Linear(1, 1))
    path = tmp_path / "a.safetensors"
    data = json.dumps(description.data)
    write_safetensors(path, MemorySource({"bias": torch.ones(1)}, {KEY: data}))
    with pytest.raises(FormatError, match="the tree is damaged: KeyError: 'weight'"):
        diff(path, path)
