"""A checkpoint file as rows: the tree from its keys, or from the description of a whole model. No tensor is read.

Safetensors files, whole or in shards, are read without torch.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modsurg.checkpoints.formats.documents import RUN, TIES, UNREADABLE, is_state
from modsurg.checkpoints.formats.remote import Mirror, PathOrFile, is_binary, local_path, url_of
from modsurg.checkpoints.formats.safetensors.header import BITS, read_header
from modsurg.errors import FormatError, counted, listed, visible
from modsurg.structure.schema import Slot, outline, read_tree, sound
from modsurg.views.summary.layer_text import detail
from modsurg.views.summary.rows import Content, Row, Totals, add_up, mark_frozen
from modsurg.views.text import size, written

if TYPE_CHECKING:
    from modsurg.checkpoints.formats.source import Source

_STATISTICS = frozenset({"running_mean", "running_var", "num_batches_tracked"})
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


@dataclass(frozen=True, slots=True)
class HeaderTensor:
    """A tensor in a file: what its header says."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def collect_file(path: PathOrFile, part: str | None = None) -> Content:
    """Read the headers of a checkpoint of any format, or of a part of it.

    Raises:
        FileNotFoundError: Nothing there.
        FormatError: The file is not what its name says.
    """
    if is_binary(path):
        from modsurg.checkpoints.formats.registry import open_source  # needs torch, which files by name do without

        with open_source(path) as source:
            return collect_file(source.path or "", part)
    if (url := url_of(path)) is not None:
        with Mirror(url) as mirror:
            return collect_file(mirror.path, part)
    path = local_path(path)
    stored, metadata, note = _contents(path, part)
    try:
        tree = read_tree(metadata)
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None
    if tree is not None:
        with sound():
            return _from_tree(path, tree, stored, note)
    try:
        ties = {str(key): str(to) for _, key, to in json.loads(metadata.get(TIES, "[]"))}
    except (ValueError, TypeError):
        raise FormatError(f"{path}: the ties that modsurg noted in the metadata are damaged") from None
    if RUN in metadata:
        return _from_run(path, metadata[RUN], stored, ties)
    return _from_keys(path, stored, ties, note)


def _contents(path: Path, part: str | None) -> tuple[dict[str, HeaderTensor], Mapping[str, str], str]:
    """Tensors, metadata, and which part of the file they are, if they are a part."""
    index = path if path.name.endswith(".index.json") else path.parent / f"{path.name}.index.json"
    is_index = (
        index.name.endswith(".safetensors.index.json") and index.exists() and (index == path or not path.exists())
    )
    if part is None and is_index:
        return *_shards(index), ""
    if part is None and path.suffix == ".safetensors" and path.is_file():
        header = read_header(path)
        return {name: _stored(record) for name, record in header.records.items()}, header.metadata, ""
    from modsurg.checkpoints.formats.registry import open_source  # needs torch, which the formats above do without

    with open_source(path, part) as source:
        entries = {
            key: HeaderTensor(str(source[key].dtype)[6:], source[key].shape, source[key].nbytes)
            for key in source
            if key not in source.notes.ties
        }
        ties = json.dumps([[0, key, to] for key, to in source.notes.ties.items()])
        return entries, {**source.notes.metadata, TIES: ties}, _part(source)


def _part(source: "Source") -> str:
    """Which part of the file is shown, and what lies beside it."""
    if not source.taken and not source.left_tensors:
        return ""
    short = {key: value for key, value in source.plain.items() if not isinstance(value, dict | list | tuple)}
    beside = [f"{key} = {value!r}" for key, value in short.items()]
    parts = [key for key in source.left if key not in short]
    lists = [listed(beside, 5)] * bool(beside) + [f"{listed(parts, 5)} (--part NAME)"] * bool(parts)
    shown = f"Showing {source.taken!r}." if source.taken else "Showing the state."
    return f"{shown} Also in the file: {'; '.join(lists)}" if lists else shown


