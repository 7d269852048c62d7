"""Multiply-adds against hand computation, and against fvcore where that is installed."""

from math import prod

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from modsurg.tracing.trace import run


def macs(model, *shapes):
    trace = run(model, tuple(torch.empty(shape, device="meta") for shape in shapes))
    assert trace.failure is None
    assert trace.note == ""
    return trace.macs[""]


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (nn.Linear(7, 5), (3, 7), 3 * 7 * 5),
        (nn.Linear(7, 5), (2, 4, 7), 2 * 4 * 7 * 5),
        (nn.Conv1d(4, 6, 3), (2, 4, 10), 2 * 6 * 8 * 4 * 3),
        (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 8, 8), 2 * 6 * 64 * 4 * 9),
        (nn.Conv2d(4, 8, 3, groups=4, stride=2), (1, 4, 9, 9), 8 * 16 * 1 * 9),
        (nn.Conv2d(4, 6, 3, padding="same"), (1, 4, 8, 8), 6 * 64 * 4 * 9),
        (nn.Conv3d(2, 3, 2), (1, 2, 4, 4, 4), 3 * 27 * 2 * 8),
        (nn.ConvTranspose2d(4, 6, 3, stride=2), (1, 4, 5, 5), 25 * 4 * 6 * 9),
        (nn.ConvTranspose1d(4, 6, 3, groups=2), (1, 4, 5), 5 * 4 * 3 * 3),
        (nn.LSTM(8, 16, 2, bidirectional=True), (5, 3, 8), 15 * 2 * 4 * 16 * (8 + 16 + 32 + 16)),
        (nn.LSTM(8, 16, proj_size=4), (5, 3, 8), 15 * (4 * 16 * (8 + 4) + 16 * 4)),
        (nn.GRU(8, 16), (5, 3, 8), 15 * 3 * 16 * (8 + 16)),
        (nn.RNN(8, 16, nonlinearity="relu"), (5, 3, 8), 15 * 16 * (8 + 16)),
        (nn.LSTM(8, 16), (5, 8), 5 * 4 * 16 * (8 + 16)),
        (nn.LSTMCell(8, 16), (3, 8), 3 * 4 * 16 * (8 + 16)),
        (nn.GRUCell(8, 16), (3, 8), 3 * 3 * 16 * (8 + 16)),
        (nn.Embedding(10, 4), (2, 3), 0),
        (nn.BatchNorm2d(4), (2, 4, 8, 8), 0),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_layers_by_hand(layer, shape, expected):
    trace = run(layer, shape)
    assert trace.failure is None
    assert trace.macs[""] == expected


def test_bilinear():
    assert macs(nn.Bilinear(3, 4, 5), (2, 3), (2, 4)) == 2 * 3 * 4 * 5


@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention(batch_first):
    layer = nn.MultiheadAttention(16, 4, kdim=12, vdim=20, batch_first=batch_first)
    query, key, value = (2, 5, 16), (2, 7, 12), (2, 7, 20)
    if not batch_first:
        query, key, value = (5, 2, 16), (7, 2, 12), (7, 2, 20)
    expected = 2 * (5 * 16 * 16 + 7 * 12 * 16 + 7 * 20 * 16) + 2 * 2 * 5 * 7 * 16 + 2 * 5 * 16 * 16
    assert macs(layer, query, key, value) == expected


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


