"""Which format a path has. The one place where a suffix is looked at."""

import contextlib
import os
import re
import tempfile
from pathlib import Path
from typing import Any, BinaryIO

from modsurg.checkpoints.formats.atomic import in_home
from modsurg.checkpoints.formats.dcp.reader import DistributedSource
from modsurg.checkpoints.formats.parts import run_part
from modsurg.checkpoints.formats.remote import (
    Mirror,
    PathOrFile,
    is_binary,
    local_path,
    publishing,
    remote_path,
    shown,
    url_of,
)
from modsurg.checkpoints.formats.safetensors.header import foreign
from modsurg.checkpoints.formats.safetensors.sharded import INDEX, ShardedSource, remove_set, write_shards
from modsurg.checkpoints.formats.safetensors.source import SafetensorsSource, write_safetensors
from modsurg.checkpoints.formats.source import Source
from modsurg.checkpoints.formats.torch_save.reader import TorchSource
from modsurg.checkpoints.formats.torch_save.writer import write_torch
from modsurg.errors import FormatError, SaveError, TrustError, listed

_TORCH = (".pt", ".pth", ".bin")
_SHARD = re.compile(r"-\d+-of-\d+\.\w+$")
_BESIDE = re.compile(r"optim|sched|scaler|random|rng|sampler|training_args|trainer_state", re.I)  # no model's weights
_KNOWN = f"name.safetensors, name{INDEX}, name.pt, name.pth and name.bin"


def open_source(path: PathOrFile, part: str | None = None) -> Source:
    """Open a checkpoint of any format for reading.

    Args:
        path: A file, or a directory of torch.distributed.checkpoint. `name.safetensors` also opens a set of that name,
            by its index; so does `name.bin`.
        part: Which of the states in a file of torch.save, where by default it is looked for; or in a run.

    Raises:
        FileNotFoundError: Nothing there.
        FormatError: The name says no format, or the file is not what its name says, or has no such part.
    """
    if is_binary(path):
        return _open_bytes(path, part)
    if (url := url_of(path)) is not None:
        return _open_remote(url, part)
    path = local_path(path)
    index = Path(f"{path}.index.json")
    if not os.path.exists(path) and os.path.exists(index):
        path = index
    if not os.path.exists(path):  # unlike Path.exists it says no to a name that no file can have
        raise FileNotFoundError(f"there is no file {path}{in_home(path)}")
    if path.is_file() and path.suffix != ".safetensors" and not path.name.endswith(".json") and _is_torch(path):
        return TorchSource(path, part) if part is None else _torch_part(path, part)
    if part is not None:
        return _part(open_source(path), part)
    if (path / ".metadata").exists():
        return DistributedSource(path)
    if not path.is_file():
        if not path.is_dir():
            raise FormatError(f"{path} is not a file, but a pipe or a device")
        raise FormatError(f"{str(path)!r} is a directory, not a checkpoint: it has no .metadata{_inside(path)}")
    if path.name.endswith(".index.json"):
        return ShardedSource(path, open_source)
    if path.suffix == ".safetensors":
        return SafetensorsSource(path)
    return _open_by_content(path)


def _open_bytes(given: BinaryIO | bytes, part: str | None) -> Source:
    """Open the bytes from the position of a file object on, all of them where it is at its end; its position stays."""
    if isinstance(given, bytes | bytearray | memoryview):
        content: Any = given
    else:
        at = given.tell()
        content = given.read()
        if not content:  # it was just written
            given.seek(0)
            content = given.read()
        given.seek(at)
        if isinstance(content, str):
            raise FormatError("the file is opened as text. Try: open(path, 'rb')")
    directory = tempfile.TemporaryDirectory(prefix="modsurg-")
    name = Path(str(getattr(given, "name", "bytes"))).name or "bytes"
    path = Path(directory.name, name)
    path.write_bytes(content)
    source = open_source(path, part)
    source.mirror = directory
    return source


