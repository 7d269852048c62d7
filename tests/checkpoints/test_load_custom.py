"""Modules that load in their own way."""

import pytest
import torch
import torchvision
from loads import net, refused
from torch import nn

from modsurg import load_state, save_state
from modsurg.errors import LoadError


def test_old_keys_of_torchvision():
    model = torchvision.models.vision_transformer.MLPBlock(4, 8, 0.0)
    state = {
        key.replace("0.", "linear_1.").replace("3.", "linear_2."): torch.randn_like(value)
        for key, value in model.state_dict().items()
    }
    assert load_state(model, state)
    assert torch.equal(model[0].weight, state["linear_1.weight"])


def test_a_pre_hook():
    model = net()
    model.register_load_state_dict_pre_hook(
        lambda module, state, *rest: state.update({"0.bias": state.pop("0.b")} if "0.b" in state else {})
    )
    state = net().state_dict()
    state["0.b"] = state.pop("0.bias")
    report = load_state(model, state)
    assert report
    assert sorted(report.loaded) == sorted(model.state_dict())
    assert torch.equal(model[0].bias, state["0.b"])


def test_a_hook_that_fails_is_rolled_back():
    model = net()

    def hook(module, state, *rest):
        module[0].weight.data.zero_()
        module.note = "changed"
        module.extra = nn.Linear(1, 1)
        raise RuntimeError("no such version")

    model.register_load_state_dict_pre_hook(hook)
    refused(model, net().state_dict(), "loading code of the model's own refused.*\n.*no such version")
    assert not hasattr(model, "note")
    assert not hasattr(model, "extra")


def test_a_wrong_shape_is_rolled_back():
    model = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    refused(
        model,
        {**model.state_dict(), "bias": torch.ones(5)},
        r"1 of 3 keys does not match.*\n  bias  file \(5,\), model \(2,\)",
    )
    refused(model, {"bias": torch.ones(2)}, r"parametrizations\.weight\.original0  not in the file")
    report = load_state(model, {**model.state_dict(), "bias": torch.ones(5)}, on_mismatch="skip")
    assert list(report.skipped) == ["bias"]


def test_weight_norm_of_both_kinds():
    old = nn.utils.weight_norm(nn.Linear(3, 2))
    new = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    assert load_state(new, old.state_dict())
    assert torch.equal(new(torch.ones(1, 3)), old(torch.ones(1, 3)))


def test_parametrized_and_spectral_norm(tmp_path):
    for make in (
        nn.utils.parametrizations.spectral_norm,
        nn.utils.spectral_norm,
        nn.utils.parametrizations.orthogonal,
    ):
        old, new = make(nn.Linear(3, 2)), make(nn.Linear(3, 2))
        load_state(new, save_state(old, tmp_path / "a.safetensors"))
        assert torch.equal(new.eval()(torch.ones(1, 3)), old.eval()(torch.ones(1, 3)))


def test_lazy_modules():
    old = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    new = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d())
    assert load_state(new, old.state_dict())
    assert torch.equal(new.eval()(torch.ones(2, 3)), old.eval()(torch.ones(2, 3)))


def test_a_lazy_module_stays_lazy_when_the_load_fails():
    new = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    state = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).state_dict()
    with pytest.raises(LoadError, match=r"1\.bias  file \(5,\), model \(2,\)"):
        load_state(new, {**state, "1.bias": torch.ones(5)})
    assert isinstance(new[0].weight, nn.UninitializedParameter)
    assert new(torch.ones(1, 7)).shape == (1, 2)


def test_code_that_replaces_a_class_method():
    class Doubling(nn.Linear):
        def _load_from_state_dict(self, state, prefix, *rest):
            state[prefix + "weight"] = state[prefix + "weight"] * 2
            super()._load_from_state_dict(state, prefix, *rest)

    model, other = nn.Sequential(Doubling(2, 2)), nn.Sequential(nn.Linear(2, 2))
    assert load_state(model, other.state_dict())
    assert torch.equal(model[0].weight, other[0].weight * 2)


def test_on_meta():
    with torch.device("meta"):
        model = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    model.register_load_state_dict_pre_hook(lambda *rest: None)
    old = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    assert load_state(model, old.state_dict())
    assert torch.equal(model(torch.ones(1, 3)), old(torch.ones(1, 3)))


def test_on_meta_with_keys_that_a_hook_renames():
    def hook(module, state, *rest):
        if "0.b" in state:
            state["0.bias"] = state.pop("0.b")

    old = net()
    with torch.device("meta"):
        new, partly = net(), net()
    state = dict(old.state_dict())
    state["0.b"] = state.pop("0.bias")
    new.register_load_state_dict_pre_hook(hook)
    assert load_state(new, state)
    assert torch.equal(new[0].bias, state["0.b"])
    partly.register_load_state_dict_pre_hook(hook)
    del state["0.b"]
    assert load_state(partly, state, strict=False).missing == ["0.bias"]
    assert partly[0].bias.is_meta
    assert torch.equal(partly[0].weight, old[0].weight)


def test_a_batch_norm_with_loading_code_of_its_own():
    class Shifted(nn.BatchNorm1d):
        def _load_from_state_dict(self, state, prefix, *rest):
            state[prefix + "bias"] = state[prefix + "bias"] + 1
            super()._load_from_state_dict(state, prefix, *rest)

    model = Shifted(2)
    load_state(model, nn.BatchNorm1d(2).state_dict())
    assert torch.equal(model.bias, torch.ones(2))
