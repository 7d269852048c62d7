"""A state in several files with an index, `name.safetensors.index.json`, as Hugging Face's tools read and write it.

A set is replaced as a whole: the new files take names that the old set does not use, the index changes last and in
one step, and only then the old files go. Each of our files is known to the index by the hash of its header, so that a
file of another save is found out.
"""

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from modsurg.checkpoints.formats.atomic import locked_directory, no_directory, pending
from modsurg.checkpoints.formats.file_io import Region
from modsurg.checkpoints.formats.hashes import EMPTY, SEAL, seal
from modsurg.checkpoints.formats.safetensors.header import foreign, parse_json, read_header
from modsurg.checkpoints.formats.safetensors.metadata import SHARDS, compact, pack, unpack
from modsurg.checkpoints.formats.safetensors.source import Layout, lay_out, write_layout, write_safetensors
from modsurg.checkpoints.formats.source import Entry, Source
from modsurg.errors import FormatError, SaveError

INDEX = ".safetensors.index.json"
_PART = re.compile(r"(.+?)(?:-[0-9a-f]{8})?-\d{5}-of-\d{5}(\.\w+)")
_LARGEST_INDEX = 256 << 20
_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{ending}": base**power
    for power, prefix in enumerate("KMGT", 1)
    for ending, base in (("B", 1000), ("IB", 1024))
}


class ShardedSource(Source):
    """An index and the files that it names.

    Args:
        path: The index.
        open_shard: Opens one file by its suffix.

    Raises:
        FormatError: The index is damaged, points outside its directory, or a file is missing or of another save.
    """

    def __init__(self, path: Path, open_shard: Callable[[Path], Source]) -> None:
        self._shards: dict[str, Source] = {}
        try:
            index, raw = _read_index(path)
            self._index_holds = SEAL not in index["metadata"] or index["metadata"][SEAL] == seal(raw)
            self._homes: Mapping[str, str] = index["weight_map"]
            names = list(dict.fromkeys(self._homes.values()))
            _check_distinct(path, names)
            for name in names:
                self._shards[name] = open_shard(path.parent / name)
            metadata = {key: text for key, text in index["metadata"].items() if isinstance(text, str)}
            self._compare(path, metadata)
            notes = unpack(metadata, list(self._homes))
        except FormatError as error:
            self.close()
            raise error if str(path) in str(error) else FormatError(f"{path}: {error}") from None
        entries: dict[str, Entry] = {}
        for key in notes.order:
            if key not in notes.extra:
                stored = notes.ties.get(key, key)
                entry = self._shards[self._homes[stored]][stored]
                entries[key] = entry if stored == key else replace(entry, name=key)
        super().__init__(path, entries, notes)

    @property
    def sealed(self) -> bool | None:
        """Whether the stored hashes of the index and of all headers hold; None where there are none."""
        found = [shard.sealed for shard in self._shards.values()]
        if not self._index_holds or False in found:
            return False
        return None if None in found else True

    @property
    def shards(self) -> Mapping[str, Source]:
        """File name -> the opened file."""
        return self._shards

    def region(self, key: str) -> Region | None:
        """Where the values lie."""
        stored = self.notes.ties.get(key, key)
        return self._shards[self._homes[stored]].region(stored)

    def read(self, key: str) -> torch.Tensor:
        """The values, from the file that has them."""
        stored = self.notes.ties.get(key, key)
        return self._shards[self._homes[stored]].read(stored)

    def check(self, key: str) -> bool | None:
        """Whether the stored hash of this tensor holds; None where no hash was stored."""
        stored = self.notes.ties.get(key, key)
        return self._shards[self._homes[stored]].check(stored)

    def close(self) -> None:
        """Close the files."""
        for shard in self._shards.values():
            shard.close()

    def _compare(self, path: Path, metadata: Mapping[str, str]) -> None:
        for key, name in self._homes.items():
            if key not in self._shards[name]:
                raise FormatError(f"{path} says that {name} holds {key!r}, and it does not: a file of another save?")
        seals = parse_json(metadata[SHARDS].encode(errors="replace")) if SHARDS in metadata else {}
        for name, expected in seals.items():
            header = getattr(self._shards.get(name), "header", None)
            if header is None or header.metadata.get(SEAL) != expected:
                raise FormatError(f"{path}: {name} is a file of another save than the index")