def _write_bytes(target: BinaryIO | bytes, source: Source, shard_size: int | str | None) -> Path:
    """Write to a file object, as its name says, or as safetensors."""
    if isinstance(target, bytes | bytearray | memoryview):
        raise SaveError(f"a {type(target).__name__} can't be written to. Try: save_state(state, io.BytesIO())")
    name = Path(str(getattr(target, "name", "")))
    with tempfile.TemporaryDirectory(prefix="modsurg-") as directory:
        path = Path(directory, f"state{name.suffix if name.suffix in _TORCH else '.safetensors'}")
        if shard_size is not None:
            raise SaveError("a file object takes one file, not shards. Try: save_state without shard_size")
        target.write(write_source(path, source).read_bytes())
    return name


def _open_remote(url: str, part: str | None) -> Source:
    mirror = Mirror(url)
    try:
        source = open_source(mirror.path, part)
    except (FormatError, TrustError) as error:
        mirror.close()
        raise type(error)(str(error).replace(str(mirror.path), shown(url))) from None
    except BaseException:
        mirror.close()
        raise
    source.mirror = mirror
    return source


def _open_by_content(path: Path) -> Source:
    """Open a file whose name is that of no format, by its first bytes."""
    with open(path, "rb") as file:
        start = file.read(64)
    if start[8:9] == b"{":
        return SafetensorsSource(path)
    if problem := foreign(start, path):
        raise FormatError(problem)
    if path.suffix == ".onnx":
        raise FormatError(f"{path} is a model of ONNX: read it with the onnx package")
    raise FormatError(f"{path}: neither its name nor its first bytes say which format it has. Known are {_KNOWN}")


def write_source(path: PathOrFile, source: Source, *, shard_size: int | str | None = None) -> Path:
    """Write a state in the format that the name says; returns the path to load it from.

    Args:
        path: The target; its suffix chooses the format.
        source: What to write, with its notes: metadata, ties, extra state.
        shard_size: Bytes in one file at most (a number or `"5GB"`): a set of files with an index. A larger tensor has
            a file of its own.

    Raises:
        SaveError: The name says no format, or something can't be kept in it. No file was touched.
    """
    if is_binary(path):
        return _write_bytes(path, source, shard_size)
    if (url := url_of(path)) is not None:
        with publishing(url) as local:
            written = write_source(local, source, shard_size=shard_size)
        return remote_path(url.replace(local.name, written.name))
    path = local_path(path)
    if path.name.endswith(INDEX):
        return write_shards(path, source, shard_size or "5GB")
    if path.suffix == ".safetensors" and shard_size is not None:
        return write_shards(path, source, shard_size)
    if shard_size is not None:
        raise SaveError(f"{path}: only safetensors are split into shards: name it {path.stem}.safetensors")
    if path.suffix == ".safetensors":
        write_safetensors(path, source)
        remove_set(path, source.path)
        return path
    if path.suffix in _TORCH:
        write_torch(path, source)
        return path
    raise SaveError(f"{path}: the name does not say which format to write. Known are {_KNOWN}")


def _is_torch(path: Path) -> bool:
    """Whether the name says so, or the first bytes where it says nothing."""
    if path.suffix in (*_TORCH, ".ckpt", ".tar", ".jit", ".th"):  # names under which such files are found
        return True
    with open(path, "rb") as file:
        return file.read(4).startswith((b"PK\x03\x04", b"\x80"))


def _torch_part(path: Path, part: str) -> Source:
    try:
        return TorchSource(path, part)
    except FormatError as error:
        with contextlib.suppress(FormatError):
            return _part(TorchSource(path), part)
        raise error


def _part(source: Source, part: str) -> Source:
    try:
        found = run_part(source, part)
        if found is source:
            raise FormatError(f"{source.path} has one state and no parts: leave the part out")
    except BaseException:
        source.close()
        raise
    return found


def _inside(path: Path) -> str:
    """What could be meant instead of a directory."""
    names = sorted(name.name for name in path.iterdir()) if path.is_dir() else []
    found = [name for kind in (".index.json", ".safetensors", _TORCH) for name in names if name.endswith(kind)]
    indexed = any(name.endswith(".index.json") for name in found)
    first = [name for name in found if not (_BESIDE.search(name) or (indexed and _SHARD.search(name)))] or found
    if not first:
        return ""
    return f". In it: {listed(first, 5)}. Try: {str(path / first[0])!r}"
