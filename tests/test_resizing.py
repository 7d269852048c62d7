import copy
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune

from modsurg.errors import ResizeError
from modsurg.surgery.journal import Journal
from modsurg.surgery.resizing import resize_modules
from modsurg.tree.walk import walk


def resize(model, *paths, fill="init", **sizes):
    journal = Journal()
    sites = [(path, model.get_submodule(path)) for path in paths or [""]]
    return resize_modules(walk(model), sites, sizes, journal, fill=fill), journal


def arrange(layer):
    torch.manual_seed(0)
    for tensor in (*layer.parameters(), *layer.buffers()):
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 1.5)
    return layer.eval()


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


def overlap(tensor, shape):
    return tensor[tuple(slice(size) for size in shape)]


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
    assert report.difference < 1e-5
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


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_layer_norms(norm):
    layer = arrange(norm(3))
    (report,), _ = resize(layer, normalized_shape=5)
    assert layer.normalized_shape == (5,)
    assert layer.weight[3:].tolist() == [1, 1]
    assert report.difference > 0
    assert "so the output of the old ones changes" in report.notes[0]
    layer = norm((3, 4), elementwise_affine=False)
    resize(layer, normalized_shape=[2, 4])
    assert layer(torch.randn(5, 2, 4)).shape == (5, 2, 4)
    with pytest.raises(ResizeError, match=r"normalized_shape=3 has 1 dimensions, the layer has 2: \(2, 4\)"):
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
    (report,), _ = resize(layer, in1_features=3, in2_features=5, out_features=6)
    a, b = torch.randn(2, 3), torch.randn(2, 5)
    torch.testing.assert_close(layer(a, b)[:, :4], old(a[:, :2], b[:, :3]))
    assert report.difference < 1e-5


def test_channels_keep_their_group():
    layer = arrange(nn.Conv1d(4, 4, 1, groups=2, bias=True))
    old = copy.deepcopy(layer)
    (report,), _ = resize(layer, out_channels=6)
    x = torch.randn(2, 4, 5)
    torch.testing.assert_close(layer(x)[:, [0, 1, 3, 4]], old(x))
    assert report.notes == (
        "an output channel keeps its group and its place in it: the second group began at 2 and begins at 3",
    )
    assert report.difference < 1e-6
    resize(layer, in_channels=8)
    y = torch.zeros(2, 8, 5)
    y[:, [0, 1, 4, 5]] = x
    torch.testing.assert_close(layer(y)[:, [0, 1, 3, 4]], old(x))


@pytest.mark.parametrize("bias", [True, False])
def test_a_gray_picture_keeps_its_response(bias):
    layer = arrange(nn.Conv2d(3, 4, 3, bias=bias))
    old = copy.deepcopy(layer)
    (report,), _ = resize(layer, in_channels=1)
    picture = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(layer(picture), old(picture.expand(-1, 3, -1, -1)), rtol=1e-5, atol=1e-5)
    assert 0 < report.difference < 1e-5
    assert report.notes == ("the three input channels were summed: a gray picture keeps its response",)
    resize(layer, in_channels=3)
    colours = torch.cat([picture, torch.randn(2, 2, 8, 8)], 1)
    torch.testing.assert_close(layer(colours), old(picture.expand(-1, 3, -1, -1)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"add_bias_kv": True}, {"batch_first": True}])
