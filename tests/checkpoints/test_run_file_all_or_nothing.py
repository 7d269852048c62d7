"""A run is loaded whole, or not at all, or the error names what was filled."""

import pytest
import torch
from loads import frozen, unchanged
from torch import nn

from modsurg import load_checkpoint, save_checkpoint
from modsurg.errors import LoadError


class Moody(nn.Linear):
    """Fills its weight, then refuses."""

    refuses = False

    def _load_from_state_dict(self, *arguments):
        super()._load_from_state_dict(*arguments)
        if self.refuses:
            raise RuntimeError("not today")


class Extra(nn.Linear):
    refuses = False

    def get_extra_state(self):
        return {"fresh": self.refuses}

    def set_extra_state(self, state):
        if self.refuses and not state["fresh"]:
            raise ValueError("not this one")


@pytest.mark.parametrize("kind", [Moody, Extra])
@pytest.mark.parametrize("order", [1, -1])
def test_a_second_model_that_refuses(kind, order, tmp_path):
    parts = {"a": nn.Linear(2, 2), "b": kind(2, 2)}
    optimizer = torch.optim.SGD([p for each in parts.values() for p in each.parameters()], lr=0.1)
    path = save_checkpoint(tmp_path / "run.safetensors", **parts, optimizer=optimizer, note={"n": 1})
    fresh = dict(list({"a": nn.Linear(2, 2), "b": kind(2, 2)}.items())[::order])
    fresh["b"].refuses = True
    other = torch.optim.SGD([p for name in "ab" for p in fresh[name].parameters()], lr=0.7)
    note = {"n": 2}
    before = {name: frozen(fresh[name]) for name in "ab"}
    random = torch.get_rng_state()
    with pytest.raises(LoadError, match=r"loading b failed.*nothing was loaded"):
        load_checkpoint(path, **fresh, optimizer=other, note=note)
    assert all(unchanged(fresh[name], before[name]) for name in "ab")
    assert other.param_groups[0]["lr"] == 0.7
    assert note == {"n": 2}
    assert torch.equal(torch.get_rng_state(), random)


def test_what_was_filled_is_named(tmp_path, monkeypatch):
    parts = {"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "c": nn.Linear(2, 2)}
    path = save_checkpoint(tmp_path / "run.safetensors", **parts)
    calls = []

    def load_state_dict(module, state, real=nn.Module.load_state_dict):
        calls.append(module)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(module, state)

    monkeypatch.setattr(nn.Module, "load_state_dict", load_state_dict)
    with pytest.raises(KeyboardInterrupt, match="a has the new values and b may have some of them: load again"):
        load_checkpoint(path, **{name: nn.Linear(2, 2) for name in parts})
