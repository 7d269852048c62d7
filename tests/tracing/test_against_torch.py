"""A run on meta against real runs: random operations with random arguments, wrong ones above all.

The examples are always the same ones: what a kernel of the CPU alone refuses is not a fault of the run on meta.
"""

import warnings

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from modsurg.tracing.shape_rules import _RULES, shaped
from modsurg.tracing.trace import run

small, number = st.integers(-1, 5), st.sampled_from([0, 1, 2.0, True, -1])
pair = small | st.tuples(small, small)
dtypes = st.sampled_from([torch.float32] * 6 + [torch.float16, torch.float64, torch.int64, torch.bool])
dim = st.integers(-5, 5)


to_five = st.integers(0, 5)


@st.composite
def tensors(draw, dims=to_five):
    shape = draw(st.lists(st.sampled_from([1, 2, 2, 3, 4, 4, 4]), min_size=(n := draw(dims)), max_size=n))
    made = torch.ones(shape, dtype=draw(dtypes))
    if n > 1 and draw(st.integers(0, 4)) == 0:
        made = made.transpose(0, -1)
    if n > 1 and draw(st.integers(0, 9)) == 0:
        made = made[:, :1].expand(made.shape)
    return made


def images(n=4):
    return tensors(st.sampled_from([n] * 8 + [n - 1, n + 1]))


def maybe(strategy):
    return st.none() | strategy


vector = tensors(st.just(1))
sizes = st.lists(small, max_size=2) | small
ARGUMENTS = {
    F.relu: (tensors(), st.booleans()),
    F.relu6: (tensors(), st.booleans()),
    F.silu: (tensors(),),
    F.hardswish: (tensors(), st.booleans()),
    F.hardsigmoid: (tensors(), st.booleans()),
    F.gelu: (tensors(),),
    torch.sigmoid: (tensors(),),
    torch.tanh: (tensors(),),
    torch.rsqrt: (tensors(),),
    torch.exp: (tensors(),),
    torch.clamp: (tensors(), number, number),
    F.hardtanh: (tensors(), number, number, st.booleans()),
    F.leaky_relu: (tensors(), number),
    F.dropout: (tensors(), st.sampled_from([0.5, 1, 2.0, -1.0]), st.booleans(), st.booleans()),
    torch.softmax: (tensors(), dim),
    torch.mean: (tensors(), st.lists(dim, max_size=3) | dim, st.booleans()),
    torch.sum: (tensors(), st.lists(dim, max_size=3)),
    torch.add: (tensors(), tensors() | number),
    torch.sub: (tensors(), tensors() | number),
    torch.Tensor.div: (tensors(), tensors() | number),
    torch.Tensor.__rsub__: (tensors(), tensors() | number),
    torch.Tensor.mul_: (tensors(), tensors() | number),
    torch.Tensor.__iadd__: (tensors(), tensors() | number),
    torch.matmul: (tensors(), tensors()),
    torch.bmm: (tensors(st.just(3)), tensors(st.just(3))),
    F.linear: (tensors(), tensors(st.sampled_from([2, 2, 2, 1, 3])), maybe(vector)),
    F.conv1d: (images(3), images(3), maybe(vector), small, small, small, small),
    F.conv2d: (images(), images(), maybe(vector), pair, pair, pair, small),
    F.max_pool2d: (images().map(torch.Tensor.float), pair, maybe(pair), pair, pair, st.booleans()),
    F.avg_pool2d: (images().map(torch.Tensor.float), pair, maybe(pair), pair, st.booleans()),
    F.adaptive_avg_pool2d: (images(), pair | st.tuples(st.none(), small)),
    F.batch_norm: (tensors(), maybe(vector), maybe(vector), maybe(vector), maybe(vector), st.booleans()),
    F.layer_norm: (tensors(), st.lists(st.sampled_from([2, 4, 0]), max_size=3), maybe(vector), maybe(vector)),
    F.group_norm: (images(), small, maybe(vector), maybe(vector)),
    F.embedding: (tensors(), tensors(st.sampled_from([2, 2, 1])), maybe(dim)),
    torch.cat: (st.lists(tensors(st.sampled_from([2, 2, 2, 1])), max_size=3), dim),
    torch.stack: (st.lists(tensors(st.just(2)), max_size=3), dim),
    torch.permute: (tensors(), st.lists(dim, max_size=4)),
    torch.transpose: (tensors(), dim, dim),
    torch.flatten: (tensors(), dim, dim),
    torch.reshape: (tensors(), st.lists(small, max_size=3)),
    torch.squeeze: (tensors(), dim),
    torch.unsqueeze: (tensors(), dim),
    torch.chunk: (tensors(), small, dim),
    F.pad: (tensors(), st.lists(small, max_size=4)),
    F.scaled_dot_product_attention: (images(), images(), images(), maybe(images()), st.just(0.0), st.booleans()),
}


def on_meta(value):
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return type(value)(map(on_meta, value)) if isinstance(value, (list, tuple)) else value


def outcome(function, args):
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            out = function(*args)
        except Exception:
            return None
    return [(tuple(each.shape), each.dtype) for each in (out if isinstance(out, (tuple, list)) else [out])]


@st.composite
def calls(draw, functions=tuple(ARGUMENTS)):
    function = draw(st.sampled_from(functions))
    return function, [draw(each) for each in ARGUMENTS[function]]


class Calling(nn.Module):
    def __init__(self, function, args):
        super().__init__()
        self.function, self.args = function, args

    def forward(self):
        out = self.function(*self.args)
        self.dtypes = [each.dtype for each in (out if isinstance(out, (tuple, list)) else [out])]
        return out


RULED = tuple(function for function in ARGUMENTS if function.__name__ in _RULES)


@given(calls(RULED))
@settings(max_examples=1000, deadline=None, derandomize=True)
def test_a_rule_says_what_torch_does(call):
    function, args = call
    virtual = on_meta(args)
    with torch.no_grad():
        told = shaped(function.__name__, virtual, {})
    if told is NotImplemented:
        return
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        real = function(*args)
    assert (told.shape, told.dtype, told.is_meta) == (real.shape, real.dtype, True)
    if function is not F.scaled_dot_product_attention:  # whose strides depend on the kernel
        sizes = [(a, b) for a, b, size in zip(told.stride(), real.stride(), real.shape, strict=True) if size > 1]
        assert all(a == b for a, b in sizes)


@given(calls())
@settings(max_examples=500, deadline=None, derandomize=True)
def test_a_run_fails_where_a_real_one_fails(call):
    function, args = call
    expected = outcome(function, args)
    found = run(Calling(function, args), {})
    if found.note:
        return  # it says that it could not be run
    if expected is None:
        assert found.failure is not None, (function, args)
    else:
        assert found.failure is None, found.failure
        assert [shape for shape, _ in expected] == list(found.outputs[""])


def test_every_rule_is_tried():
    by_hand = {"conv3d", "multi_head_attention_forward", "arange"}
    same = {"__matmul__", "__radd__", "__rmul__", "__rtruediv__", "div", "mul", "add_", "sub_", "div_", "__imul__"}
    assert _RULES.keys() - {each.__name__ for each in RULED} <= by_hand | same
