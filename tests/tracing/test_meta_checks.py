"""What a real device refuses is refused on meta, and nothing else is."""

import pytest
import torch
from torch import nn

from modsurg.tracing.meta_checks import check
from modsurg.tracing.trace import run


class Mapped(nn.Module):
    """Calls its layer for each item of a batch, by torch.vmap."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return torch.vmap(self.layer)(x)


def _with_bias_of_double(layer):
    layer.bias = nn.Parameter(layer.bias.detach().double())
    return layer


CASES = {
    "linear in half under vmap": (Mapped(nn.Linear(4, 4).half()), (torch.randn(2, 4),), "float32 and float16"),
    "transposed in 3d with another bias": (
        _with_bias_of_double(nn.ConvTranspose3d(7, 8, 3)),
        (torch.randn(1, 7, 6, 6, 6),),
        "one dtype, not float32 and float64",
    ),
    "linear in half": (nn.Linear(4, 4).half(), (torch.randn(2, 4),), "one dtype, not float32 and float16"),
    "linear on numbers": (nn.Linear(4, 4), (torch.zeros(2, 4, dtype=torch.long),), "int64 and float32"),
    "convolution in half": (
        nn.Conv2d(3, 4, 3).half(),
        (torch.randn(2, 3, 6, 6),),
        "one dtype, not float32 and float16",
    ),
    "attention in half": (nn.MultiheadAttention(4, 2).half(), (torch.randn(2, 3, 4),) * 3, "float32 and float16"),
    "layer norm in half": (nn.LayerNorm(4).half(), (torch.randn(2, 4),), "expected parameters of float32.*float16"),
    "group norm in half": (nn.GroupNorm(2, 4).half(), (torch.randn(2, 4, 3),), "expected parameters of float32"),
    "batch norm": (nn.BatchNorm1d(4).bfloat16(), (torch.randn(2, 4),), "expected parameters of float32.*bfloat16"),
    "transposed": (nn.ConvTranspose2d(7, 8, 3), (torch.randn(2, 8, 6, 6),), "an input of 7 channels, but got 8"),
    "transposed, no batch": (nn.ConvTranspose1d(7, 8, 3), (torch.randn(8, 6),), "an input of 7 channels, but got 8"),
    "beyond the table": (nn.Embedding(4, 3), (torch.tensor([0, 9]),), "9 is looked up in a table of 4 rows"),
    "below the table": (nn.Embedding(4, 3), (torch.tensor([-100, 1]),), "-100 is looked up"),
}


@pytest.mark.parametrize("name", CASES)
def test_refused_on_meta_as_for_real(name):
    model, example, message = CASES[name]
    with pytest.raises((RuntimeError, IndexError), match="dtype|scalar type|mixed|channels|out of range|same"):
        model(*example)
    trace = run(model, example)
    assert trace.failure is not None
    with pytest.raises((RuntimeError, IndexError), match=message):
        raise trace.failure.error


@pytest.mark.parametrize(
    "model, example",
    [
        (nn.Linear(4, 4).half(), torch.randn(2, 4).half()),
        (nn.LayerNorm(4), torch.randn(2, 4).bfloat16()),
        (nn.BatchNorm1d(4), torch.randn(2, 4).half()),
        (nn.ConvTranspose1d(7, 8, 3), torch.randn(7, 6)),
        (nn.Embedding(4, 3), torch.tensor([], dtype=torch.long)),
        (nn.Embedding(4, 3), torch.tensor([0, 3])),
        (_with_bias_of_double(nn.ConvTranspose1d(7, 8, 3)), torch.randn(1, 7, 6)),
        (_with_bias_of_double(nn.ConvTranspose2d(7, 8, 3)), torch.randn(1, 7, 6, 6)),
        (Mapped(nn.Embedding(4, 3)), torch.tensor([[0, 3], [1, 1]])),
    ],
)
def test_what_goes_together(model, example):
    model(example)
    assert run(model, example).failure is None


def test_autocast_makes_dtypes_go_together():
    x, weight = torch.zeros(2, 4), torch.zeros(3, 4, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="float32 and bfloat16"):
        check(torch.nn.functional.linear, (x, weight), {})
    with torch.autocast("cpu"):
        check(torch.nn.functional.linear, (x, weight), {})
        torch.nn.functional.linear(x, weight)
