import pytest
import torch
from resizes import resize
from torch import nn
from torch.nn.utils import parametrizations, prune

from modsurg.errors import ResizeError


@pytest.mark.parametrize(
    "layer, sizes, message",
    [
        (nn.Conv2d(4, 4, 3, groups=2), {"out_channels": 5}, r"groups=2 does not divide out_channels=5\."),
        (nn.Conv2d(4, 4, 3, groups=4), {"out_channels": 5}, "it is depthwise: give in_channels, and groups and out"),
        (
            nn.Conv2d(4, 8, 3, groups=2),
            {"groups": 4},
            "its 2 groups have 2 inputs and 4 outputs each, .*: in_channels=8, out_channels=16, groups=4",
        ),
        (nn.GroupNorm(2, 4), {"num_channels": 5}, "num_channels=5 is not a multiple of num_groups=2; .* num_groups=2"),
        (torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), {"out_features": 4}, "which can't be resized"),
        (nn.LSTM(2, 3), {"hidden_size": 4}, "is a LSTM, which can't be resized"),
        (
            type("Linear", (nn.Module,), {})(),
            {"out_features": 4},
            r"is a test_resize_checks\.Linear, which can't be resized",
        ),
        (
            nn.Sequential(nn.Dropout(), nn.Linear(2, 2), nn.Linear(2, 2)),
            {"out_features": 4},
            r'is a Sequential, which can\'t be resized; "0.1" can \(and 1 other layer in it\): resize\(model, "0.1"',
        ),
        (nn.Sequential(nn.Linear(2, 2)), {"out_channels": 4}, "is a Sequential, which can't be resized; Linear, Bilin"),
        (nn.LazyLinear(3), {"out_features": 4}, r"is lazy and has no sizes yet; .* model\(batch\)"),
        (
            parametrizations.weight_norm(nn.Linear(2, 2)),
            {"out_features": 4},
            r'remove_parametrizations\(model.get_submodule\("0"\), "weight"\)',
        ),
        (nn.utils.weight_norm(nn.Linear(2, 2)), {"out_features": 4}, r'torch.nn.utils.remove_weight_norm\(.*"weight"'),
        (nn.utils.spectral_norm(nn.Linear(2, 2)), {"out_features": 4}, r"torch.nn.utils.remove_spectral_norm\("),
        (prune.l1_unstructured(nn.Linear(2, 2), "bias", 1), {"out_features": 4}, r'prune.remove\(.*"bias"\)'),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_layers_that_cannot_be_resized(layer, sizes, message):
    with pytest.raises(ResizeError, match=message):
        resize(nn.Sequential(layer), "0", **sizes)


def test_layers_with_tensors_of_their_own_are_refused():
    class Lora(nn.Linear):
        def __init__(self):
            super().__init__(2, 2)
            self.lora_a = nn.Parameter(torch.zeros(1, 2))

    with pytest.raises(ResizeError, match="has a lora_a of its own, of which nothing is known here"):
        resize(Lora(), out_features=3)
    quantised = nn.Linear(2, 2)
    quantised.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ResizeError, match=r"its weight is a torch\.int8, not a plain floating-point tensor"):
        resize(quantised, out_features=3)
    with pytest.raises(ResizeError, match="fill='ones' is not one of init, zeros, mean, repeat"):
        resize(nn.Linear(2, 2), out_features=3, fill="ones")


def test_a_view_that_can_not_follow_is_refused():
    model = nn.ModuleDict({"encoder": nn.Linear(6, 3), "decoder": nn.Linear(3, 6)})
    model["decoder"].weight = nn.Parameter(model["encoder"].weight.t())
    with pytest.raises(
        ResizeError, match='"decoder.weight" lies in the memory of "encoder.weight" and can\'t follow it'
    ):
        resize(model, "encoder", out_features=4)
    assert model["encoder"].weight.shape == (3, 6)
    t = model.get_submodule("decoder").weight
    t.data = t.data.clone()
    resize(model, "encoder", out_features=4)
    assert model["encoder"].weight.shape == (4, 6)


def test_parameters_side_by_side_in_one_memory_are_resized():
    model = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(2, 3)})
    flat = torch.cat([parameter.data.flatten() for parameter in model.parameters()])
    for parameter, part in zip(model.parameters(), flat.split([6, 3, 6, 3]), strict=True):
        parameter.data = part.view_as(parameter)
    other = model["b"].weight.clone()
    resize(model, "a", out_features=5)
    assert torch.equal(model["b"].weight, other)


def test_a_tensor_that_no_changing_size_is_in_stays():
    class Scaled(nn.Embedding):
        def __init__(self):
            super().__init__(5, 4)
            self.scale = nn.Parameter(torch.tensor(2.0))

        def reset_parameters(self):
            super().reset_parameters()
            if hasattr(self, "scale"):
                nn.init.ones_(self.scale)

        def forward(self, numbers):
            return super().forward(numbers) * self.scale

    class Standardised(nn.Conv2d):
        def __init__(self):
            super().__init__(3, 4, 1)
            self.gain = nn.Parameter(torch.ones(4, 1, 1, 1))

    table = Scaled()
    before = table(torch.arange(5))
    (report,), _ = resize(table, num_embeddings=7)
    assert torch.equal(table(torch.arange(7))[:5], before)
    assert "Scaled has scale of its own, and keeps it" in report.notes[0]
    layer, picture = Standardised(), torch.randn(1, 1, 2, 2)
    before = layer(picture.expand(1, 3, 2, 2))
    resize(layer, in_channels=1)
    torch.testing.assert_close(layer(picture), before)
    with pytest.raises(ResizeError, match="has a gain of its own, of which nothing is known here"):
        resize(layer, out_channels=6)