def test_attention_grows_by_heads(options):
    layer = arrange(nn.MultiheadAttention(4, 2, **options))
    old = copy.deepcopy(layer)
    (report,), _ = resize(layer, embed_dim=6)
    assert (layer.embed_dim, layer.num_heads, layer.head_dim, layer.kdim, layer.vdim) == (6, 3, 2, 6, 6)
    x = torch.randn(3, 2, 6)
    torch.testing.assert_close(layer(x, x, x)[0][..., :4], old(*[x[..., :4]] * 3)[0], rtol=1e-5, atol=1e-5)
    assert report.difference < 1e-5
    resize(layer, num_heads=2)
    torch.testing.assert_close(layer(*[x[..., :4]] * 3)[0], old(*[x[..., :4]] * 3)[0], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        layer(*[x[..., :4]] * 3, need_weights=False)


def test_attention_over_other_keys():
    layer = arrange(nn.MultiheadAttention(4, 2, kdim=3, vdim=5))
    old = copy.deepcopy(layer)
    (report,), _ = resize(layer, kdim=4, vdim=7, num_heads=3)
    q, k, v = torch.randn(3, 1, 6), torch.randn(3, 1, 4), torch.randn(3, 1, 7)
    expected = old(q[..., :4], k[..., :3], v[..., :5])[0]
    torch.testing.assert_close(layer(q, k, v)[0][..., :4], expected, rtol=1e-5, atol=1e-5)
    assert report.difference < 1e-5
    fused = nn.MultiheadAttention(4, 2)
    with pytest.raises(ResizeError, match="share one weight here, so kdim and vdim follow embed_dim"):
        resize(fused, kdim=3)
    with pytest.raises(ResizeError, match="a head keeps its size of 2, so embed_dim=5 can't be; nearest: embed_dim=4"):
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


def test_a_subclass_begins_its_own_way():
    class Ones(nn.Linear):
        def reset_parameters(self):
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    layer = Ones(2, 2)
    resize(layer, out_features=3, in_features=3)
    assert layer.weight.tolist() == [[1, 1, 0], [1, 1, 0], [1, 1, 1]]
    assert type(layer) is Ones


def test_dtype_layout_gradient_and_requires_grad_are_kept():
    layer = nn.Conv2d(3, 4, 3).to(torch.bfloat16, memory_format=torch.channels_last).requires_grad_(False)
    layer.bias.requires_grad_(True)
    layer.bias.grad = torch.ones(4, dtype=torch.bfloat16)
    resize(layer, in_channels=8, out_channels=5)
    assert layer.weight.dtype == torch.bfloat16
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    assert not layer.weight.requires_grad
    assert layer.bias.grad.tolist() == [1, 1, 1, 1, 0]


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


def test_a_config_that_says_otherwise_is_pointed_out():
    model = gpt()
    model.config = types.SimpleNamespace(vocab_size=5)
    first, second = resize(model, "lm_head", out_features=8)[0]
    assert second.notes == ("the model's loss goes by its config, which still says 5: model.config.vocab_size = 8",)
    assert first.notes == resize(model, "wte", num_embeddings=9)[0][0].notes == ()


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
        ({"out_features": 0}, r'"0" \(Linear\): out_features=0 is no size; a size is a whole number from 1 on'),
        ({"out_features": True}, "out_features=True is no size"),
        ({"out_features": 2.0}, "out_features=2.0 is no size"),
        ({"out_features": "4"}, "out_features='4' is no size"),
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
        (nn.GroupNorm(2, 4), {"num_channels": 5}, "num_channels=5 is no multiple of num_groups=2; .* num_groups=2"),
        (torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), {"out_features": 4}, "which can't be resized"),
        (nn.LSTM(2, 3), {"hidden_size": 4}, "is a LSTM, which can't be resized"),
        (nn.Sequential(nn.Linear(2, 2)), {"out_features": 4}, "is a Sequential, which can't be resized"),
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
    with pytest.raises(ResizeError, match="fill='ones' is neither"):
        resize(nn.Linear(2, 2), out_features=3, fill="ones")


def test_nothing_changes_when_the_last_site_is_refused():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, groups=2))
    with pytest.raises(ResizeError, match="groups=2 does not divide"):
        resize(model, "0", "1", out_channels=5)
    assert model[0].weight.shape[0] == model[0].out_channels == 4


def test_meta_allocates_nothing():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(10**5, 10**5), nn.Conv2d(3, 4, 3), nn.MultiheadAttention(4, 2))
    (report,), _ = resize(model, "0", out_features=2 * 10**5)
    resize(model, "1", in_channels=1)
    resize(model, "2", embed_dim=8)
    assert report.difference is None
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
