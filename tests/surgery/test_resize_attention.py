import copy

import pytest
import torch
from resizes import arrange, resize
from torch import nn

from modsurg.errors import ResizeError


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"add_bias_kv": True}, {"batch_first": True}])
def test_attention_grows_by_heads(options):
    layer = arrange(nn.MultiheadAttention(4, 2, **options))
    old = copy.deepcopy(layer)
    resize(layer, embed_dim=6)
    assert (layer.embed_dim, layer.num_heads, layer.head_dim, layer.kdim, layer.vdim) == (6, 3, 2, 6, 6)
    x = torch.randn(3, 2, 6)
    torch.testing.assert_close(layer(x, x, x)[0][..., :4], old(*[x[..., :4]] * 3)[0], rtol=1e-5, atol=1e-5)
    resize(layer, num_heads=2)
    torch.testing.assert_close(layer(*[x[..., :4]] * 3)[0], old(*[x[..., :4]] * 3)[0], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        layer(*[x[..., :4]] * 3, need_weights=False)


def test_attention_over_other_keys():
    layer = arrange(nn.MultiheadAttention(4, 2, kdim=3, vdim=5))
    old = copy.deepcopy(layer)
    resize(layer, kdim=4, vdim=7, num_heads=3)
    q, k, v = torch.randn(3, 1, 6), torch.randn(3, 1, 4), torch.randn(3, 1, 7)
    expected = old(q[..., :4], k[..., :3], v[..., :5])[0]
    torch.testing.assert_close(layer(q, k, v)[0][..., :4], expected, rtol=1e-5, atol=1e-5)
    fused = nn.MultiheadAttention(4, 2)
    with pytest.raises(ResizeError, match="share one weight here, so kdim and vdim follow embed_dim"):
        resize(fused, kdim=3)
    with pytest.raises(ResizeError, match="embed_dim=5 can't be with num_heads=2; nearest: embed_dim=4, num_heads=2"):
        resize(fused, embed_dim=5)


def test_the_output_of_attention():
    layer = arrange(nn.MultiheadAttention(4, 2, batch_first=True))
    x = torch.randn(2, 3, 4)
    old = layer(x, x, x)[0]
    resize(layer, "out_proj", out_features=6)
    torch.testing.assert_close(layer(x, x, x)[0][..., :4], old)
    with torch.no_grad():  # the fast path
        torch.testing.assert_close(layer(x, x, x, need_weights=False)[0][..., :4], old, rtol=1e-5, atol=1e-5)
    resize(layer, embed_dim=6)
    assert layer.out_proj.weight.shape == (6, 6)