@pytest.mark.parametrize(
    ("function", "shapes", "expected"),
    [
        (torch.matmul, [(2, 3, 4), (2, 4, 5)], 2 * 3 * 4 * 5),
        (lambda a, b: a @ b, [(3, 4), (4,)], 12),
        (lambda a, b: a.mm(b), [(3, 4), (4, 5)], 60),
        (torch.bmm, [(2, 3, 4), (2, 4, 5)], 120),
        (torch.linalg.matmul, [(3, 4), (4, 5)], 60),
        (torch.ops.aten.mm.default, [(3, 4), (4, 5)], 60),
        (lambda x, w, b: torch.conv_tbc(x, w, b, 1), [(7, 2, 3), (3, 3, 5), (5,)], 7 * 2 * 5 * 9),
        (lambda x, w: torch.convolution(x, w, None, [1], [0], [1], False, [0], 1), [(1, 3, 8), (5, 3, 3)], 5 * 6 * 9),
        (lambda x, w: torch.convolution(x, w, None, [1], [0], [1], True, [0], 1), [(1, 3, 8), (3, 5, 3)], 8 * 3 * 15),
        (torch.func.vmap(torch.matmul), [(6, 3, 4), (6, 4, 5)], 6 * 60),
        (torch.func.vmap(F.linear, in_dims=(None, 1)), [(3, 4), (5, 6, 4)], 6 * 60),
        (torch.func.vmap(torch.func.vmap(torch.matmul), (1, None)), [(2, 6, 3, 4), (2, 4, 5)], 12 * 60),
        (torch.mv, [(3, 4), (4,)], 12),
        (torch.dot, [(4,), (4,)], 4),
        (torch.addmm, [(5,), (3, 4), (4, 5)], 60),
        (torch.addmv, [(3,), (3, 4), (4,)], 12),
        (torch.baddbmm, [(1, 1, 5), (2, 3, 4), (2, 4, 5)], 120),
        (torch.addbmm, [(3, 5), (2, 3, 4), (2, 4, 5)], 120),
        (torch.inner, [(2, 4), (3, 4)], 24),
        (torch.linalg.vecdot, [(2, 1, 4), (3, 4)], 24),
        (lambda a, b, c: torch.linalg.multi_dot([a, b, c]), [(2, 3), (3, 4), (4, 5)], 2 * 3 * 4 + 2 * 4 * 5),
        (lambda a, b: torch.tensordot(a, b, dims=2), [(2, 3, 4), (3, 4, 5)], 2 * 3 * 4 * 5),
        (lambda a, b: torch.einsum("bhqd,bhkd->bhqk", a, b), [(2, 3, 4, 5), (2, 3, 6, 5)], 2 * 3 * 4 * 6 * 5),
        (lambda a, b: torch.einsum("...d,de", a, b), [(2, 3, 4), (4, 5)], 2 * 3 * 4 * 5),
        (lambda a, b: torch.einsum("bk,bk->bk", a, b), [(2, 3), (2, 3)], 0),
        (lambda a, b: torch.einsum("i,j->ij", a, b), [(2,), (3,)], 0),
        (lambda a, b, c: torch.einsum("ab,bc,cd->ad", a, b, c), [(2, 3), (3, 4), (4, 5)], 2 * 3 * 4 + 2 * 4 * 5),
        (lambda a, b: torch.einsum(a, [0, 1], b, [1, 2], [0, 2]), [(2, 3), (3, 4)], 24),
        (lambda a, b: F.linear(input=a, weight=b), [(2, 3), (4, 3)], 24),
        (F.scaled_dot_product_attention, [(2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4)], 2 * 3 * 5 * 7 * 12),
        (lambda q, k: F.scaled_dot_product_attention(q, k, k, is_causal=True), [(1, 2, 5, 8)] * 2, 2 * 5 * 5 * 16),
        (lambda a: a + a * 2, [(3, 4)], 0),
    ],
)
def test_functions_by_hand(function, shapes, expected):
    assert macs(Function(function), *shapes) == expected


def test_grouped_query_attention_counts_the_heads_of_the_query():
    def attend(query, key):
        return F.scaled_dot_product_attention(query, key, key, enable_gqa=True)

    assert macs(Function(attend), (1, 8, 5, 16), (1, 2, 7, 16)) == 8 * 5 * 7 * 32


def test_packed_sequences_count_what_is_there():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(4, 6)

        def forward(self, x):
            return self.lstm(nn.utils.rnn.pack_padded_sequence(x, [5, 2]))[0].data

    trace = run(Packed(), (5, 2, 4), fallback=True)
    assert trace.macs[""] == 7 * 4 * 6 * (4 + 6)