def index_of(path: Path) -> Path | None:
    """The index beside a file, if by its name the file is one of several.

    Example:
        >>> index_of(Path("model-00001-of-00002.safetensors")) is None  # there is no index
        True
    """
    part = _PART.fullmatch(path.name)
    index = part and path.with_name(f"{part[1]}{part[2]}.index.json")
    return index if index and index.exists() else None


def write_shards(path: Path, source: Source, shard_size: int | str) -> Path:
    """Write a state as a set of files; returns the path to load it from.

    Args:
        path: `name.safetensors`, or `name.safetensors.index.json`. What fits into one file becomes `name.safetensors`
            when that was asked for.
        source: What to write.
        shard_size: Bytes of values in one file at most, `5_000_000_000` or `"5GB"`; a larger tensor is alone in a file.

    Raises:
        SaveError: Something that can't be kept, by its name; a size that is none; a full disk. The old set is whole.
    """
    groups = _groups(source, parse_size(shard_size))
    if len(groups) == 1 and not path.name.endswith(INDEX):
        write_safetensors(path, source)
        remove_set(path, source.path)
        return path
    index = path if path.name.endswith(INDEX) else path.with_name(path.name + ".index.json")
    if index.is_symlink() or index.is_dir() or path.is_dir():
        raise SaveError(f"{index if index.is_symlink() else path} is a link or a directory: give a file name")
    strings = pack(replace(source.notes, ties={}, extra={}, versions={}), [])
    layouts = [lay_out(source, group, strings) for group in groups]
    with _alone_in(index.parent):
        _write_set(index, source, layouts)
        if index.name != path.name:
            path.unlink(missing_ok=True)
    return index


def remove_set(path: Path, reading: Path | None) -> None:
    """Remove the set of ours whose place a single file has taken, unless that file may be only a part of it."""
    index = path.with_name(path.name + ".index.json")
    if not os.path.isfile(index) or not _is_ours(index):
        return
    with _alone_in(index.parent), contextlib.suppress(OSError):
        old = _our_shards(index)
        if reading and reading.resolve() in {(index.parent / name).resolve() for name in (index.name, *old)}:
            return
        index.unlink()
        for name in old:
            (index.parent / name).unlink(missing_ok=True)


