import copy

import pytest
import torch
from blueprints import Net, again, assert_same, damage, linear
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from modsurg.errors import SaveError, TrustError
from modsurg.structure.build import build, describe


def kept_hook(module, args):
    return None


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_keep_their_flat_weights(kind):
    model = kind(3, 4, num_layers=2, bidirectional=True)
    back = again(model)
    assert_same(model, back)
    assert back._flat_weights[0] is back.weight_ih_l0
    x = torch.randn(5, 2, 3)
    assert torch.equal(model(x)[0], back(x)[0])
    assert copy.deepcopy(back)._flat_weights is not None


def test_parametrizations_come_back():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    parametrizations.weight_norm(model[0])
    parametrizations.spectral_norm(model[1])
    parametrizations.orthogonal(model[2])
    parametrize.register_parametrization(model[3], "weight", Doubled())
    back = again(model.eval())
    assert_same(model, back)
    x = torch.randn(2, 4)
    assert torch.equal(model(x), back(x))
    parametrize.remove_parametrizations(back[3], "weight")
    assert type(back[3]) is nn.Linear
    old = {"0.weight_g": torch.ones(4, 1), "0.weight_v": torch.ones(4, 4)}
    assert not back.load_state_dict(old, strict=False).unexpected_keys


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_older_norms_come_back_and_pruning_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 1), nn.Linear(1, 4))
    nn.utils.weight_norm(model[0])
    nn.utils.spectral_norm(model[1])
    back = again(model)
    assert_same(model, back)
    x = torch.randn(2, 4, 1)
    assert torch.equal(model[1].eval()(x), back[1].eval()(x))
    assert torch.equal(model[0](x[..., 0]), back[0](x[..., 0]))
    assert torch.equal(model[2](x), back[2](x))
    nn.utils.remove_weight_norm(back[0])
    prune.l1_unstructured(model[2], "weight", 0.5)
    with pytest.raises(SaveError, match=r"2  a hook"):
        describe(model)


def test_a_method_put_under_another_name_is_kept():
    """timm's FasterNet chooses its forward in this way."""
    model = Net()
    model.forward, model.act = model.forward_negative, model.other
    back = again(model)
    assert back(torch.ones(1)) == -1
    assert back.act(torch.ones(1)) == -1
    model.forward = model.other
    with pytest.raises(SaveError, match="forward  a method replaced on this object"):
        again(model)


def test_another_hook_is_refused_by_its_path():
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].register_forward_pre_hook(kept_hook)
    with pytest.raises(SaveError, match=r"0  a hook \(forward pre hook\): remove it"):
        describe(model)


@pytest.mark.parametrize("name", ["forward", "state_dict", "_call_impl", "extra_repr", "__getattr__", "train"])
def test_a_file_can_not_replace_a_method(name):
    data = linear()
    data["names"].append("torch.nn.functional:relu")
    damage(data, "modules", 0, "attributes", {name: {"name": len(data["names"]) - 1}})
    with pytest.raises(TrustError, match=f"replaces '{name}' of a Linear; nothing of it ran"):
        build(data)
