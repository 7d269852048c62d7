import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from resizes import arrange, overlap, resize
from torch import nn
from torch.nn.utils import parametrizations

import modsurg
from modsurg.errors import ResizeError
from modsurg.surgery.journal import Journal
from modsurg.surgery.resize.resize import resize_modules
from modsurg.tree.walk import walk

LAYERS = {  # layer, new sizes, input shape before, input shape after, shape of the shared output
    "linear": (lambda: nn.Linear(3, 4), {"in_features": 5, "out_features": 6}, (2, 3), (2, 5), (2, 4)),
    "linear, smaller": (lambda: nn.Linear(5, 4), {"in_features": 3, "out_features": 2}, (2, 5), (2, 3), (2, 2)),
    "no bias": (lambda: nn.Linear(3, 4, bias=False), {"out_features": 7}, (2, 3), (2, 3), (2, 4)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3), {"in_channels": 5, "out_channels": 6}, (2, 3, 7), (2, 5, 7), (2, 4, 5)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, padding=1), {"in_channels": 4}, (2, 3, 5, 5), (2, 4, 5, 5), (2, 4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(4, 4, 2), {"in_channels": 2}, (2, 4, 3, 3, 3), (2, 2, 3, 3, 3), (2, 4, 2, 2, 2)),
    "transposed": (
        lambda: nn.ConvTranspose2d(3, 4, 3, stride=2, output_padding=1),
        {"in_channels": 5, "out_channels": 6},
        (1, 3, 4, 4),
        (1, 5, 4, 4),
        (1, 4, 10, 10),
    ),
    "depthwise": (
        lambda: nn.Conv2d(4, 4, 3, groups=4),
        {"in_channels": 6, "out_channels": 6, "groups": 6},
        (1, 4, 5, 5),
        (1, 6, 5, 5),
        (1, 4, 3, 3),
    ),
    "depthwise follows": (
        lambda: nn.Conv2d(4, 8, 3, groups=4, padding_mode="reflect", padding=1),
        {"in_channels": 3},
        (1, 4, 5, 5),
        (1, 3, 5, 5),
        (1, 6, 5, 5),
    ),
    "more groups": (
        lambda: nn.ConvTranspose1d(4, 6, 3, groups=2),
        {"in_channels": 6, "out_channels": 9, "groups": 3},
        (1, 4, 5),
        (1, 6, 5),
        (1, 6, 7),
    ),
    "batchnorm": (lambda: nn.BatchNorm2d(3), {"num_features": 5}, (2, 3, 4, 4), (2, 5, 4, 4), (2, 3, 4, 4)),
    "batchnorm1d": (lambda: nn.BatchNorm1d(3), {"num_features": 2}, (2, 3), (2, 2), (2, 2)),
    "batchnorm3d": (lambda: nn.BatchNorm3d(1), {"num_features": 2}, (2, 1, 2, 2, 2), (2, 2, 2, 2, 2), (2, 1, 2, 2, 2)),
    "syncbn": (lambda: nn.SyncBatchNorm(3), {"num_features": 5}, (2, 3, 4), (2, 5, 4), (2, 3, 4)),
    "plain batchnorm": (
        lambda: nn.BatchNorm1d(3, affine=False),
        {"num_features": 5},
        (2, 3, 4),
        (2, 5, 4),
        (2, 3, 4),
    ),
    "instancenorm": (
        lambda: nn.InstanceNorm2d(3, affine=True),
        {"num_features": 5},
        (2, 3, 4, 4),
        (2, 5, 4, 4),
        (2, 3, 4, 4),
    ),
    "groupnorm": (
        lambda: nn.GroupNorm(2, 4),
        {"num_channels": 6, "num_groups": 3},
        (2, 4, 3),
        (2, 6, 3),
        (2, 4, 3),
    ),
    "prelu": (lambda: nn.PReLU(3), {"num_parameters": 5}, (2, 3), (2, 5), (2, 3)),
}


@pytest.mark.parametrize("fill", ["init", "zeros"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_old_part_computes_what_it_did(name, fill):
    make, sizes, before, after, shared = LAYERS[name]
    layer = arrange(make())
    old = copy.deepcopy(layer)
    (report,), _ = resize(layer, fill=fill, **sizes)
    x = torch.randn(after)
    common = tuple(min(a, b) for a, b in zip(before, after, strict=True))
    was = torch.zeros(before)
    overlap(was, common)[...] = overlap(x, common)
    with torch.no_grad():
        torch.testing.assert_close(overlap(layer(x), shared), overlap(old(was), shared), rtol=1e-5, atol=1e-5)
    assert {key: getattr(layer, key) for key in sizes} == sizes
    assert report.module is layer


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "depthwise follows"])
def test_overlap_and_identity_are_kept(name):
    make, sizes, *_ = LAYERS[name]
    layer = arrange(make())
    tensors = dict(layer.named_parameters()) | dict(layer.named_buffers())
    values = {key: value.detach().clone() for key, value in tensors.items()}
    resize(layer, **sizes)
    for key, value in (*layer.named_parameters(), *layer.named_buffers()):
        assert value is tensors[key]
        common = tuple(min(a, b) for a, b in zip(value.shape, values[key].shape, strict=True))
        assert torch.equal(overlap(value, common), overlap(values[key], common))


