"""The tensors of a tree: which there are, under which names, and which share memory with which.

A tensor of the state_dict has its name there. Another one (a buffer that is not persistent, a tensor kept as a
plain attribute) is written into the tree itself where it is small, and beside the weights under a name of its own where
it is not.
"""

import base64
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from modsurg.errors import FormatError
from modsurg.structure.schema import BESIDE

_INLINE = 64 << 10
_INLINE_UNPACKED = 4 << 20
_INLINE_TOTAL = 64 << 20
_INLINE_ALWAYS = 1 << 20


class TensorTable:
    """Numbers the tensors of one tree in the order in which they are met.

    Args:
        names: The name in the state_dict of each tensor that has one, by `id`.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        self.tensors: list[torch.Tensor] = []
        self.problems: list[str] = []
        self._names = names
        self._numbers: dict[int, int] = {}
        self._places: list[str] = []

    def number(self, tensor: torch.Tensor, path: str) -> int:
        """The number of a tensor; `path` says where it stands, should it be one that can't be kept."""
        number = self._numbers.get(id(tensor))
        if number is None:
            number = self._numbers[id(tensor)] = len(self.tensors)
            self.tensors.append(tensor)
            self._places.append(path)
            problem = _problem(tensor)
            if problem:
                self.problems.append(f"{path}  {problem}")
        return number

    def entries(self) -> list[dict[str, Any]]:
        """What the file says of each tensor, besides its values."""
        entries = [_entry(tensor, self._names.get(id(tensor))) for tensor in self.tensors]
        self._find_views(entries)
        self._place_beside(entries)
        return entries

    def _place_beside(self, entries: list[dict[str, Any]]) -> None:
        room = _inline_room(entries)
        for number, (tensor, entry) in enumerate(zip(self.tensors, entries, strict=True)):
            if "name" in entry or "of" in entry or tensor.is_meta:
                continue
            if tensor.nbytes <= min(room, _INLINE_UNPACKED):
                packed = base64.b64encode(zlib.compress(_bytes(tensor), 1)).decode()
                if len(packed) <= _INLINE:
                    entry["data"] = packed
                    room -= tensor.nbytes
                    continue
            entry["name"] = f"{BESIDE}{number}"

    def _find_views(self, entries: list[dict[str, Any]]) -> None:
        """Say of a tensor that lies inside another one's memory where it lies."""
        storages: dict[tuple[torch.device, int], list[int]] = {}
        for number, tensor in enumerate(self.tensors):
            if tensor.numel() and not tensor.is_meta:
                storages.setdefault((tensor.device, tensor.untyped_storage().data_ptr()), []).append(number)
        for group in storages.values():
            if len(group) > 1:
                self._find_views_in(sorted(group, key=self._place), entries)

    def _place(self, number: int) -> tuple[int, int, int]:
        """Orders tensors so that one that holds others comes before them."""
        tensor = self.tensors[number]
        return tensor.data_ptr(), -_extent(tensor), number

    def _find_views_in(self, group: list[int], entries: list[dict[str, Any]]) -> None:
        base, end = group[0], 0
        for number in group:
            inner, outer = self.tensors[number], self.tensors[base]
            offset = inner.data_ptr() - outer.data_ptr()
            if inner.data_ptr() >= end:
                base, end = number, inner.data_ptr() + _extent(inner)
            elif _same_place(inner, outer):
                entries[number].update(of=base, offset=0)
            elif _fits(inner, outer, offset):
                stride = list(inner.stride())
                entries[number].update(of=base, offset=offset // inner.element_size(), stride=stride)
            else:
                places = f"{self._places[number]}  shares only a part of its memory with {self._places[base]}"
                self.problems.append(f"{places}: clone one")


def make_tensors(entries: Sequence[Mapping[str, Any]], values: Mapping[str, torch.Tensor] | None) -> list[torch.Tensor]:
    """Make the tensors of a tree.

    Args:
        entries: What `TensorTable.entries` gave.
        values: The stored tensors by name, used as they are; None makes empty ones on the meta device.

    Raises:
        FormatError: A tensor is missing or of another shape than the tree says, or its dtype is of another kind; a file
            that was converted to another floating dtype is used unchanged.
    """
    if values is not None:
        check_within(entries)
    elif sum(_nbytes(entry) for entry in entries if "data" in entry) > _INLINE_ALWAYS:
        entries = [{key: value for key, value in entry.items() if key != "data"} for entry in entries]
    made = [torch.empty(0) if "of" in entry else _stored(entry, values) for entry in entries]
    for number, entry in enumerate(entries):
        if "of" in entry:
            made[number] = _view(entry, made[entry["of"]])
    return [_finished(tensor, entry) for tensor, entry in zip(made, entries, strict=True)]


def check_within(entries: Sequence[Mapping[str, Any]]) -> None:
    """Check that a file does not unpack to many of its size.

    The tensors in the tree itself take no more room than a writer gives them, and none is copied into other strides
    twice.

    Raises:
        FormatError: They do, or one is.
    """
    copied = [entry["name"] for entry in entries if "name" in entry and "stride" in entry and "of" not in entry]
    if len(copied) > len(set(copied)):
        raise FormatError("a tensor of the file is named twice, each time with strides of its own")
    room = _inline_room(entries)
    if sum(_nbytes(entry) for entry in entries if "data" in entry) > room:
        raise FormatError(f"the tensors inside the tree take more than {room:,} bytes, as many as those beside it")


def _inline_room(entries: Sequence[Mapping[str, Any]]) -> int:
    """How many bytes the tensors inside the tree may take: no more than the file has in the others."""
    stored = {entry["name"]: _nbytes(entry) for entry in entries if "name" in entry and "of" not in entry}
    return min(_INLINE_TOTAL, _INLINE_ALWAYS + sum(stored.values()))


def within(entry: Mapping[str, Any]) -> torch.Tensor:
    """A tensor whose values are in the tree itself; on meta where they are in another one's, or nowhere."""
    return _stored(entry, None)


def _problem(tensor: torch.Tensor) -> str | None:
    """Why this tensor can't be kept."""
    if is_lazy(tensor):
        return "has no shape yet: run the model once, so that its lazy layers are filled"
    if tensor.is_quantized or tensor.is_nested or tensor.layout is not torch.strided:
        what = "quantized" if tensor.is_quantized else "nested" if tensor.is_nested else str(tensor.layout)
        return f"is a {what} tensor, which a state_dict file can't hold: dequantize it or make it dense"
    if type(tensor) not in (torch.Tensor, nn.Parameter):
        return f"is a {type(tensor).__qualname__}: turn it into a plain tensor, tensor.as_subclass(torch.Tensor)"
    hooks = [
        *(tensor._backward_hooks or {}).values(),
        *(getattr(tensor, "_post_accumulate_grad_hooks", None) or {}).values(),
    ]
    if any(not getattr(hook, "__torch_unserializable__", False) for hook in hooks):
        return "has a hook: remove it, and register it again after loading"
    return None


def _entry(tensor: torch.Tensor, name: str | None) -> dict[str, Any]:
    entry: dict[str, Any] = {} if name is None else {"name": name}
    entry.update(dtype=str(tensor.dtype)[6:], shape=list(tensor.shape))
    parameter = isinstance(tensor, nn.Parameter)
    if parameter:
        entry["parameter"] = True
    if tensor.requires_grad is not parameter and tensor.is_leaf:
        entry["requires_grad"] = tensor.requires_grad
    if tensor.layout is torch.strided and not tensor.is_contiguous() and _is_dense(tensor.shape, tensor.stride()):
        entry["stride"] = list(tensor.stride())
    return entry


def _stored(entry: Mapping[str, Any], values: Mapping[str, torch.Tensor] | None) -> torch.Tensor:
    shape, dtype, stride = entry["shape"], dtype_named(entry["dtype"]), entry.get("stride")
    if "data" in entry:
        value = _unpacked(entry, dtype)
    elif values is None or "name" not in entry:  # a tensor on meta has no values
        value = torch.empty(shape, dtype=dtype, device="meta")
    elif entry["name"] not in values:
        raise FormatError(f"the file has no tensor {entry['name']!r:.80}, which the tree names")
    else:
        value = values[entry["name"]]
    converted = value.dtype is not dtype and value.is_floating_point() and dtype.is_floating_point
    if not (value.dtype is dtype or converted) or list(value.shape) != shape:
        raise FormatError(
            f"{entry['name']!r:.80} is {value.dtype} {list(value.shape)} in the file, {dtype} {shape} in the tree"
        )
    if stride is None:
        return value
    if len(stride) != len(shape) or not all(type(step) is int for step in stride) or not _is_dense(shape, stride):
        raise FormatError(f"strides {stride!r:.80} of a tensor {shape!r:.80}")
    strided = torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)
    return strided if strided.is_meta else strided.copy_(value)