def parse_size(size: int | str) -> int:
    """Bytes of `"5GB"`, `"500 MB"`, `"1.5GiB"` or a number.

    Raises:
        SaveError: Not a size.

    Example:
        >>> parse_size("1.5GB"), parse_size("2KiB"), parse_size(10)
        (1500000000, 2048, 10)
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Z]*)", str(size).strip().upper())
    count = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if count <= 0:
        raise SaveError(f'shard_size={size!r} is not a size: give bytes, or a text such as "5GB" or "500MB"')
    return count


def _groups(source: Source, limit: int) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    filled = 0
    for key in source.stored:
        size = source[key].nbytes
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(key)
        filled += size
    return groups


def _write_set(index: Path, source: Source, layouts: list[Layout]) -> None:
    sizes = [layout.size for layout in layouts]
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(pending(index, sum(sizes[at:]))) for at in range(len(layouts))]
        seals = [write_layout(file, layout) for file, layout in zip(files, layouts, strict=True)]
        names = _names(index, seals)
        old = _our_shards(index)
        last = stack.enter_context(pending(index))
        last.write(_index_text(_index(source, layouts, dict(zip(names, seals, strict=True)))))
        for file in (*files, last):  # a disk may say only now that it is full: nothing has a name yet
            file.sync()
        for file, name in zip(files, names, strict=True):
            file.commit(index.parent / name)
        last.commit()
    for name in old - set(names):
        with contextlib.suppress(OSError):
            (index.parent / name).unlink()


def _index(source: Source, layouts: list[Layout], seals: Mapping[str, str]) -> dict[str, Any]:
    """What the index says, of files by name with the hashes of their headers."""
    homes = {key: name for layout, name in zip(layouts, seals, strict=True) for key in layout.records}
    metadata: dict[str, Any] = {"total_size": sum(source[key].nbytes for key in source.stored)}
    metadata |= pack(source.notes, source.keys_in_order)
    metadata[SHARDS] = compact(dict(seals))
    order = {key: homes[key] for key in source.stored}
    index = {"metadata": {**metadata, SEAL: EMPTY}, "weight_map": order}
    index["metadata"][SEAL] = seal(_index_text(index))
    return index


def _index_text(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()


def _names(index: Path, seals: list[str]) -> list[str]:
    """The usual names, or names with the set's own mark where the usual ones hold something else."""
    stem, count = index.name.removesuffix(INDEX), len(seals)
    names = [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    if all(_seal_of(index.parent / name) in (None, seal) for name, seal in zip(names, seals, strict=True)):
        return names
    mark = f"{int.from_bytes(bytes.fromhex(''.join(seals)), 'big') % 0xFFFFFFFB:08x}"
    return [f"{stem}-{mark}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def _seal_of(path: Path) -> str | None:
    """The header's hash, empty for a foreign file, None where there is no file."""
    if not os.path.lexists(path):
        return None
    if path.is_symlink() or not path.is_file():
        return ""
    try:
        header = read_header(path)
        known = header.metadata.get(SEAL, "")
        return known if known == seal(header.raw) else ""
    except (FormatError, OSError):
        return ""


def _is_ours(index: Path) -> bool:
    """Whether an index was written here: its own hash holds."""
    try:
        data, raw = _read_index(index)
        return bool(data["metadata"].get(SEAL) == seal(raw))
    except (FormatError, OSError):
        return False


def _our_shards(index: Path) -> set[str]:
    """Files of an earlier save under this name: by the pattern of the name and by the hash of the header."""
    stem = re.escape(index.name.removesuffix(INDEX))
    shape = re.compile(rf"{stem}(-[0-9a-f]{{8}})?-\d{{5}}-of-\d{{5}}\.safetensors")
    return {name for name in os.listdir(index.parent) if shape.fullmatch(name) and _seal_of(index.parent / name)}


@contextlib.contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """Two saves of sets in one directory wait for each other."""
    if not directory.is_dir():
        raise SaveError(no_directory(directory, directory))
    with locked_directory(directory, wait=True):
        yield


def _read_index(path: Path) -> tuple[dict[str, Any], bytes]:
    size = path.stat().st_size
    if size > _LARGEST_INDEX:
        raise FormatError(f"{path} is not an index: {size:,} bytes")
    raw = path.read_bytes()
    if problem := foreign(raw[:64], path):
        raise FormatError(problem)
    index = parse_json(raw)
    homes, metadata = index.get("weight_map"), index.setdefault("metadata", {})
    if not isinstance(homes, dict) or not isinstance(metadata, dict):
        raise FormatError(f"{path} is not an index: it has no weight_map")
    for key, name in homes.items():
        if not isinstance(name, str) or not _inside(name):
            raise FormatError(f"{path} points outside its directory: {key!r} is in {str(name)[:80]!r}")
        if name.endswith(".json"):
            raise FormatError(f"{path} points at another index: {key!r} is in {name!r}")
    return index, raw


def _inside(name: str) -> bool:
    """Whether it is a name below the directory, in its only spelling."""
    path = PurePosixPath(name)
    inside = bool(path.name) and not path.is_absolute() and ".." not in path.parts
    return inside and str(path) == name and not set(name) & {"\\", "\0"}


def _check_distinct(index: Path, names: Sequence[str]) -> None:
    """Refuse a file that is missing, and one that the index has under two names."""
    seen: dict[tuple[int, int], str] = {}
    for name in names:
        path = index.parent / name
        if not os.path.isfile(path):  # unlike Path.is_file it says no to a name that no file can have
            raise FormatError(f"{index} names {name!r:.80}, which is not there: get the whole set")
        found = os.stat(path)
        other = seen.setdefault((found.st_dev, found.st_ino), name)
        if other != name:
            raise FormatError(f"{index} has one file under two names, {other!r:.80} and {name!r:.80}")
