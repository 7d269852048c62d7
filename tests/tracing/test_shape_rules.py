"""Every rule says of meta tensors what torch does with real ones: shape, dtype and strides."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modsurg.tracing.inputs import forked_random
from modsurg.tracing.shape_rules import shaped
from modsurg.tracing.trace import run

x, y = torch.rand(2, 4, 9, 7), torch.rand(2, 4, 9, 7)
vector, half = torch.rand(4), torch.rand(2, 4, 9, 7).half()
last = torch.rand(2, 9, 7, 4).permute(0, 3, 1, 2)
rows, indices = torch.rand(5, 3, 8), torch.randint(0, 5, (3, 6))

CALLS = {
    **{f"{name}": (getattr(F, name), (x,), {}) for name in ("relu", "gelu", "silu", "hardswish", "relu6")},
    **{f"{name} last": (getattr(torch, name), (last,), {}) for name in ("exp", "tanh", "sigmoid", "rsqrt")},
    "relu in place": (F.relu, (x.clone(),), {"inplace": True}),
    "hardsigmoid": (F.hardsigmoid, (half,), {}),
    "softmax": (F.softmax, (x,), {"dim": -1}),
    "softmax dtype": (F.softmax, (half,), {"dim": 1, "dtype": torch.float32}),
    "dropout": (F.dropout, (x, 0.5), {}),
    "batch_norm": (F.batch_norm, (x, vector, vector), {"training": False}),
    "batch_norm train": (F.batch_norm, (x, None, None), {"training": True}),
    "layer_norm": (F.layer_norm, (rows, (8,)), {}),
    "add": (torch.add, (x, y), {}),
    "add number": (torch.Tensor.add, (x, 2), {}),
    "mul broadcast": (torch.mul, (x, torch.rand(4, 1, 7)), {}),
    "sub reversed": (torch.Tensor.__rsub__, (x, 1.0), {}),
    "div": (torch.div, (last, 2.0), {}),
    "add_": (torch.Tensor.add_, (x.clone(), vector[:1]), {}),
    "linear": (F.linear, (rows, torch.rand(6, 8), torch.rand(6)), {}),
    "matmul": (torch.matmul, (x, torch.rand(7, 5)), {}),
    "conv2d": (F.conv2d, (x, torch.rand(6, 2, 3, 2), torch.rand(6)), {"stride": (2, 1), "padding": 1, "groups": 2}),
    "conv2d dilated": (F.conv2d, (x, torch.rand(6, 4, 3, 3)), {"dilation": 2}),
    "conv1d": (F.conv1d, (torch.rand(2, 4, 9), torch.rand(6, 4, 3)), {"stride": 2}),
    "conv3d": (F.conv3d, (torch.rand(1, 2, 5, 5, 5), torch.rand(3, 2, 2, 2, 2)), {}),
    "max_pool2d": (F.max_pool2d, (x, 3, 2, 1), {}),
    "adaptive_avg_pool2d": (F.adaptive_avg_pool2d, (x, (3, 2)), {}),
    "embedding": (F.embedding, (indices, torch.rand(5, 4)), {}),
    "cat": (torch.cat, ([x, y, x],), {"dim": -2}),
    "attention": (F.scaled_dot_product_attention, (torch.rand(2, 3, 5, 8), *[torch.rand(2, 3, 6, 8)] * 2), {}),
    "arange": (torch.arange, (3, 20, 4), {"device": "meta"}),
}


def to_meta(value):
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return type(value)(map(to_meta, value)) if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("name", CALLS)
def test_a_rule_agrees_with_torch(name):
    function, args, kwargs = CALLS[name]
    real = function(*args, **kwargs)
    told = shaped(function.__name__, to_meta(args), kwargs)
    assert told.is_meta
    assert (told.shape, told.dtype) == (real.shape, real.dtype)
    assert told.stride() == real.stride()


@pytest.mark.parametrize(
    ("function", "args"),
    [
        (F.linear, (rows, torch.rand(6, 9))),
        (F.conv2d, (x, torch.rand(6, 3, 3, 3))),
        (F.conv2d, (x, torch.rand(6, 4, 30, 3))),
        (F.batch_norm, (x, torch.rand(5), torch.rand(5))),
        (F.layer_norm, (rows, (9,))),
        (torch.matmul, (x, x)),
        (torch.add, (x, torch.rand(3))),
        (torch.cat, ([x, rows],)),
        (F.embedding, (rows, torch.rand(5, 4))),
        (F.max_pool2d, (x, 30)),
        (torch.add, (x, half)),
        (torch.Tensor.add_, (x.clone(), torch.rand(5, 2, 4, 9, 7))),
        (F.adaptive_avg_pool2d, (x, (3, None))),
        (F.max_pool2d, (x, 2, 0)),
        (F.conv2d, (x, torch.rand(6, 4, 3, 3), None, 0)),
        (F.softmax, (x, 4)),
        (F.dropout, (x, 2.0)),
        (torch.cat, ([x, y], 4)),
        (F.layer_norm, (rows, ())),
        (F.embedding, (indices, torch.rand(5, 4), 7)),
        (torch.exp, (torch.rand(0, 3),)),
    ],
)
def test_what_is_wrong_or_unusual_is_left_to_torch(function, args):
    assert shaped(function.__name__, to_meta(args), {}) is NotImplemented


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.LSTM(8, 4, 2, bidirectional=True, batch_first=True), (3, 5, 8)),
        (nn.MultiheadAttention(8, 2, batch_first=True), ((3, 5, 8),) * 3),
        (nn.MultiheadAttention(8, 2), ((3, 5, 8), (4, 5, 8), (4, 5, 8))),
        (nn.TransformerEncoderLayer(8, 2, 16), (3, 5, 8)),
    ],
)
def test_layers_agree_with_a_real_run(model, shape):
    shapes = shape if isinstance(shape[0], tuple) else (shape,)
    found = run(model, shape)
    with forked_random(), torch.no_grad():
        real = model(*(torch.rand(each) for each in shapes))
    flat = [real] if isinstance(real, torch.Tensor) else [real[0], *(real[1] if type(real[1]) is tuple else [real[1]])]
    assert found.outputs[""] == tuple(tuple(each.shape) for each in flat)


def test_a_process_with_torch_alone_imports_nothing_more():
    code = """
import sys, torch
torch.zeros(1, device="meta")
print('sympy' in sys.modules)
from torch import nn
from modsurg.tracing.trace import run
conv = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 2))
assert run(conv, (2, 3, 8, 8)).failure is None
assert run(nn.TransformerEncoderLayer(8, 2), (3, 5, 8)).failure is None
assert run(nn.TransformerEncoderLayer(8, 2).eval(), (3, 5, 8)).failure is None
print('sympy' in sys.modules, 'torch._dynamo' in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, sympy, dynamo = done.stdout.split()
    assert (sympy, dynamo) == (before, "False")  # an old torch imports sympy for its own tensors on meta
