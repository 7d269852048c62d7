"""A load that fails leaves the model byte for byte as it was, and says what would mend it."""

import pytest
import torch
from loads import frozen, net, refused, unchanged
from torch import nn

from modsurg import load_state, save_state
from modsurg.errors import ModsurgError


def test_the_text_of_a_wrong_shape():
    model, head = nn.Module(), nn.Module()
    model.fc, head.fc = nn.Linear(512, 10), nn.Linear(512, 1000)
    text = refused(model, head.state_dict(), "nothing was loaded")
    assert text == (
        "2 of 2 keys do not match; nothing was loaded.\n"
        "  fc.weight  file (1000, 512), model (10, 512)\n"
        "  fc.bias    file (1000,), model (10,)\n"
        'Try: load_state(..., on_mismatch="skip") to keep the model\'s own values for these keys'
    )


@pytest.mark.parametrize(
    "wrap",
    [
        lambda key: f"module.{key}",
        lambda key: f"_orig_mod.{key}",
        lambda key: f"module._orig_mod.{key}",
        lambda key: f"_orig_mod.module.module.{key}",
        lambda key: key.replace(".", "._orig_mod.", 1),
        lambda key: key.replace(".", ".module.", 1),
    ],
)
def test_wrappers_do_not_count(wrap):
    old, new = net(), net()
    assert load_state(new, {wrap(key): value for key, value in old.state_dict().items()})
    assert torch.equal(new[2].weight, old[2].weight)


def test_a_child_that_is_really_called_module():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(2, 2)
            self.weight = nn.Parameter(torch.randn(3))

    old, new = Holder(), Holder()
    assert load_state(new, old.state_dict())
    assert torch.equal(new.module.weight, old.module.weight)
    assert torch.equal(new.weight, old.weight)


def test_a_file_from_before_batch_counters():
    state = {key: value for key, value in net().state_dict().items() if "num_batches" not in key}
    model = net()
    model[1].num_batches_tracked.fill_(7)
    assert load_state(model, state)
    assert model[1].num_batches_tracked == 7


def test_every_refusal_is_of_our_own_kind(tmp_path):
    path = save_state(net(), tmp_path / "a.safetensors")
    raw = path.read_bytes()
    model = net()
    before = frozen(model)
    for length in range(0, len(raw), max(1, len(raw) // 100)):
        path.write_bytes(raw[:length])
        with pytest.raises(ModsurgError, match=r"a\.safetensors"):
            load_state(model, path)
    assert unchanged(model, before)


class Refusing(nn.Linear):
    """Takes no state, not even its own."""

    def get_extra_state(self):
        return 1

    def set_extra_state(self, state):
        raise RuntimeError("no room")


def test_extra_state_that_is_always_refused():
    state = Refusing(2, 2).state_dict()
    refused(Refusing(2, 2), state, r"_extra_state: Refusing refused it \(no room\); nothing was loaded")


def test_values_in_the_models_own_memory_that_are_not_asked_for_are_not_copied(monkeypatch):
    model = nn.ModuleDict({"body": nn.Linear(50, 50), "head": nn.Linear(2, 2)})
    copied = []
    clone = torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda self, **how: copied.append(self.shape) or clone(self, **how))
    load_state(model, model.state_dict(), only="head.*")
    assert (50, 50) not in copied
