"""Multiply-adds of the torch functions that a forward calls.

One multiply-add is one MAC (two FLOPs). Products of matrices count, however they are called: convolutions, linear
layers, attention, recurrent cells, einsum. Biases, norms, activations and other elementwise work do not; causal
attention counts whole, as if nothing were masked.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from modsurg.tracing.functorch import count_mapped


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a torch function: its name, what went in and what came out."""

    name: str
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    out: Any

    def get(self, index: int, name: str) -> Any:
        """The argument at a position, or by name; None where it was left out."""
        return self.args[index] if len(self.args) > index else self.kwargs.get(name)

    def tensor(self, index: int, name: str) -> torch.Tensor:
        """An argument that must be there."""
        value = self.get(index, name)
        assert isinstance(value, torch.Tensor), f"{self.name} was called without {name}"
        return value

    @property
    def size(self) -> int:
        """Number of elements of the first tensor that came out."""
        out = self.out[0] if isinstance(self.out, (tuple, list)) else self.out
        return int(out.numel())


def count(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
    """Multiply-adds of one call; 0 for a function that is not a product.

    Args:
        name: The function's `__name__`, as a torch function mode sees it.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        out: What it returned.

    Example:
        >>> a, b = torch.ones(2, 3), torch.ones(3, 4)
        >>> count("matmul", (a, b), {}, a @ b)
        24
    """
    rule = RULES.get(name)
    return rule(Call(name, args, kwargs, out)) * count_mapped((*args, *kwargs.values())) if rule else 0


def _product(call: Call) -> int:
    left = call.tensor(0, "input")
    if left.layout is torch.strided or call.out.layout is not torch.strided:
        return call.size * int(left.size(-1))
    there = left._nnz() if left.layout is torch.sparse_coo else left.values().numel()
    return int(there) * int(call.out.size(-1))  # of a sparse matrix only what is there is multiplied


def _reflected_product(call: Call) -> int:
    return call.size * int(call.tensor(1, "other").shape[-1])


def _added_product(call: Call) -> int:
    left, right = call.tensor(1, "batch1" if "bmm" in call.name else "mat1"), call.get(2, "mat2")
    if right is None:
        right = call.kwargs.get("batch2", call.kwargs.get("vec"))
    return int(left.numel()) * (int(right.shape[-1]) if right.dim() > 1 else 1)


def _covariance(call: Call) -> int:
    x = call.tensor(0, "input")
    return call.size * int(x.shape[-1])


def _matrix_power(call: Call) -> int:
    """By squaring, as torch does it; a negative power inverts the matrix first, which is not counted."""
    x, n = call.tensor(0, "input"), abs(int(call.get(1, "n")))
    products = max(n.bit_length() - 1, 0) + max(n.bit_count() - 1, 0)
    return products * int(x.numel()) * int(x.shape[-1])


def _vector_product(call: Call) -> int:
    return int(call.tensor(0, "input").numel())


def _vecdot(call: Call) -> int:
    left, right = call.tensor(0, "x"), call.tensor(1, "y")
    return int(prod(torch.broadcast_shapes(left.shape, right.shape)))  # type: ignore[no-untyped-call]  # torch's own


def _tensordot(call: Call) -> int:
    left, right = call.tensor(0, "a"), call.tensor(1, "b")
    free = prod(left.shape) * prod(right.shape)
    contracted = free // max(call.size, 1)
    return int(call.size * round(contracted**0.5))


def _multi_dot(call: Call) -> int:
    tensors = call.args[0] if isinstance(call.args[0], (tuple, list)) else call.args
    total, left = 0, [1, *tensors[0].shape][-2:]
    for right in tensors[1:]:
        columns = right.shape[-1] if right.dim() > 1 else 1
        total += left[0] * left[1] * columns
        left = [left[0], columns]
    return total


def _convolution(call: Call) -> int:
    weight = call.get(1, "weight")
    if not isinstance(weight, torch.Tensor):  # quantised: packed into an object of its own
        weight = weight.weight() if hasattr(weight, "weight") else weight.unpack()[0]
    return call.size * int(weight[0].numel())


def _any_convolution(call: Call) -> int:
    transposed = call.get(6, "transposed")
    return _transposed_convolution(call) if transposed else _convolution(call)


def _convolution_over_time(call: Call) -> int:
    width, channels, _ = call.tensor(1, "weight").shape
    return call.size * int(width) * int(channels)


def _transposed_convolution(call: Call) -> int:
    return int(call.tensor(0, "input").numel()) * int(call.tensor(1, "weight")[0].numel())


def _bilinear(call: Call) -> int:
    first, weight = call.tensor(0, "input1"), call.tensor(2, "weight")
    return int(first.numel()) // int(first.shape[-1]) * int(weight.numel())


def _attention(call: Call) -> int:
    query, key, value = call.tensor(0, "query"), call.tensor(1, "key"), call.tensor(2, "value")
    rows = call.size // max(int(value.shape[-1]), 1)
    return rows * int(key.shape[-2]) * int(query.shape[-1] + value.shape[-1])


def _multi_head_attention(call: Call) -> int:
    query, key, value = call.tensor(0, "query"), call.tensor(1, "key"), call.tensor(2, "value")
    width = int(query.shape[-1])
    batch = int(query.shape[1]) if query.dim() == 3 else 1
    projected = int(query.numel() + key.numel() + value.numel()) * width
    extra = (call.get(7, "bias_k") is not None) + bool(call.get(9, "add_zero_attn"))
    attended = 2 * batch * int(query.shape[0]) * (int(key.shape[0]) + extra) * width
    return projected + attended + int(query.numel()) * width


def _recurrent(call: Call) -> int:
    data = call.tensor(0, "input")
    weights = next(item for item in call.args if _is_weights(item))
    steps = int(data.numel()) // int(data.shape[-1])
    return steps * sum(int(weight.numel()) for weight in weights if weight.dim() == 2)


def _is_weights(item: object) -> bool:
    """Weights are matrices and vectors; the hidden state, the other sequence among the arguments, has 3 dimensions."""
    return isinstance(item, (list, tuple)) and all(isinstance(each, torch.Tensor) and each.dim() <= 2 for each in item)


def _recurrent_layer(call: Call) -> int:
    data = call.tensor(0, "input")
    rows = int(data.numel()) // int(data.shape[-1])
    return rows * int(call.tensor(1, "weight0").numel() + call.tensor(2, "weight1").numel())


def _recurrent_cell(call: Call) -> int:
    data = call.tensor(0, "input")
    rows = int(data.numel()) // int(data.shape[-1])
    return rows * int(call.tensor(2, "w_ih").numel() + call.tensor(3, "w_hh").numel())


def _einsum(call: Call) -> int:
    equation, *operands = call.args
    if not isinstance(equation, str):
        equation, operands = _from_sublists(call.args)
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    left, _, out = equation.replace(" ", "").partition("->")
    if "->" not in equation:
        letters = left.replace(",", "").replace("...", "")
        out = "..." + "".join(sorted(letter for letter in set(letters) if letters.count(letter) == 1))
    terms, sizes = _labelled(left.split(","), operands)
    return _contraction(terms, sizes, set(out.replace("...", "")) | {label for label in sizes if len(label) > 1})


def _labelled(terms: list[str], operands: Sequence[torch.Tensor]) -> tuple[list[set[str]], dict[str, int]]:
    """The labels of each operand, and the size of each label; dimensions under `...` are labelled from the right."""
    found: list[set[str]] = []
    sizes: dict[str, int] = {}
    for term, operand in zip(terms, operands, strict=True):
        before, _, after = term.partition("...")
        hidden = operand.dim() - len(before) - len(after)
        labels = [*before, *(f"dim{index}" for index in range(hidden, 0, -1)), *after]
        for label, size in zip(labels, operand.shape, strict=True):
            sizes[label] = max(sizes.get(label, 1), int(size))
        found.append(set(labels))
    return found, sizes


def _contraction(terms: list[set[str]], sizes: dict[str, int], kept: set[str]) -> int:
    """Pairwise from the left; a pair that sums over no common label is elementwise and counts nothing."""
    total, left = 0, terms[0]
    for index, right in enumerate(terms[1:], start=2):
        later = kept.union(*terms[index:])
        alone_left, alone_right = left - right - later, right - left - later
        left, right = left - alone_left, right - alone_right
        together = left | right
        if (left & right) - later:
            total += prod(sizes[label] for label in together)
        left = together & later
    return total


def _from_sublists(args: Sequence[Any]) -> tuple[str, list[torch.Tensor]]:
    def letters(sublist: Sequence[Any]) -> str:
        return "".join("..." if item is Ellipsis else chr(ord("A") + item + 6 * (item > 25)) for item in sublist)

    pairs = len(args) // 2
    terms = [letters(args[2 * index + 1]) for index in range(pairs)]
    out = "->" + letters(args[-1]) if len(args) % 2 else ""
    return ",".join(terms) + out, [args[2 * index] for index in range(pairs)]


RULES: dict[str, Callable[[Call], int]] = {
    **dict.fromkeys(("matmul", "__matmul__", "linalg_matmul", "mm", "bmm", "linear", "inner"), _product),
    **dict.fromkeys(("_int_mm", "scaled_mm", "_scaled_mm", "hspmm", "smm", "spmm", "dsmm", "_sparse_mm"), _product),
    **dict.fromkeys(("grouped_mm", "_grouped_mm", "scaled_grouped_mm", "_scaled_grouped_mm"), _product),
    **dict.fromkeys(("linear_dynamic", "linear_relu", "linear_relu_dynamic"), _product),
    "__rmatmul__": _reflected_product,
    **dict.fromkeys(("cov", "corrcoef"), _covariance),
    **dict.fromkeys(("matrix_power", "linalg_matrix_power"), _matrix_power),
    **dict.fromkeys(("addmm", "addmm_", "addbmm", "addbmm_", "baddbmm", "baddbmm_", "addmv", "addmv_"), _added_product),
    **dict.fromkeys(("mv", "dot", "vdot"), _vector_product),
    "vecdot": _vecdot,
    "linalg_vecdot": _vecdot,
    "tensordot": _tensordot,
    "multi_dot": _multi_dot,
    "linalg_multi_dot": _multi_dot,
    "chain_matmul": _multi_dot,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "conv2d_relu", "conv3d_relu", "deform_conv2d"), _convolution),
    **dict.fromkeys(("convolution", "_convolution"), _any_convolution),
    "conv_tbc": _convolution_over_time,
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _transposed_convolution),
    "bilinear": _bilinear,
    **dict.fromkeys(("scaled_dot_product_attention", "flex_attention"), _attention),
    "multi_head_attention_forward": _multi_head_attention,
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _recurrent),
    **dict.fromkeys(("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"), _recurrent_cell),
    "mkldnn_rnn_layer": _recurrent_layer,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "einsum": _einsum,
}
