"""The header of a safetensors file, read and checked without torch.

A file is eight bytes of length, that many bytes of JSON, then the tensors' bytes without a gap. Whatever the JSON
says is checked against the file before anybody relies on it: a tensor never reaches outside the file or into another.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modsurg.checkpoints.formats.remote import pread
from modsurg.errors import FormatError

HEADER_LIMIT = 100_000_000
METADATA = "__metadata__"
ALIGNMENT = 64

_OTHERS: Mapping[bytes, str] = {
    b"\x1f\x8b": "packed by gzip: unpack it first (gunzip)",
    b"\x89HDF\r\n": "an HDF5 file, as Keras writes: read it with h5py",
    b"GGUF": "a GGUF file of llama.cpp: read it with the gguf package",
    b"\x93NUMPY": "an array of numpy: read it with numpy.load",
}
BITS: Mapping[str, int] = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """One tensor as the header has it.

    Attributes:
        dtype: The format's name, such as `"F32"`.
        shape: Sizes of the dimensions.
        offset: First byte, counted from the start of the file.
        nbytes: How many bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header.

    Attributes:
        records: Name -> tensor, in the order of the JSON.
        metadata: The strings under `__metadata__`.
        raw: The JSON as it stands in the file, padding included.
    """

    records: Mapping[str, TensorRecord]
    metadata: Mapping[str, str]
    raw: bytes


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check a file's header; no tensor is touched.

    Raises:
        FormatError: The file is cut off, foreign or lying; the message says how.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "page.safetensors"
        >>> _ = file.write_text("<!DOCTYPE html><title>Sign in</title>")
        >>> read_header(file)
        Traceback (most recent call last):
            ...
        modsurg.errors.FormatError: .../page.safetensors is an HTML page, not a checkpoint: ...
    """
    with open(path, "rb") as file:
        return parse_header(file.fileno(), Path(path))


def parse_header(fd: int, path: Path) -> Header:
    """The same for an open file; `path` is only named in errors."""
    size = os.fstat(fd).st_size
    start = pread(fd, 64, 0)
    problem = foreign(start, path)
    if problem:
        raise FormatError(problem)
    if len(start) < 8:
        raise FormatError(f"{path} is cut off: {size} bytes, and a safetensors file begins with 8 bytes of length")
    length = int.from_bytes(start[:8], "little")
    if length > HEADER_LIMIT:
        raise FormatError(
            f"{path} is not a safetensors file: it claims a header of {length:,} bytes (limit {HEADER_LIMIT:,})"
        )
    if 8 + length > size:
        raise FormatError(f"{path} is cut off: the header ends at byte {8 + length:,}, the file at {size:,}")
    raw = pread(fd, length, 8)
    try:
        return _check(raw, size)
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None


def foreign(start: bytes, path: Path) -> str | None:
    """What a file really is, told from its first bytes, where that is something often found under a wrong name."""
    text = start.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return (
            f"{path} is an HTML page, not a checkpoint: the download was refused or needs a login; get the file again"
        )
    if start.startswith(b"version https://git-lfs"):
        return f"{path} is a git-LFS pointer, not the file it stands for: run `git lfs pull` in its repository"
    for beginning, kind in _OTHERS.items():
        if start.startswith(beginning):
            return f"{path} is {kind}"
    if start.startswith(b"PK\x03\x04") and path.suffix == ".safetensors":
        return f"{path} is a zip archive, as torch.save writes: rename it to {path.stem}.pt"
    return None


def encode_header(records: Mapping[str, TensorRecord], metadata: Mapping[str, str]) -> bytes:
    """The start of a file, length and JSON, padded so that the data begins at a multiple of 64 bytes.

    Args:
        records: Offsets count from the start of the data, in the order in which a reader shall list them.
        metadata: Strings.
    """
    data: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    for name, record in records.items():
        offsets = [record.offset, record.offset + record.nbytes]
        data[name] = {"dtype": record.dtype, "shape": list(record.shape), "data_offsets": offsets}
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _check(raw: bytes, size: int) -> Header:
    data = parse_json(raw)
    metadata = data.pop(METADATA, None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError(f"{METADATA} has to be an object of strings")
    start = 8 + len(raw)
    records = {name: _record(name, value, start) for name, value in data.items()}
    end = start
    for name, record in sorted(records.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if record.offset != end:
            kind = "overlaps another tensor" if record.offset < end else "leaves a hole before it"
            raise FormatError(f"tensor {name!r} {kind}: it begins at byte {record.offset:,}, expected {end:,}")
        end += record.nbytes
    if end != size:
        kind = "the file is cut off" if size < end else "there are bytes that belong to no tensor"
        raise FormatError(f"{kind}: the tensors end at byte {end:,}, the file at {size:,}")
    return Header(records, metadata, raw)


def parse_json(raw: bytes) -> dict[str, Any]:
    """A JSON object from a stranger: no name twice, no NaN, no bottomless nesting.

    Raises:
        FormatError: It is something else.
    """
    if not raw.startswith(b"{"):
        raise FormatError(f"it begins with {raw[:20]!r} where a JSON object has to be")
    try:
        text = raw.decode()
        data = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
    except RecursionError:
        raise FormatError("the JSON is nested far too deeply") from None
    except UnicodeDecodeError as error:
        raise FormatError(f"the JSON is not UTF-8 text: {error}") from None
    except FormatError:
        raise
    except ValueError as error:
        raise FormatError(f"the JSON does not parse: {error}") from None
    assert isinstance(data, dict)
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]  # add returns None: the idiom
        raise FormatError(f"the JSON has {twice!r} twice")
    for name in data:
        if not name.isascii() and any("\ud800" <= character <= "\udfff" for character in name):
            raise FormatError(f"the JSON has a name that is not valid text: {name!r}")
    return data


def _refuse(text: str) -> None:
    raise FormatError(f"the JSON has {text[:40]}, which is not a number of JSON")


def _record(name: str, value: Any, start: int) -> TensorRecord:
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise FormatError(f"tensor {name!r} has no dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise FormatError(f"tensor {name!r} has an unknown dtype {str(dtype)[:40]!r}")
    if not _whole(shape) or not _whole(offsets) or len(offsets) != 2 or len(shape) > 64:
        raise FormatError(f"tensor {name!r} has a shape or offsets that are not lists of whole numbers")
    count, span = 1, 1
    for length in shape:
        count *= length
        span *= max(length, 1)
    if span >= 1 << 63:
        raise FormatError(f"tensor {name!r} has more elements than any memory: {str(shape)[:80]}")
    nbytes = offsets[1] - offsets[0]
    if nbytes * 8 != count * BITS[dtype]:
        raise FormatError(
            f"tensor {name!r}: {dtype} of shape {str(tuple(shape))[:80]} does not take {str(nbytes)[:40]} bytes"
        )
    return TensorRecord(dtype, tuple(shape), start + offsets[0], nbytes)


def _whole(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
