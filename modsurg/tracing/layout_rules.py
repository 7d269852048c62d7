"""Operations that only move elements: views, slices, concatenations, padding."""

from collections.abc import Sequence
from math import prod

import torch

from modsurg.tracing.channel_op import (
    Dims,
    Op,
    Rule,
    UnknownOperationError,
    broadcast,
    cut,
    has_size,
    plain,
    plain_dims,
)
from modsurg.tracing.labels import Dim, Factor, labelled


def _copy(op: Op) -> Dims:
    into, source = op.args[:2]
    fills = any(map(labelled, op.dims(source))) and not any(map(labelled, op.dims(into)))
    if fills and into.untyped_storage().nbytes() > into.numel() * into.element_size():
        raise UnknownOperationError
    return broadcast(op, [into, source], into.shape)


def _same(op: Op) -> Dims:
    return op.given(0)


def regroup(op: Op, dims: Dims, sizes: Sequence[int]) -> Dims:
    """The dimensions of a tensor that is viewed in another shape."""
    waiting = [factor for dim in dims for factor in dim]
    left = list(sizes)
    result: Dims = []
    while left:
        if left[0] == 1:
            result.append((waiting.pop(0),) if waiting and waiting[0].size == 1 else ())
            left.pop(0)
            continue
        before, after = [waiting.pop(0)], [left.pop(0)]
        while (had := prod(f.size for f in before)) != (has := prod(after)):
            if had < has:
                before.append(waiting.pop(0))
            else:
                after.append(left.pop(0))
        result += _block(op, before, after)
    return result