def _unpacked(entry: Mapping[str, Any], dtype: torch.dtype) -> torch.Tensor:
    size = _nbytes(entry)
    try:
        data = zlib.decompressobj().decompress(base64.b64decode(entry["data"]), size + 1)
    except zlib.error as error:
        raise FormatError(f"a tensor inside the tree is damaged: {error}") from None
    if len(data) != size:
        raise FormatError(f"a tensor inside the tree has {len(data)} bytes instead of {size}")
    flat = torch.frombuffer(bytearray(data), dtype=dtype) if size else torch.empty(0, dtype=dtype, device="cpu")
    return flat.reshape(entry["shape"])


def _view(entry: Mapping[str, Any], base: torch.Tensor) -> torch.Tensor:
    dtype, shape, offset = dtype_named(entry["dtype"]), entry["shape"], entry["offset"]
    if "stride" not in entry:
        return base.detach()
    stride, storage = entry["stride"], base.untyped_storage()
    if min([offset, *shape, *stride]) < 0 or len(shape) != len(stride):
        raise FormatError("a negative size")
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if (last + 1) * dtype.itemsize > storage.nbytes():
        raise FormatError("a tensor that reaches out of the memory of the one it lies in")
    if math.prod(shape) * dtype.itemsize > storage.nbytes():
        raise FormatError("a tensor that repeats the values of the one it lies in")
    return torch.empty(0, dtype=dtype, device=base.device).set_(storage, offset, shape, stride)