def test_random_numbers_are_used_only_for_new_outputs():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    layer = arrange(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    torch.set_rng_state(state)
    resize(layer, "0", in_features=5)
    resize(layer, "0", out_features=2)
    resize(layer, "1", num_features=7)
    resize(layer, "0", out_features=9, fill="zeros")
    assert torch.equal(torch.get_rng_state(), state)


def test_dtype_layout_gradient_and_requires_grad_are_kept():
    layer = nn.Conv2d(3, 4, 3).to(torch.bfloat16, memory_format=torch.channels_last).requires_grad_(False)
    layer.bias.requires_grad_(True)
    layer.bias.grad = torch.ones(4, dtype=torch.bfloat16)
    resize(layer, in_channels=8, out_channels=5)
    assert layer.weight.dtype == torch.bfloat16
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    assert not layer.weight.requires_grad
    assert layer.bias.grad.tolist() == [1, 1, 1, 1, 0]


def test_what_is_kept_on_a_parameter_follows_it():
    layer = nn.Linear(3, 4)
    kept = layer.bias.main_grad = torch.ones(4)
    layer.bias.step = torch.tensor(3)
    _, journal = resize(layer, out_features=5)
    assert layer.bias.main_grad.tolist() == [1, 1, 1, 1, 0]
    assert layer.bias.step == 3
    journal.rollback()
    assert layer.bias.main_grad is kept


def test_backward_works_while_an_older_graph_is_alive():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    loss = model(torch.randn(2, 3)).sum()
    loss.backward()
    _, first = resize(model, "0", out_features=5)
    _, second = resize(model, "1", in_features=5)
    again = model(torch.randn(2, 3)).sum()
    again.backward()
    assert model[1].weight.grad.shape == (2, 5)
    second.rollback()
    first.rollback()
    model(torch.randn(2, 3)).sum().backward()
    assert model[1].weight.grad.shape == (2, 4)


def gpt(bias=False):
    model = nn.ModuleDict({"wte": nn.Embedding(5, 3), "ln": nn.LayerNorm(3), "lm_head": nn.Linear(3, 5, bias=bias)})
    model["lm_head"].weight = model["wte"].weight
    return model


@pytest.mark.parametrize("bias", [True, False])
def test_tied_layers_follow(bias):
    model = gpt(bias)
    weight = model["wte"].weight
    reports, _ = resize(model, "wte", num_embeddings=8)
    assert model["lm_head"].weight is model["wte"].weight is weight
    assert model["lm_head"].out_features == 8
    assert model["lm_head"](model["wte"](torch.tensor([7]))).shape == (1, 8)
    assert [report.path for report in reports] == ["wte", "lm_head"]
    reports, _ = resize(model, "lm_head", out_features=4)
    assert model["wte"].num_embeddings == 4
    assert [report.path for report in reports] == ["lm_head", "wte"]


def test_a_module_of_the_users_own_sees_the_new_shape():
    class Head(nn.Module):
        def __init__(self, bias):
            super().__init__()
            self.bias = bias

    model = nn.ModuleDict({"decoder": nn.Linear(3, 5)})
    model["head"] = Head(model["decoder"].bias)
    (report,), _ = resize(model, "decoder", out_features=6)
    assert model["head"].bias.shape == (6,)
    assert report.notes == ("head.bias is the same tensor as decoder.bias",)


def test_ties_that_cannot_follow_are_refused():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "c": nn.Conv1d(3, 3, 1)})
    model["b"].weight = model["a"].weight
    model["c"].bias = model["a"].bias
    with pytest.raises(ResizeError, match=r'"a" shares its bias with "c" \(Conv1d\), which can\'t follow; untie it'):
        resize(model, "a", out_features=4)
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = nn.Parameter(model["a"].weight.detach())
    model["b"].bias = model["a"].weight
    with pytest.raises(ResizeError, match=r"its bias is \(3, 3\), its sizes say \(3,\)"):
        resize(model, "b", out_features=4)
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Embedding(3, 3)})
    model["b"].weight = model["a"].weight
    tree, sites = walk(model), [("a", model["a"]), ("b", parametrizations.weight_norm(nn.Linear(3, 3)))]
    with pytest.raises(ResizeError, match="parametrized"):
        resize_modules(tree, sites, {"in_features": 4}, Journal())
    assert model["a"].weight.shape == (3, 3)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"out_features": 0}, r'"0" \(Linear\): out_features=0 is not a size; a size is a whole number from 1 on'),
        ({"out_features": True}, "out_features=True is not a size"),
        ({"out_features": 2.0}, "out_features=2.0 is not a size"),
        ({"out_features": "4"}, "out_features='4' is not a size"),
        (
            {"out_channels": 3},
            r'"0" is a Linear and has no out_channels; its sizes are out_features, in_features: '
            r'resize\(model, "0", out_features=...\)',
        ),
        ({}, r'"0" is a Linear and needs a size'),
    ],
)
def test_sizes_that_cannot_be(sizes, message):
    model = nn.Sequential(nn.Linear(2, 3))
    with pytest.raises(ResizeError, match=message):
        resize(model, "0", **sizes)
    assert model[0].weight.shape == (3, 2)


