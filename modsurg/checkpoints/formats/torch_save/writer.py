"""A state as torch.save would write it: anyone opens it with torch.load(path, weights_only=True).

Written tensor by tensor, so that a state need not be in memory; torch.save would want all of it there.
"""

import io
import json
import os
import pickle
import sys
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Final

import torch

from modsurg.checkpoints.formats.atomic import writing
from modsurg.checkpoints.formats.file_io import as_plain, memory, why_not_kept
from modsurg.checkpoints.formats.source import Notes, Source
from modsurg.checkpoints.formats.torch_save.find_state import rebuild
from modsurg.checkpoints.formats.torch_save.tensors import loading, stored_id
from modsurg.checkpoints.formats.torch_save.unpickler import Loading, unpickle
from modsurg.checkpoints.formats.torch_save.zip import ArchiveWriter
from modsurg.errors import FormatError, SaveError, TrustError

METADATA: Final = "modsurg.json"
_ROOT: Final = "archive/"
_CLASSES: Final = {
    torch.uint8: torch.ByteStorage,
    torch.int8: torch.CharStorage,
    torch.int16: torch.ShortStorage,
    torch.int32: torch.IntStorage,
    torch.int64: torch.LongStorage,
    torch.bool: torch.BoolStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.float32: torch.FloatStorage,
    torch.float64: torch.DoubleStorage,
    torch.complex64: torch.ComplexFloatStorage,
    torch.complex128: torch.ComplexDoubleStorage,
}


def write_torch(path: str | os.PathLike[str], source: Source) -> None:
    """Write a state to one file in the format of torch.save.

    Args:
        path: The target; the old file is replaced when the new one is complete.
        source: Values and notes. The user's strings go into a record of their own, `modsurg.json`, which torch ignores.

    Raises:
        SaveError: Extra state that is not plain data, by its key; or the disk is full. The target is unchanged.
    """
    for key, value in source.notes.extra.items():
        _check_plain(key, value)
    places = {key: _Place(number, source[key].dtype, source[key].shape) for number, key in enumerate(source.stored)}
    small, extra = _describe(source, places)
    nbytes = sum(source[key].nbytes for key in places) + sum(map(len, small.values()))
    with writing(path, nbytes) as file, ArchiveWriter(file, _ROOT) as writer:
        for name, data in small.items():
            writer.add(name, data)
        for key, place in places.items():
            tensor = as_plain(source.read(key))
            assert tensor.nbytes == source[key].nbytes, key
            writer.add(f"data/{place.number}", memory(tensor))
        for number, tensor in enumerate(extra, len(places)):
            writer.add(f"data/{number}", memory(tensor))


def _describe(source: Source, places: Mapping[str, "_Place"]) -> tuple[dict[str, bytes], list[torch.Tensor]]:
    """The records besides the tensors, and the tensors in the extra state."""
    ties, extra = source.notes.ties, source.notes.extra
    state: OrderedDict[str, object] = OrderedDict()
    for key in source.keys_in_order:
        state[key] = extra[key] if key in extra else places[ties.get(key, key)]
    if source.notes.versions:
        state._metadata = _module_versions(source, source.notes)  # type: ignore[attr-defined]  # torch's own place
    stream = io.BytesIO()
    pickler = _Pickler(stream, len(places))
    pickler.dump(state)
    records = {"data.pkl": stream.getvalue(), "byteorder": sys.byteorder.encode()}
    if source.notes.metadata:
        records[METADATA] = json.dumps(dict(source.notes.metadata), ensure_ascii=False, sort_keys=True).encode()
    return records | {"version": b"3\n"}, pickler.tensors


def _module_versions(source: Source, notes: Notes) -> "OrderedDict[str, dict[str, int]]":
    """A version for every module, as `nn.Module.state_dict` gives; torch takes a missing one for an ancient one."""
    paths = dict.fromkeys(["", *notes.versions])
    for key in source:
        parts = key.split(".")
        paths |= dict.fromkeys(".".join(parts[:end]) for end in range(1, len(parts)))
    return OrderedDict((path, {"version": notes.versions.get(path, 1)}) for path in paths)


class _Memory:
    """A storage that will be in the archive."""

    def __init__(self, number: int, dtype: torch.dtype, numel: int) -> None:
        kind = _CLASSES.get(dtype, torch.UntypedStorage)
        count = numel if dtype in _CLASSES else numel * dtype.itemsize
        self.identity = ("storage", kind, str(number), "cpu", count)


class _Place:
    """A tensor that will be in the archive; pickled as torch would pickle the tensor."""

    def __init__(self, number: int, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self.number = number
        self.dtype = dtype
        self.shape = shape

    def __reduce__(self) -> tuple[Any, ...]:
        meta = torch.empty(self.shape, dtype=self.dtype, device="meta")
        storage = _Memory(self.number, self.dtype, meta.numel())
        hooks: OrderedDict[str, object] = OrderedDict()
        view = (storage, 0, self.shape, meta.stride(), False, hooks)
        if self.dtype in _CLASSES:
            return torch._utils._rebuild_tensor_v2, view
        return torch._utils._rebuild_tensor_v3, (*view, self.dtype)


class _Pickler(pickle.Pickler):
    """Pickles `_Place`, and tensors in extra state in the same way; those are collected in `tensors`."""

    def __init__(self, stream: io.BytesIO, first: int) -> None:
        super().__init__(stream, protocol=2)
        self._first = first
        self.tensors: list[torch.Tensor] = []

    def persistent_id(self, obj: object) -> object:
        return obj.identity if isinstance(obj, _Memory) else None

    def reducer_override(self, obj: object) -> Any:
        if not isinstance(obj, torch.Tensor):
            return NotImplemented
        if problem := why_not_kept(obj):
            raise pickle.PicklingError(f"a tensor in it {problem}")
        tensor = as_plain(obj)
        self.tensors.append(tensor)
        return _Place(self._first + len(self.tensors) - 1, tensor.dtype, tuple(tensor.shape)).__reduce__()


def _check_plain(key: str, value: object) -> None:
    """Refuse extra state that torch's restricted unpickler would refuse."""
    stream = io.BytesIO()
    calls = {name: call for name, call in loading(stored_id).calls.items() if name != "builtins.bytes"}
    try:
        _Pickler(stream, 0).dump(value)
        rebuild(unpickle(stream.getvalue(), Loading(calls, stored_id)).value, key, lambda stored: torch.empty(0))
    except (pickle.PicklingError, AttributeError, TypeError, FormatError, TrustError) as error:
        raise SaveError(
            f"{key} is extra state that can't be kept: get_extra_state() has to give numbers, strings, containers and "
            f"tensors ({str(error).partition('. ')[0]})"
        ) from None