def _finished(tensor: torch.Tensor, entry: Mapping[str, Any]) -> torch.Tensor:
    parameter = entry.get("parameter", False)
    requires_grad = entry.get("requires_grad", parameter)
    if parameter:
        return nn.Parameter(tensor, requires_grad)
    return tensor.requires_grad_() if requires_grad else tensor


def dtype_named(name: str) -> torch.dtype:
    """The dtype of a name such as "float32"."""
    dtype = vars(torch).get(name)
    if not isinstance(dtype, torch.dtype):
        raise FormatError(f"{name!r:.40} is not a dtype")
    return dtype


def _nbytes(entry: Mapping[str, Any]) -> int:
    size: int = math.prod(entry["shape"])
    return size * dtype_named(entry["dtype"]).itemsize


def _extent(tensor: torch.Tensor) -> int:
    """How many bytes lie between the first and the last element, both included."""
    steps = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (steps + 1) * tensor.element_size()


def _same_place(a: torch.Tensor, b: torch.Tensor) -> bool:
    same = a.shape == b.shape and a.stride() == b.stride() and a.dtype is b.dtype
    return same and a.data_ptr() == b.data_ptr() and a.is_conj() is b.is_conj() and a.is_neg() is b.is_neg()


def _fits(inner: torch.Tensor, outer: torch.Tensor, offset: int) -> bool:
    inside = offset >= 0 and offset + _extent(inner) <= _extent(outer) and offset % inner.element_size() == 0
    lazy = inner.is_conj() or inner.is_neg() or outer.is_conj() or outer.is_neg()
    return inside and not lazy and _is_dense(outer.shape, outer.stride()) and inner.nbytes <= outer.nbytes


def _is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether the elements fill their memory without gap or overlap, in whatever order."""
    expected = 1
    for step, size in sorted(zip(stride, shape, strict=True)):
        if size != 1:
            if step != expected:
                return False
            expected *= size
    return True


def _bytes(tensor: torch.Tensor) -> bytes:
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().tobytes()
