"""A source under other names and in another dtype."""

import torch

from modsurg import read_state, save_state
from modsurg.checkpoints.formats.derived import DerivedSource
from modsurg.checkpoints.formats.registry import open_source


def test_names_dtype_and_metadata(tmp_path):
    state = {"a": torch.randn(3), "n": torch.arange(2), "m._extra_state": {"k": 1}}
    with open_source(save_state(state, tmp_path / "a.safetensors", metadata={"epoch": "3"})) as source:
        derived = DerivedSource(source, names={"m._extra_state": "m._extra_state", "b": "a"}, dtype=torch.float64)
        assert list(derived.keys_in_order) == ["m._extra_state", "b"]
        assert (derived["b"].dtype, derived["b"].nbytes, derived["b"].name) == (torch.float64, 24, "b")
        assert torch.equal(derived.read("b"), state["a"].double())
        assert derived.region("b") is None
        assert derived.check("b")
        assert derived.sealed
        assert derived.notes.metadata == {"epoch": "3"}
        assert DerivedSource(source, metadata={}).notes.metadata == {}
        assert DerivedSource(source).region("a") == source.region("a")


def test_a_state_that_is_saved_again_keeps_everything(tmp_path):
    weight = torch.randn(3)
    state = {"a": weight, "x._extra_state": (1, 2), "b": weight}
    first = save_state(state, tmp_path / "a.safetensors", metadata={"epoch": "3"})
    second = save_state(read_state(first), tmp_path / "b.safetensors")
    assert first.read_bytes() == second.read_bytes()