def _block(op: Op, waiting: list[Factor], sizes: list[int]) -> Dims:
    """Factors and sizes of one product."""
    known = any(factor.ids is not None for factor in waiting)
    fixed = any(factor.fixed for factor in waiting if factor.ids is None)
    result: Dims = []
    for size in sizes:
        taken: list[Factor] = []
        need = size
        while need > 1:
            factor = waiting.pop(0)
            if need % factor.size == 0:
                taken.append(factor)
                need //= factor.size
            elif factor.size % need == 0:
                first, rest = op.labels.split(factor, (need, factor.size // need))
                taken.append(first)
                waiting.insert(0, rest)
                need = 1
            elif known:
                raise UnknownOperationError
            else:
                return [plain(each, fixed) for each in sizes]
        result.append(tuple(taken))
    return result


def _view(op: Op) -> Dims:
    dims, sizes = op.given(0), tuple(op.out.shape)
    if 0 in sizes or (len(dims) == len(sizes) and all(map(has_size, dims, sizes))):
        return dims if 0 not in sizes else plain_dims(op.out)
    return regroup(op, dims, sizes)


def _expand(op: Op) -> Dims:
    dims, sizes = op.given(0), op.out.shape
    dims = [()] * (len(sizes) - len(dims)) + dims
    result: Dims = []
    for dim, size in zip(dims, sizes, strict=True):
        if has_size(dim, size):
            result.append(dim)
        else:
            op.labels.fix(dim)
            result.append(plain(size, fixed=False))
    return result


def _repeat(op: Op) -> Dims:
    dims, repeats = op.given(0), op.args[1]
    dims = [()] * (len(repeats) - len(dims)) + dims
    return [(*plain(n, fixed=False), *dim) for dim, n in zip(dims, repeats, strict=True)]


def _permute(op: Op) -> Dims:
    dims = op.given(0)
    return [dims[n] for n in op.args[1]]


def _transpose(op: Op) -> Dims:
    dims = op.given(0)
    a, b = op.args[1:3]
    if dims:
        dims[a], dims[b] = dims[b], dims[a]
    return dims


def _t(op: Op) -> Dims:
    return op.given(0)[::-1]


def _unsqueeze(op: Op) -> Dims:
    dims = op.given(0)
    dims.insert(op.args[1] % (len(dims) + 1), ())
    return dims


def _squeeze(op: Op) -> Dims:
    dims, shape = op.given(0), op.args[0].shape
    chosen = op.arg(1, range(len(dims)))
    where = {n % len(dims) for n in ([chosen] if isinstance(chosen, int) else chosen)} if dims else set()
    for n in where:
        if shape[n] == 1:
            op.labels.fix(dims[n])
    return [dim for n, dim in enumerate(dims) if n not in where or shape[n] != 1]


def _select(op: Op) -> Dims:
    dims = op.given(0)
    op.picked[id(op.out)] = dims.pop(op.args[1])
    return dims


def _unbind(op: Op) -> list[Dims]:
    dims = op.given(0)
    dim = dims.pop(op.arg(1, 0))
    op.picked.update((id(each), dim) for each in op.out)
    return [list(dims) for _ in op.out]


def _slice(op: Op) -> Dims:
    dims, at = op.given(0), op.arg(1, 0)
    size = op.args[0].shape[at]
    bounds = slice(op.arg(2), op.arg(3), op.arg(4, 1)).indices(size)
    dims[at] = cut(op, dims[at], *bounds)
    return dims


def _split(op: Op) -> list[Dims]:
    at = op.arg(2, op.kwargs.get("dim", 0))
    start = 0
    result = []
    for piece in op.out:
        dims = op.given(0)
        dims[at] = cut(op, dims[at], start, start + piece.shape[at])
        start += piece.shape[at]
        result.append(dims)
    return result


def _cat(op: Op) -> Dims:
    tensors = [each for each in op.args[0] if each.shape != (0,)]
    at = op.arg(1, 0) % op.out.dim()
    every = [list(op.dims(each)) for each in tensors]
    result: Dims = []
    for place in range(op.out.dim()):
        dim: Dim = every[0][place]
        for other in every[1:] if place != at else ():
            dim = op.labels.unify(dim, other[place])
        result.append(dim)
    joined = [dims[at] for dims in every]
    if any(map(labelled, joined)):
        result[at] = (Factor(op.out.shape[at], torch.cat([op.labels.places(dim) for dim in joined])),)
    else:
        result[at] = plain(op.out.shape[at], any(f.fixed for dim in joined for f in dim))
    return result


def _stack(op: Op) -> Dims:
    tensors, at = op.args[0], op.arg(1, 0) % op.out.dim()
    dims = broadcast(op, tensors, tensors[0].shape)
    dims.insert(at, plain(len(tensors)))
    return dims


def _roll(op: Op) -> Dims:
    dims = op.given(0)
    for shift, at in zip(op.args[1], op.arg(2, ()), strict=False):
        if labelled(dims[at]):
            ids = op.labels.flatten(dims[at])
            assert ids is not None
            dims[at] = (Factor(len(ids), torch.roll(ids, shift)),)
    return dims


def _flip(op: Op) -> Dims:
    dims = op.given(0)
    for at in op.args[1]:
        if labelled(dims[at]):
            ids = op.labels.flatten(dims[at])
            assert ids is not None
            dims[at] = (Factor(len(ids), ids.flip(0)),)
    return dims


def _pad(op: Op) -> Dims:
    dims, pad = op.given(0), op.args[1]
    for n in range(len(pad) // 2):
        at, before, after = -1 - n, pad[2 * n], pad[2 * n + 1]
        if before == after == 0:
            continue
        if not labelled(dims[at]):
            dims[at] = plain(op.out.shape[at])
        elif min(before, after) < 0:
            raise UnknownOperationError
        else:
            ids = op.labels.flatten(dims[at])
            assert ids is not None
            new = [op.labels.places(plain(size, fixed=False)) if size else ids[:0] for size in (before, after)]
            dims[at] = (Factor(op.out.shape[at], torch.cat([new[0], ids, new[1]])),)
    return dims


def _index(op: Op) -> Dims:
    dims, indices = op.given(0), list(op.args[1])
    used = [n for n, index in enumerate(indices) if index is not None]
    if any(indices[n].dtype in (torch.bool, torch.uint8) for n in used):
        raise UnknownOperationError
    for n in used:
        op.labels.fix(dims[n])
    new = op.out.dim() - (len(dims) - len(used))
    at = used[0] if used == list(range(used[0], used[-1] + 1)) else 0
    left = [dim for n, dim in enumerate(dims) if n not in used]
    sizes = op.out.shape[at : at + new]
    return left[:at] + [plain(size) for size in sizes] + left[at:]


def _index_select(op: Op) -> Dims:
    dims = op.given(0)
    op.labels.fix(dims[op.args[1]])
    dims[op.args[1]] = plain(op.out.shape[op.args[1]])
    return dims


def _gather(op: Op) -> Dims:
    dims, at = op.given(0), op.args[1]
    op.labels.fix(dims[at])
    for n, (dim, size) in enumerate(zip(dims, op.out.shape, strict=True)):
        if not has_size(dim, size):
            op.labels.fix(dim)
            dims[n] = plain(size)
    dims[at] = plain(op.out.shape[at])
    return dims


def _pixel_shuffle(op: Op) -> Dims:
    dims, r = op.given(0), op.args[1]
    channels, place = op.labels.split(_single(op, dims[-3]), (op.out.shape[-3], r * r))
    op.labels.fix((place,))
    return [*dims[:-3], (channels,), *plain_dims(op.out)[-2:]]


def _pixel_unshuffle(op: Op) -> Dims:
    dims, r = op.given(0), op.args[1]
    return [*dims[:-3], (*dims[-3], *plain(r * r)), *plain_dims(op.out)[-2:]]


def _channel_shuffle(op: Op) -> Dims:
    dims, groups = op.given(0), op.args[1]
    outer, inner = op.labels.split(_single(op, dims[1]), (groups, op.out.shape[1] // groups))
    return [dims[0], (inner, outer), *dims[2:]]


def _single(op: Op, dim: Dim) -> Factor:
    ids = op.labels.flatten(dim)
    return Factor(prod(f.size for f in dim), ids)


def _unfold(op: Op) -> Dims:
    dims, at = op.given(0), op.args[1]
    op.labels.fix(dims[at])
    return [*dims[:at], plain(op.out.shape[at]), *dims[at + 1 :], plain(op.args[2])]


def _im2col(op: Op) -> Dims:
    dims = op.given(0)
    return [*dims[:-3], (*dims[-3], *plain(prod(op.args[1]))), plain(op.out.shape[-1])]


def _diagonal(op: Op) -> Dims:
    for dim in op.given(0):
        op.labels.fix(dim)
    return plain_dims(op.out)


def _new(op: Op) -> Dims:
    return plain_dims(op.out, fixed=False)


_SAME = """
    clone detach alias lift_fresh contiguous _to_copy dropout dropout_ tril triu tril_ triu_ fill_ zero_ uniform_
    normal_ bernoulli_ bernoulli fill zeros_like ones_like empty_like full_like rand_like randn_like as_strided_
"""
LAYOUT_RULES: dict[str, Rule] = {
    **dict.fromkeys(_SAME.split(), _same),
    **dict.fromkeys(("new_zeros", "new_ones", "new_full", "new_empty"), _new),
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias"), _view),
    **dict.fromkeys(("split", "split_with_sizes"), _split),
    **dict.fromkeys(("channel_shuffle", "native_channel_shuffle"), _channel_shuffle),
    **dict.fromkeys(("copy_", "copy"), _copy),
    "native_dropout": lambda op: [op.given(0), op.given(0)],
    "expand": _expand,
    "repeat": _repeat,
    "permute": _permute,
    "transpose": _transpose,
    "t": _t,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "select": _select,
    "unbind": _unbind,
    "slice": _slice,
    "cat": _cat,
    "stack": _stack,
    "roll": _roll,
    "flip": _flip,
    "constant_pad_nd": _pad,
    "index": _index,
    "index_select": _index_select,
    "gather": _gather,
    "pixel_shuffle": _pixel_shuffle,
    "pixel_unshuffle": _pixel_unshuffle,
    "unfold": _unfold,
    "im2col": _im2col,
    "diagonal": _diagonal,
}
