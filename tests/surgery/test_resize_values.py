import pytest
import torch
from resizes import resize
from torch import nn

from modsurg.surgery.resize.values import scratch


def test_nothing_of_the_layer_is_touched():
    layer = nn.BatchNorm1d(3)
    calls = []
    layer.register_forward_hook(lambda *_: calls.append("forward"))
    layer.register_forward_pre_hook(lambda *_: calls.append("before"))
    statistics = layer.running_mean.clone()
    state = torch.get_rng_state()
    resize(layer, num_features=2)
    assert not calls
    assert layer.training
    assert torch.equal(layer.running_mean, statistics[:2])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64])
def test_every_precision(dtype):
    layer = nn.Linear(3, 4, dtype=dtype)
    resize(layer, in_features=5)
    assert layer.weight.dtype == dtype


def test_a_scratch_layer_is_its_own():
    layer = nn.MultiheadAttention(4, 2)
    tensors = {name: torch.zeros_like(p) for name, p in layer.named_parameters()}
    copy = scratch(layer, tensors, [(layer, "embed_dim", 8), (layer.out_proj, "in_features", 8)])
    assert (copy.embed_dim, copy.out_proj.in_features, copy.training) == (8, 8, False)
    assert (layer.embed_dim, layer.out_proj.in_features, layer.training) == (4, 4, True)
    assert copy.out_proj.weight is tensors["out_proj.weight"]
    assert not copy.in_proj_weight.any()
