import copy

import pytest
import torch
from resizes import arrange, resize
from torch import nn

from modsurg.errors import ResizeError


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_layer_norms(norm):
    layer = arrange(norm(3))
    (report,), _ = resize(layer, normalized_shape=5)
    assert layer.normalized_shape == (5,)
    assert layer.weight[3:].tolist() == [1, 1]
    assert "so the output of the old ones changes" in report.notes[0]
    layer = norm((3, 4), elementwise_affine=False)
    resize(layer, normalized_shape=[2, 4])
    assert layer(torch.randn(5, 2, 4)).shape == (5, 2, 4)
    with pytest.raises(ResizeError, match=r"normalized_shape=3 has 1 dimension, the layer has 2: \(2, 4\)"):
        resize(layer, normalized_shape=3)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_embeddings(kind):
    layer = arrange(kind(4, 3, padding_idx=1))
    old = layer.weight.detach().clone()
    resize(layer, num_embeddings=6, embedding_dim=5)
    assert torch.equal(layer.weight[:4, :3], old)
    assert layer.weight[4:].abs().min() > 0
    assert layer(torch.tensor([[5, 0]])).shape[-1] == 5
    with pytest.raises(ResizeError, match="padding_idx is 1, so num_embeddings must be at least 2"):
        resize(layer, num_embeddings=1)


def test_one_slope_goes_to_every_channel():
    layer = nn.PReLU(init=0.7)
    resize(layer, num_parameters=3)
    assert layer.weight.tolist() == pytest.approx([0.7] * 3)


def test_bilinear():
    layer = arrange(nn.Bilinear(2, 3, 4))
    old = copy.deepcopy(layer)
    resize(layer, in1_features=3, in2_features=5, out_features=6)
    a, b = torch.randn(2, 3), torch.randn(2, 5)
    torch.testing.assert_close(layer(a, b)[:, :4], old(a[:, :2], b[:, :3]))


def test_new_outputs_begin_as_the_layer_begins():
    layer = nn.Linear(100, 2)
    torch.manual_seed(7)
    resize(layer, out_features=50)
    new = layer.weight[2:]
    assert 0.09 < new.abs().max() <= 0.1
    assert 0 < layer.bias[2:].abs().max() <= 0.1
    other = nn.Linear(100, 2)
    torch.manual_seed(7)
    resize(other, out_features=50)
    assert torch.equal(other.weight[2:], new)
    resize(layer, out_features=60, fill="zeros")
    assert not layer.weight[50:].any()
    assert not layer.bias[50:].any()


def test_a_subclass_begins_its_own_way():
    class Ones(nn.Linear):
        def reset_parameters(self):
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    layer = Ones(2, 2)
    resize(layer, out_features=3, in_features=3)
    assert layer.weight.tolist() == [[1, 1, 0], [1, 1, 0], [1, 1, 1]]
    assert type(layer) is Ones
