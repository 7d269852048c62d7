"""The safetensors format: a state in one file that every other reader of the format opens.

Layout: the format allows no gap between tensors, so those whose length is a multiple of 64 bytes come first, then
those with a multiple of 32, and so on: each begins at the multiple that its own length has, up to 64. The order of
the state_dict is that of the JSON.
"""

import os
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from modsurg.checkpoints.formats.atomic import PendingFile, writing
from modsurg.checkpoints.formats.file_io import Region, as_plain, memory
from modsurg.checkpoints.formats.hashes import EMPTY, SEAL, hash_region, hash_through, seal
from modsurg.checkpoints.formats.safetensors.header import (
    ALIGNMENT,
    HEADER_LIMIT,
    METADATA,
    Header,
    TensorRecord,
    encode_header,
    parse_header,
)
from modsurg.checkpoints.formats.safetensors.metadata import HASHES, compact, pack, unpack, unpack_hashes
from modsurg.checkpoints.formats.source import Entry, Notes, Source
from modsurg.errors import FormatError, SaveError

DTYPES: Mapping[str, torch.dtype] = {
    name: getattr(torch, attribute)
    for name, attribute in {
        "BOOL": "bool",
        "U8": "uint8",
        "I8": "int8",
        "U16": "uint16",
        "I16": "int16",
        "U32": "uint32",
        "I32": "int32",
        "U64": "uint64",
        "I64": "int64",
        "F16": "float16",
        "BF16": "bfloat16",
        "F32": "float32",
        "F64": "float64",
        "C64": "complex64",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E4M3FNUZ": "float8_e4m3fnuz",
        "F8_E5M2": "float8_e5m2",
        "F8_E5M2FNUZ": "float8_e5m2fnuz",
        "F8_E8M0": "float8_e8m0fnu",
        "F4": "float4_e2m1fn_x2",
    }.items()
    if hasattr(torch, attribute)
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SafetensorsSource(Source):
    """A safetensors file, ours or another program's.

    Raises:
        FormatError: The file is cut off, foreign or lying.
    """

    def __init__(self, path: Path) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._close = weakref.finalize(self, os.close, fd)
        self._fd = fd
        try:
            self.header = parse_header(fd, path)
            entries, notes, self.hashes = _understand(self.header, path)
        except FormatError:
            self.close()
            raise
        super().__init__(path, entries, notes)

    @property
    def sealed(self) -> bool | None:
        """Whether the header's own hash holds; None where it has none."""
        if not self.hashes and SEAL not in self.header.metadata:
            return None
        return self.header.metadata.get(SEAL) == seal(self.header.raw)

    def region(self, key: str) -> Region:
        """Where the values lie."""
        if not self._close.alive:
            raise ValueError(f"{self.path} was closed")
        record = self.header.records[self.notes.ties.get(key, key)]
        return Region(self._fd, record.offset, record.nbytes)

    def check(self, key: str) -> bool | None:
        """Whether the stored hash of this tensor holds; None where no hash was stored."""
        expected = self.hashes.get(self.notes.ties.get(key, key))
        return None if expected is None else hash_region(self.region(key)) == expected

    def close(self) -> None:
        """Close the file."""
        self._close()


@dataclass(frozen=True)
class Layout:
    """What will be written to one file, checked and measured before anything is.

    Attributes:
        source: Where the values come from.
        records: Name -> place, in the order of the state_dict, offsets from the start of the data.
        metadata: Strings, with zeros for the hashes.
        size: Of the whole file, in bytes.
    """

    source: Source
    records: Mapping[str, TensorRecord]
    metadata: Mapping[str, str]
    size: int


def lay_out(source: Source, keys: Sequence[str], metadata: Mapping[str, str]) -> Layout:
    """Plan a file that holds `keys` of the source.

    Raises:
        SaveError: A name or a dtype that the format can't keep.
    """
    sizes = {key: source[key].nbytes for key in keys}
    offset, offsets = 0, {}
    for key in sorted(keys, key=lambda key: -_alignment(sizes[key])):
        offsets[key] = offset
        offset += sizes[key]
    records = {key: TensorRecord(*_description(source[key]), offsets[key], sizes[key]) for key in keys}
    empty = {**metadata, HASHES: compact(dict.fromkeys(keys, EMPTY)), SEAL: EMPTY}
    length = len(encode_header(records, empty))
    if length > HEADER_LIMIT:
        raise SaveError(f"the header would take {length:,} bytes; safetensors allows {HEADER_LIMIT:,}: save to .pt")
    return Layout(source, records, empty, length + offset)


def write_layout(file: PendingFile, layout: Layout) -> str:
    """Write one file, tensor by tensor; returns the hash of its header."""
    start = encode_header(layout.records, layout.metadata)
    file.write(start)
    hashes = dict.fromkeys(layout.records, EMPTY)
    for key in sorted(layout.records, key=lambda key: layout.records[key].offset):
        tensor = as_plain(layout.source.read(key))
        assert tensor.nbytes == layout.records[key].nbytes, key
        hashes[key] = hash_through(memory(tensor), file.write)
    metadata = {**layout.metadata, HASHES: compact(hashes)}
    digest = seal(encode_header(layout.records, metadata)[8:])
    file.seek(0)
    file.write(encode_header(layout.records, {**metadata, SEAL: digest}))
    return digest


def write_safetensors(path: str | os.PathLike[str], source: Source) -> None:
    """Write a state to one safetensors file.

    Args:
        path: The target; the old file is replaced when the new one is complete.
        source: Values, and the notes that go into the header's metadata.

    Raises:
        SaveError: Something that the format can't keep, by its name; or the disk is full. The target is unchanged.
    """
    layout = lay_out(source, source.stored, pack(source.notes, source.keys_in_order))
    with writing(path, layout.size) as file:
        write_layout(file, layout)


def _alignment(nbytes: int) -> int:
    return min(nbytes & -nbytes, ALIGNMENT) if nbytes else ALIGNMENT


def _description(entry: Entry) -> tuple[str, tuple[int, ...]]:
    """The format's dtype and shape; it counts the halves of a byte one by one."""
    if entry.name == METADATA:
        raise SaveError(f"a tensor can't be called {METADATA!r} in safetensors: rename it, or save to .pt")
    try:
        entry.name.encode()
    except UnicodeEncodeError:
        raise SaveError(f"{entry.name!r} is not valid text, so it can't be a name in safetensors: rename it") from None
    if entry.dtype not in _NAMES:
        raise SaveError(
            f"{entry.name}: safetensors has no {_short(entry.dtype)}: save to .pt"
            + (", or keep torch.view_as_real of it" if entry.dtype.is_complex else "")
        )
    name = _NAMES[entry.dtype]
    if name != "F4":
        return name, entry.shape
    if not entry.shape:
        raise SaveError(f"{entry.name}: safetensors has no single pair of float4 values: reshape it to (1,)")
    return name, (*entry.shape[:-1], 2 * entry.shape[-1])


def _understand(header: Header, path: Path) -> tuple[Mapping[str, Entry], Notes, Mapping[str, str]]:
    """Entries in the order of the state_dict, notes and hashes of a file."""
    try:
        notes = unpack(header.metadata, list(header.records))
        hashes = unpack_hashes(header.metadata)
        stored = {name: _entry(name, record) for name, record in header.records.items()}
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from error.__cause__
    entries = {}
    for key in notes.order:
        if key not in notes.extra:
            entries[key] = stored[key] if key in stored else replace(stored[notes.ties[key]], name=key)
    return entries, notes, hashes


def _entry(name: str, record: TensorRecord) -> Entry:
    if record.dtype not in DTYPES:
        raise FormatError(f"tensor {name!r} is of dtype {record.dtype}, which this version of torch does not have")
    shape = record.shape
    if record.dtype == "F4":
        if not shape or shape[-1] % 2:
            raise FormatError(f"tensor {name!r}: float4 values come in pairs, and the shape {shape} has an odd end")
        shape = (*shape[:-1], shape[-1] // 2)
    return Entry(name, DTYPES[record.dtype], shape, record.nbytes)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