@pytest.mark.parametrize("size", [10**13, 10**30])
def test_a_size_beyond_all_memory(size):
    model = nn.Sequential(nn.Linear(2, 3))
    with pytest.raises(ResizeError, match=rf'"0" \(Linear\): there is no memory for a weight of \({size}, 2\): '):
        resize(model, "0", out_features=size)
    assert model[0].weight.shape == (3, 2)


def test_weights_of_eight_bits():
    model = nn.Sequential(nn.Linear(2, 3)).to(torch.float8_e4m3fn)
    old = model[0].weight.detach().float()
    resize(model, "0", out_features=5, in_features=4)
    assert model[0].weight.dtype == torch.float8_e4m3fn
    assert torch.equal(model[0].weight.float()[:3, :2], old)
    assert model[0].weight.float()[3:].any()


def test_nothing_changes_when_the_last_site_is_refused():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, groups=2))
    with pytest.raises(ResizeError, match="groups=2 does not divide"):
        resize(model, "0", "1", out_channels=5)
    assert model[0].weight.shape[0] == model[0].out_channels == 4


def test_meta_allocates_nothing():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(10**5, 10**5), nn.Conv2d(3, 4, 3), nn.MultiheadAttention(4, 2))
    resize(model, "0", out_features=2 * 10**5)
    resize(model, "1", in_channels=1)
    resize(model, "2", embed_dim=8)
    assert model[0].weight.is_meta
    assert model[0].weight.shape == (2 * 10**5, 10**5)


def test_rollback_is_exact():
    model = gpt(bias=True)
    model["lm_head"](model["wte"](torch.tensor([1]))).sum().backward()
    before = {name: (p, p.data_ptr(), p.grad, p.detach().clone()) for name, p in model.named_parameters()}
    _, journal = resize(model, "wte", num_embeddings=8)
    journal.rollback()
    for name, p in model.named_parameters():
        was, pointer, grad, value = before[name]
        assert p is was
        assert p.data_ptr() == pointer
        assert p.grad is grad
        assert torch.equal(p, value)
    assert (model["wte"].num_embeddings, model["lm_head"].out_features) == (5, 5)


def test_rollback_leaves_the_layer_where_it_was_moved_since():
    layer = nn.Linear(2, 3)
    layer(torch.ones(1, 2)).sum().backward()
    before = layer.weight.detach().clone()
    _, journal = resize(layer, out_features=4)
    layer.double()
    journal.rollback()
    assert torch.equal(layer.weight, before.double())
    assert layer.weight.grad.dtype == torch.float64


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4), st.booleans())
@settings(deadline=None, max_examples=50)
def test_any_sequence_keeps_the_smallest_part(steps, conv):
    layer = arrange(nn.Conv1d(4, 4, 2) if conv else nn.Linear(4, 4))
    names = ("in_channels", "out_channels") if conv else ("in_features", "out_features")
    first, journals = layer.weight.detach().clone(), []
    for sizes in steps:
        journals.append(resize(layer, **dict(zip(names, sizes, strict=True)))[1])
    ins, outs = min(4, *(s[0] for s in steps), 4), min(4, *(s[1] for s in steps), 4)
    assert layer.weight.shape[:2] == steps[-1][::-1]
    assert torch.equal(layer.weight[:outs, :ins], first[:outs, :ins])
    for journal in reversed(journals):
        journal.rollback()
    assert torch.equal(layer.weight, first)
    assert getattr(layer, names[0]) == 4


def test_shares_and_multiples():
    model = nn.Sequential(nn.Linear(3, 10), nn.Linear(10, 4))
    modsurg.resize(model, nn.Linear, out_features=0.5)
    assert [layer.out_features for layer in model] == [5, 2]
    modsurg.resize(model, "0", out_features=13, multiple=8)
    assert model[0].out_features == 16
    report = modsurg.resize(model, "0", out_features=0.5, multiple=3)
    assert model[0].out_features == 9
    other = nn.Sequential(nn.Linear(3, 16), nn.Linear(10, 4))
    modsurg.replay(other, report.recipe)
    assert other[0].out_features == 9


def test_new_places_are_the_mean_or_repeat():
    table = nn.Sequential(nn.Embedding(4, 2))
    old = table[0].weight.detach().clone()
    modsurg.resize(table, "0", num_embeddings=6, fill="mean")
    assert torch.equal(table[0].weight[:4], old)
    torch.testing.assert_close(table[0].weight[4:], old.mean(0).expand(2, 2))
    stem = nn.Sequential(nn.Conv2d(3, 2, 3))
    old = stem[0].weight.detach().clone()
    modsurg.resize(stem, "0", in_channels=5, fill="repeat")
    assert torch.equal(stem[0].weight, old[:, [0, 1, 2, 0, 1]])