def _shards(index: Path) -> tuple[dict[str, HeaderTensor], Mapping[str, str]]:
    try:
        data = json.loads(index.read_bytes())
        files = dict.fromkeys(data["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise FormatError(f"{index} is not an index of a sharded checkpoint: it has no weight_map") from None
    stored: dict[str, HeaderTensor] = {}
    metadata: dict[str, str] = {}
    for name in files:
        if not isinstance(name, str) or not name or Path(name).name != name:
            raise FormatError(f"{index} names a file outside its directory: {name!r}")
        if not os.path.isfile(index.with_name(name)):
            raise FormatError(f"{index} names {name!r:.80}, which is not there: get the whole set")
        header = read_header(index.with_name(name))
        stored |= {key: _stored(record) for key, record in header.records.items()}
        metadata |= header.metadata
    return stored, metadata


def _stored(record: Any) -> HeaderTensor:
    return HeaderTensor(_DTYPES.get(record.dtype, record.dtype), record.shape, record.nbytes)


def _from_keys(path: Path, stored: Mapping[str, HeaderTensor], ties: Mapping[str, str], note: str) -> Content:
    rows: dict[str, Row] = {"": Row("")}
    totals = Totals()
    places: dict[str, list[tuple[str, HeaderTensor]]] = {}
    for key, tensor in stored.items():
        prefix, _, name = key.rpartition(".")
        row = _place(rows, prefix)
        number = prod(tensor.shape)
        if name in _STATISTICS:
            row.buffers += number
            totals.buffer_bytes += tensor.nbytes
        else:
            row.params += number
            totals.param_bytes += tensor.nbytes
        row.trainable = row.params
        places.setdefault(prefix, []).append((name, tensor))
    for key, to in ties.items():
        prefix, _, name = key.rpartition(".")
        _place(rows, prefix).notes.append(f"{name} = {to}")
        totals.shared_params += prod(stored[to].shape) if to in stored else 0
    usual = _usual((tensor.dtype, prod(tensor.shape)) for tensor in stored.values())
    for prefix, held in places.items():
        shown = [each for each in held if each[0] not in _STATISTICS] or held
        rows[prefix].detail = ", ".join(f"{name} {written(tensor.shape)}" for name, tensor in shown)
        rows[prefix].notes += dict.fromkeys(each.dtype for name, each in shown if each.dtype != usual)
    return _finished(path, rows, totals, usual, note)


def _from_run(path: Path, text: str, stored: Mapping[str, HeaderTensor], ties: Mapping[str, str]) -> Content:
    """What `save_checkpoint` wrote: the models as trees, a line for whatever else has tensors."""
    try:
        run = json.loads(text)
        known = {*stored, *ties}
        models = {name for name, state in run["states"].items() if is_state(state, known)}
        kinds = {name: kind.rpartition(".")[2] for name, kind in run["classes"].items()}
        note = f"a run at step {run['step']:,}"
    except UNREADABLE as error:
        raise FormatError(f"{path}: its run metadata is corrupt ({error!r:.200})") from None
    others: dict[str, list[HeaderTensor]] = {}
    for key, tensor in stored.items():
        name = key.partition(".")[0]
        if name not in models:
            others.setdefault(name, []).append(tensor)
    content = _from_keys(path, {key: stored[key] for key in stored if key.partition(".")[0] in models}, ties, note)
    for name, tensors in others.items():
        held = [counted(len(tensors), "tensor", "tensors"), size(sum(tensor.nbytes for tensor in tensors))]
        kind = kinds.get(name, "")
        content.root.children.append(Row(name, detail=", ".join([kind] * (kind not in ("", "dict")) + held)))
    content.totals.modules += len(others)
    return content


def _place(rows: dict[str, Row], path: str) -> Row:
    """The row of a path, made with all that lead to it where it is not there."""
    missing = []
    while path not in rows:
        missing.append(path)
        path = path.rpartition(".")[0]
    for each in reversed(missing):
        row = Row(each)
        rows[path].children.append(row)
        rows[each] = row
        path = each
    return rows[path]


def _from_tree(path: Path, tree: Mapping[str, Any], stored: Mapping[str, HeaderTensor], note: str) -> Content:
    rows: dict[str, Row] = {}
    totals = Totals()
    modules: dict[int, str] = {}
    tensors: dict[int, str] = {}
    slots: dict[str, tuple[Slot, ...]] = {}
    for place in outline(tree):
        parent = place.path.rpartition(".")[0]
        if place.path and (parent not in rows or rows[parent].notes[:1] == ["repeated"]):
            continue
        row = rows[place.path] = Row(place.path, place.name, detail(place.attributes))
        if place.path:
            rows[parent].children.append(row)
        if place.number in modules:
            row.notes = ["repeated", f"= {modules[place.number]}"]
            continue
        modules[place.number] = place.path
        slots[place.path] = tuple(_as_stored(slot, stored.get(slot.key or "")) for slot in place.tensors)
        for slot in slots[place.path]:
            _weigh(row, slot, tensors, totals, stored)
    usual = _usual((slot.dtype, prod(slot.shape)) for held in slots.values() for slot in held if slot.parameter)
    for at, held in slots.items():
        rows[at].notes += dict.fromkeys(slot.dtype for slot in held if slot.parameter and slot.dtype != usual)
    for row in rows.values():
        row.notes = [note for note in row.notes if note != "repeated"]
    return _finished(path, rows, totals, usual, note)


def _as_stored(slot: Slot, held: HeaderTensor | None) -> Slot:
    """The slot with the dtype that its values have: `convert` may have changed it."""
    return slot if held is None or held.dtype == slot.dtype else replace(slot, dtype=held.dtype)


def _weigh(row: Row, slot: Slot, met: dict[int, str], totals: Totals, stored: Mapping[str, HeaderTensor]) -> None:
    number = prod(slot.shape)
    held = stored.get(slot.key or "")
    nbytes = held.nbytes if held else number * BITS.get(_CODES.get(slot.dtype, ""), 32) // 8
    if slot.number in met:
        row.notes.append(f"{slot.name} = {met[slot.number]}")
        totals.shared_params += number if slot.parameter else 0
    elif slot.parameter:
        row.params += number
        row.trainable += number if slot.trainable else 0
        totals.param_bytes += nbytes
    else:
        row.buffers += number
        totals.buffer_bytes += nbytes
    met.setdefault(slot.number, f"{row.path}.{slot.name}" if row.path else slot.name)


_CODES = {name: code for code, name in _DTYPES.items()}


def _usual(dtypes: Iterable[tuple[str, int]]) -> str:
    elements: Counter[str] = Counter()
    for dtype, number in dtypes:
        elements[dtype] += number
    return elements.most_common(1)[0][0] if elements else ""


def _finished(path: Path, rows: Mapping[str, Row], totals: Totals, usual: str, note: str) -> Content:
    kept = list(rows.values())
    add_up(kept)
    mark_frozen(kept)
    root = kept[0]
    totals.params, totals.trainable_params, totals.buffers = root.params, root.trainable, root.buffers
    totals.frozen_params = root.params - root.trainable
    totals.modules = len(kept)
    return Content(root, totals, [visible(each) for each in (path.name, usual) if each], visible(note))