@pytest.mark.filterwarnings("ignore")
def test_quantised_linear():
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 3)), {nn.Linear})
    assert run(model, (2, 4), fallback=True).macs[""] == 24


@pytest.mark.filterwarnings("ignore")
def test_of_a_sparse_matrix_only_what_is_there_is_multiplied():
    for sparse in (torch.eye(4).to_sparse(), torch.eye(4).to_sparse_csr()):
        for product in (torch.sparse.mm, torch.matmul):
            trace = run(Function(lambda x, a=sparse, by=product: by(a, x)), (4, 3), fallback=True)
            assert trace.macs[""] == 4 * 3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [torch.jit.script, lambda model: torch.jit.trace(model, torch.zeros(5, 3, 8))])
def test_torchscript_counts_as_a_whole(make):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.linear = nn.LSTM(8, 16, 2, bidirectional=True), nn.Linear(32, 8)
            self.attention = nn.MultiheadAttention(8, 2)

        def forward(self, x):
            x = self.linear(self.lstm(x)[0])
            x = self.attention(x, x, x, need_weights=False)[0]
            return F.scaled_dot_product_attention(x, x, x)

    model = Net().eval()
    expected = run(model, (5, 3, 8)).macs[""]
    assert run(nn.Sequential(make(model)), (5, 3, 8), fallback=True).macs == {"": expected, "0": expected}


@pytest.mark.filterwarnings("ignore")
def test_flexible_attention():
    from torch.nn.attention.flex_attention import flex_attention

    trace = run(Function(flex_attention), tuple(torch.zeros(1, 2, 128, 16) for _ in range(3)), fallback=True)
    assert trace.failure is None
    assert trace.macs[""] == 2 * 128 * 128 * 32


torchvision = pytest.importorskip("torchvision")


@pytest.mark.parametrize(
    ("name", "millions"),
    [("resnet152", 11_514), ("vit_b_16", 17_564), ("swin_t", 4_491), ("resnet18", 1_814), ("mobilenet_v2", 301)],
)
def test_known_models(name, millions):
    with torch.device("meta"):
        model = getattr(torchvision.models, name)()
    assert round(run(model, (1, 3, 224, 224)).macs[""] / 1e6) == millions


CONVOLUTIONAL = """
    alexnet vgg11 resnet18 resnext50_32x4d squeezenet1_1 mobilenet_v2 mobilenet_v3_small densenet121 efficientnet_b0
    regnet_y_400mf
"""


@pytest.mark.parametrize("name", CONVOLUTIONAL.split())
def test_fvcore_agrees_on_convolutional_networks(name):
    fvcore = pytest.importorskip("fvcore.nn")
    model = getattr(torchvision.models, name)().eval()
    counted = fvcore.FlopCountAnalysis(model, torch.zeros(1, 3, 64, 64))
    counted.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    by_kind = counted.by_operator()
    expected = sum(by_kind[kind] for kind in ("conv", "linear", "addmm", "matmul"))
    assert run(model, (1, 3, 64, 64)).macs[""] == expected


def test_a_convolution_by_a_loop_over_every_output():
    layer = nn.Conv2d(2, 3, (3, 1), stride=(2, 1), dilation=(1, 2))
    output = layer(torch.zeros(2, 2, 9, 5))
    assert macs(layer, (2, 2, 9, 5)) == prod(output.shape) * 2 * 3 * 1


@pytest.mark.parametrize(
    "function",
    [
        torch.cov,
        torch.corrcoef,
        *(lambda x, n=n: torch.linalg.matrix_power(x @ x.T, n) for n in (1, 2, 3, 7, 8)),
        lambda x: (x @ x.T).matrix_power(5),
    ],
)
def test_products_inside_other_functions(function):
    class Net(nn.Module):
        def forward(self, x):
            return function(x)

    x = torch.randn(8, 32)
    with FlopCounterMode(display=False) as counter:
        function(x)
    assert run(Net(), x, fallback=True).macs[""] == counter.get_total_flops() // 2
