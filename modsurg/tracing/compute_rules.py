"""Operations that compute: products, norms, sums over dimensions, pooling, attention."""

from math import prod

import torch

from modsurg.tracing.channel_op import Dims, Op, Rule, UnknownOperationError, cut, plain, plain_dims, pointwise
from modsurg.tracing.labels import Dim, Factor, labelled


def _embedding(op: Op) -> Dims:
    return [*op.given(1), op.given(0)[1]]


def contract(op: Op, a: int, b: int, dim_a: Dim, dim_b: Dim) -> None:
    """Sum over a dimension that two arguments share: one of them is a parameter, or channels are mixed here."""
    if not labelled(dim_a) or not labelled(dim_b):
        op.labels.fix(dim_a)
        op.labels.fix(dim_b)
    read = [dim for n, dim in ((a, dim_a), (b, dim_b)) if id(op.args[n]) in op.weights]
    op.labels.read.update(id(factor.ids) for dim in read for factor in dim)
    if not read:
        op.labels.span([dim_a, dim_b], "a product of activations")
    op.labels.unify(dim_a, dim_b)


def _mm(op: Op) -> Dims:
    return _product(op, 0, 1)


def _product(op: Op, first: int, second: int) -> Dims:
    a, b = op.given(first), op.given(second)
    contract(op, first, second, a[-1], b[-2])
    batch = [op.labels.unify(one, two) for one, two in zip(a[:-2], b[:-2], strict=True)]
    for dim in batch:
        op.labels.heads += [f.ids for f in dim if f.ids is not None]
    return [*batch, a[-2], b[-1]]


def _addmm(op: Op) -> Dims:
    dims = _product(op, 1, 2)
    for dim, mine in zip(reversed(op.given(0)), reversed(dims), strict=False):
        if prod(f.size for f in mine) == prod(f.size for f in dim):
            op.labels.unify(mine, dim)
    return dims


def _mv(op: Op) -> Dims:
    a, b = op.given(0), op.given(1)
    contract(op, 0, 1, a[-1], b[-1])
    return a[:-1]


def _convolution(op: Op) -> Dims:
    x, weight = op.given(0), op.given(1)
    transposed, groups = op.args[6], op.args[8]
    labels = op.labels
    for dim in (*x[2:], *weight[2:]):
        labels.fix(dim)
    first, second = weight[:2]
    if groups == 1:
        contract(op, 0, 1, x[1], first if transposed else second)
        out = second if transposed else first
    elif transposed:
        if prod(f.size for f in second) != 1:
            raise UnknownOperationError
        contract(op, 0, 1, x[1], first)
        out = x[1]
    else:
        out = _grouped(op, x[1], first, second, groups)
    if op.has(2):
        labels.unify(out, op.given(2)[0])
    return [x[0], out, *plain_dims(op.out)[2:]]


def _grouped(op: Op, x: Dim, first: Dim, second: Dim, groups: int) -> Dim:
    """A group reads its channels alone, so the groups of the inputs are those of the outputs."""
    labels = op.labels
    ids = labels.flatten(x)
    inputs = Factor(prod(f.size for f in x), ids)
    inside, outside = inputs.size // groups, prod(f.size for f in first) // groups
    if ids is None:
        labels.fix(first)
        labels.fix(second)
        return first
    ins = labels.split(inputs, (groups, inside), whole_groups=True)
    outs = labels.split(first[0], (groups, outside), whole_groups=True)
    labels.unify(ins[:1], outs[:1])
    if inside > 1:
        contract(op, 0, 1, ins[1:], second)
    else:
        labels.fix(second)
    return first


def _batch_norm(op: Op) -> list[Dims]:
    dims = op.given(0)
    for each in op.args[1:5]:
        if isinstance(each, torch.Tensor):
            dims[1] = op.labels.unify(dims[1], op.dims(each)[0])
    return [dims]


def _layer_norm(op: Op) -> list[Dims]:
    dims, shape = op.given(0), op.args[1]
    for n in (2, 3):
        for at in range(-len(shape), 0) if op.has(n) else ():
            dims[at] = op.labels.unify(dims[at], op.given(n)[at])
    op.labels.span(dims[-len(shape) :], "a norm")
    return [dims]


def _group_norm(op: Op) -> list[Dims]:
    dims, groups = op.given(0), op.args[6]
    for n in (1, 2):
        if op.has(n):
            dims[1] = op.labels.unify(dims[1], op.given(n)[0])
    ids = op.labels.flatten(dims[1])
    if ids is not None and groups > 1:
        parts = op.labels.split(Factor(len(ids), ids), (groups, len(ids) // groups), whole_groups=True)
        op.labels.span([parts[1:]], "a norm")
    else:
        op.labels.span(dims[1:2], "a norm")
    return [dims]


def _softmax(op: Op) -> Dims:
    dims = op.given(0)
    op.labels.span([dims[op.args[1]]] if dims else [], "a softmax")
    return dims


def _reduction(position: int) -> Rule:
    def reduce(op: Op) -> Dims | list[Dims]:
        dims, chosen = op.given(0), op.arg(position, op.kwargs.get("dim"))
        where = range(len(dims)) if chosen is None or chosen == [] else [chosen] if isinstance(chosen, int) else chosen
        gone = {n % len(dims) for n in where} if dims else set()
        op.labels.span([dims[n] for n in gone], f"a {op.name.strip('_')}")
        out = op.out[0] if isinstance(op.out, tuple) else op.out
        kept = out.dim() == len(dims)
        result = [() if n in gone else dim for n, dim in enumerate(dims) if n not in gone or kept]
        return [result] * len(op.out) if isinstance(op.out, tuple) else result

    return reduce


def _over_all(op: Op) -> Dims | list[Dims]:
    """A scan, or a sort, along a dimension that is not one of channels."""
    dims, at = op.given(0), op.arg(1, op.kwargs.get("dim", -1))
    op.labels.span([dims[at]] if dims else [], f"a {op.name}")
    return [dims] * len(op.out) if isinstance(op.out, tuple) else dims


def _topk(op: Op) -> list[Dims]:
    dims, at = op.given(0), op.arg(2, -1)
    op.labels.fix(dims[at])
    dims[at] = plain(op.out[0].shape[at])
    return [dims, dims]


def _spatial(count: int) -> Rule:
    """Pooling and resampling: the last dimensions get another size."""

    def rule(op: Op) -> Dims | list[Dims]:
        dims = op.given(0)
        out = op.out[0] if isinstance(op.out, tuple) else op.out
        for dim in dims[-count:]:
            op.labels.fix(dim)
        result = [*dims[:-count], *plain_dims(out)[-count:]]
        return [result] * len(op.out) if isinstance(op.out, tuple) else result

    return rule


def _glu(op: Op) -> Dims:
    dims, at = op.given(0), op.arg(1, -1)
    half = op.out.shape[at]
    left, right = cut(op, dims[at], 0, half), cut(op, dims[at], half, 2 * half)
    dims[at] = op.labels.unify(left, right)
    return dims


def _attention(op: Op) -> list[Dims]:
    query, key, value = (op.given(n) for n in range(3))
    for at in (0, 1):
        dim = op.labels.unify(op.labels.unify(query[at], key[at]), value[at])
        op.labels.heads += [f.ids for f in dim if f.ids is not None]
    op.labels.unify(query[3], key[3])
    op.labels.unify(key[2], value[2])
    return [[*query[:3], value[3]]]


_BATCH_NORMS = """
    native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm
    _batch_norm_with_update
"""
_SUMS = "mean sum var std var_mean std_mean amax amin max min prod any all logsumexp argmax argmin"
_RESAMPLED = """
    upsample_bilinear2d upsample_bicubic2d _upsample_bicubic2d_aa _upsample_bilinear2d_aa upsample_nearest2d
    _upsample_nearest_exact2d
"""
_POOLS = ("max_pool", "avg_pool", "_adaptive_avg_pool", "adaptive_max_pool", "reflection_pad", "replication_pad")
_ATTENTION = """
    _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention
    _scaled_dot_product_efficient_attention _scaled_dot_product_fused_attention_overrideable
    _scaled_dot_product_attention_math
"""
COMPUTE_RULES: dict[str, Rule] = {
    **dict.fromkeys(["hardswish_", "hardswish", "where", "masked_fill", "masked_fill_", "_prelu_kernel"], pointwise),
    **dict.fromkeys(("mm", "bmm"), _mm),
    **dict.fromkeys(("addmm", "baddbmm"), _addmm),
    **dict.fromkeys(("mv", "dot"), _mv),
    **dict.fromkeys(_BATCH_NORMS.split(), _batch_norm),
    **dict.fromkeys(("_softmax", "_log_softmax", "_safe_softmax"), _softmax),
    **dict.fromkeys(_SUMS.split(), _reduction(1)),
    **dict.fromkeys(("norm", "linalg_vector_norm"), _reduction(2)),
    **dict.fromkeys(("cumsum", "cumprod", "sort", "argsort"), _over_all),
    **{f"{kind}{n}d{tail}": _spatial(n) for kind in _POOLS for n in (1, 2, 3) for tail in ("", "_with_indices")},
    **dict.fromkeys(_RESAMPLED.split(), _spatial(2)),
    **dict.fromkeys(_ATTENTION.split(), _attention),
    "embedding": _embedding,
    "convolution": _convolution,
    "native_layer_norm": _layer_norm,
    "native_group_norm": _group_norm,
    "topk": _topk,
    "glu": _glu,
}
