"""A directory of torch.distributed.checkpoint (DCP): `.metadata` says which piece of which tensor is in which file.

Read without DCP, whose own reader would run any pickle that lies there as `.metadata`; written by DCP itself.
"""

import json
import os
import stat
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from operator import add, gt, lt
from pathlib import Path
from typing import Any, Final

import torch

from modsurg.checkpoints.formats.file_io import Region
from modsurg.checkpoints.formats.safetensors.metadata import unpack
from modsurg.checkpoints.formats.source import Entry, Notes, Source
from modsurg.checkpoints.formats.torch_save.find_state import Found, Pickled, find_state, rebuild
from modsurg.checkpoints.formats.torch_save.reader import read_zip
from modsurg.checkpoints.formats.torch_save.tensors import Storage, Stored, TorchFile, is_countable, loading, stored_id
from modsurg.checkpoints.formats.torch_save.unpickler import Made, Name, Unpickled, shown, unpickle
from modsurg.errors import FormatError, TrustError

INDEX: Final = ".metadata"
NOTES: Final = "modsurg.json"
_LIMIT: Final = 1 << 30
_MODULE: Final = "torch.distributed.checkpoint."
_HARMLESS: Final = (_MODULE, "torch.serialization._get_layout", "pathlib.")


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a tensor, and the part of a file where it is pickled."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int

    @property
    def end(self) -> tuple[int, ...]:
        """The corner opposite `start`."""
        return tuple(map(add, self.start, self.shape))


@dataclass(frozen=True)
class _Index:
    """What `.metadata` says.

    Attributes:
        state: The saved dictionary with its nesting; leaves are `Stored` or `Pickled`.
        pieces: Flat name -> where its pieces are.
    """

    state: dict[Any, Any]
    pieces: Mapping[str, list[Piece]]


class DistributedSource(Source):
    """The state in a directory that torch.distributed.checkpoint wrote, on however many machines.

    Raises:
        FormatError: The directory is incomplete or damaged.
        TrustError: `.metadata` names something that is none of DCP's own classes. Nothing of it ran.
    """

    def __init__(self, path: Path) -> None:
        self._fds: dict[str, int] = {}
        self._close = weakref.finalize(self, _close_all, self._fds)
        self._directory = path.absolute()
        try:
            index = _read_index(path / INDEX)
            self._pieces = index.pieces
            found = find_state(Unpickled(index.state, 0, []))
            self._tensors = found.tensors
            notes = self._notes(found)
        except (FormatError, TrustError) as error:
            self.close()
            raise type(error)(f"{path}: {error}") from None
        self.taken, self.left, self.left_tensors = found.taken, list(found.left), found.left_tensors()
        entries = {key: Entry(key, item.dtype, item.shape, item.nbytes) for key, item in found.tensors.items()}
        super().__init__(path, entries, notes)

    def _notes(self, found: Found) -> Notes:
        extra = {key: rebuild(value, key, self._leaf) for key, value in found.extra.items()}
        kept = _read_notes(self._directory / NOTES)
        ties = {key: to for key, to in kept.ties.items() if key in found.tensors and to in found.tensors}
        return Notes(kept.metadata, ties, extra, kept.versions, found.order)

    def _leaf(self, leaf: Stored | Pickled) -> object:
        if isinstance(leaf, Stored):
            return self._read(leaf)
        (piece,) = self._pieces[leaf.key]
        file = self._open(piece)
        return rebuild(file.pickle.value, leaf.key, file.read)

    def region(self, key: str) -> Region | None:
        """Where the values lie, if they are all in one piece."""
        pieces = self._pieces[self._tensors[key].storage.key]
        if len(pieces) != 1 or not self[key].nbytes:
            return None
        file, stored = self._open_tensor(pieces[0], self._tensors[key].dtype)
        if not stored.contiguous or file.swaps(stored):
            return None
        place = file.place(stored.storage)
        return Region(place.fd, place.offset + stored.first, stored.nbytes)

    def read(self, key: str) -> torch.Tensor:
        """The values, put together from their pieces."""
        return self._read(self._tensors[key])

    def _read(self, wanted: Stored) -> torch.Tensor:
        tensor = torch.empty(wanted.shape, dtype=wanted.dtype, device="cpu")
        for piece in self._pieces[wanted.storage.key]:
            file, stored = self._open_tensor(piece, wanted.dtype)
            if piece.shape == wanted.shape:
                return file.read(stored)
            box = tuple(slice(at, at + size) for at, size in zip(piece.start, piece.shape, strict=True))
            tensor[box] = file.read(stored)
        return tensor

    def check(self, key: str) -> bool | None:
        """Whether the checksums of the tensor's pieces hold."""
        wanted = self._tensors[key]
        for piece in self._pieces[wanted.storage.key]:
            file, stored = self._open_tensor(piece, wanted.dtype)
            holds = file.archive.holds(f"data/{stored.storage.key}") if file.archive else None
            if not holds:
                return holds
        return True

    def _open_tensor(self, piece: Piece, dtype: torch.dtype) -> tuple[TorchFile, Stored]:
        file = self._open(piece)
        stored = file.pickle.value
        if not isinstance(stored, Stored) or stored.shape != piece.shape or stored.dtype != dtype:
            raise FormatError(f"{self._directory / piece.file}: at byte {piece.offset:,} is not what {INDEX} says")
        file.place(stored.storage)
        return file, stored

    def _open(self, piece: Piece) -> TorchFile:
        if not self._close.alive:
            raise ValueError(f"{self._directory} was closed")
        path = self._directory / piece.file
        if piece.file not in self._fds:
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            except OSError as error:
                raise FormatError(
                    f"{path} can't be opened ({error.strerror}); {INDEX} says that it is needed"
                ) from None
            self._fds[piece.file] = fd
        fd = self._fds[piece.file]
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_size < piece.offset + piece.nbytes:
            raise FormatError(f"{path} is cut off at byte {info.st_size:,}: {INDEX} says that there is more")
        try:
            return read_zip(Region(fd, piece.offset, piece.nbytes))
        except FormatError as error:
            raise FormatError(f"{path}, byte {piece.offset:,}: {error}") from None

    def rest(self) -> str:
        """What is wrong with the pieces besides those of the state."""
        known = {stored.storage.key for stored in self._tensors.values()}
        for piece in (piece for name, pieces in self._pieces.items() if name not in known for piece in pieces):
            try:
                archive = self._open(piece).archive
                problem = archive.broken(()) if archive else ""
            except FormatError as error:
                return str(error)
            if problem:
                return f"{piece.file}, byte {piece.offset:,}: {problem}"
        return ""

    def close(self) -> None:
        """Close the files."""
        self._close()


def _close_all(fds: dict[str, int]) -> None:
    for fd in fds.values():
        os.close(fd)


def _read_index(path: Path) -> _Index:
    data = _contents(path)
    pickle = unpickle(data, loading(stored_id))
    for made in pickle.made:
        if not isinstance(made.maker, Name) or not str(made.maker).startswith(_HARMLESS):
            raise TrustError(
                f"{INDEX} names {shown(made.maker)}, not a class of torch.distributed.checkpoint. Nothing of it "
                "ran; the directory is damaged or made to do harm"
            )
    try:
        return _understand(_fields(pickle.value, "Metadata"))
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{INDEX} is damaged ({error!r:.80})") from None


def _understand(metadata: Mapping[str, Any]) -> _Index:
    places = {}
    for index, info in metadata["storage_data"].items():
        key = _fields(index, "MetadataIndex")
        offset = key.get("offset")
        places[_text(key["fqn"]), None if offset is None else _numbers(offset)] = _fields(info, "_StorageInfo")
    paths = metadata.get("planner_data") or {}
    state: dict[Any, Any] = {}
    pieces = {}
    for name, described in metadata["state_dict_metadata"].items():
        if described.maker.name == "BytesStorageMetadata":
            leaf: Stored | Pickled = Pickled(name)
            pieces[name] = [_piece((), (), places[name, None])]
        else:
            leaf, pieces[name] = _tensor(name, _fields(described, "TensorStorageMetadata"), places)
        parent = state
        path = paths.get(name, (name,))
        if not path or not all(type(part) in (str, int) for part in path):
            raise FormatError(f"{INDEX} is damaged: {shown(path)} stands for the place of {name}")
        for part in path[:-1]:
            parent = parent.setdefault(part, {})
        parent[path[-1]] = leaf
    return _Index(state, pieces)


def _tensor(
    name: str, described: Mapping[str, Any], places: Mapping[tuple[str, Any], Mapping[str, Any]]
) -> tuple[Stored, list[Piece]]:
    shape = _numbers(described["size"])
    kind = _fields(described["properties"], "TensorProperties", tuple)[0]
    dtype = getattr(torch, kind.name, None)
    if kind.module != "torch" or not isinstance(dtype, torch.dtype):
        raise FormatError(f"{name} is of dtype {shown(kind)}, which this version of torch does not have")
    if not is_countable(shape):
        raise FormatError(f"{name} has a shape that no memory can have: {str(shape)[:80]}")
    pieces = []
    for chunk in described["chunks"]:
        box = _fields(chunk, "ChunkStorageMetadata")
        start, size = _numbers(box["offsets"]), _numbers(box["sizes"])
        if not len(start) == len(size) == len(shape) or any(map(gt, map(add, start, size), shape)):
            raise FormatError(f"{name}: {INDEX} gives a piece {size} at {start} of a tensor {shape}")
        pieces.append(_piece(start, size, places[name, start]))
    if sum(prod(piece.shape) for piece in pieces) != prod(shape) or _overlap(pieces):
        raise FormatError(f"{name}: the pieces that {INDEX} lists are not the whole of a tensor {shape}")
    stride = tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return Stored(Storage(name, dtype, prod(shape)), dtype, 0, shape, stride), pieces


def _overlap(pieces: Sequence[Piece]) -> bool:
    """Whether any two of them share a value."""
    filled = [piece for piece in pieces if prod(piece.shape)]
    axes = range(len(filled[0].start)) if filled else ()
    axis = max(axes, key=lambda axis: len({piece.start[axis] for piece in filled}), default=None)
    open_: list[Piece] = []
    for piece in filled if axis is None else sorted(filled, key=lambda piece: piece.start[axis]):
        open_ = [other for other in open_ if axis is None or other.end[axis] > piece.start[axis]]
        for other in open_:
            low, high = map(max, piece.start, other.start), map(min, piece.end, other.end)
            if all(map(lt, low, high)):
                return True
        open_.append(piece)
    return False


def _piece(start: tuple[int, ...], shape: tuple[int, ...], info: Mapping[str, Any]) -> Piece:
    file, offset, nbytes = info["relative_path"], *_numbers((info["offset"], info["length"]))
    if info.get("transform_descriptors"):
        raise FormatError(f"{file} was written through an extension (compressed, say): only dcp.load can read it")
    if not isinstance(file, str) or file != os.path.basename(file) or file in ("", ".", ".."):
        raise FormatError(f"{INDEX} refers to a file {shown(file)} outside the directory")
    return Piece(start, shape, file, offset, nbytes)


def _fields(made: Any, kind: str, holder: type = dict) -> Any:
    """The attributes of one of DCP's objects."""
    known = isinstance(made, Made) and isinstance(made.maker, Name) and isinstance(made.state, holder)
    if not known or not str(made.maker).startswith(_MODULE) or made.maker.name != kind:
        raise FormatError(f"{INDEX} is damaged: no {kind} where one should be")
    return made.state


def _text(value: Any) -> str:
    if type(value) is not str:
        raise FormatError(f"{INDEX} is damaged: {shown(value)} stands for a name")
    return value


def _numbers(values: Any) -> tuple[int, ...]:
    if not all(type(n) is int and 0 <= n < 1 << 60 for n in values):
        raise FormatError(f"{INDEX} is damaged: {shown(values)} stands for sizes")
    return tuple(values)


def _read_notes(path: Path) -> Notes:
    """What `write_distributed` keeps beside DCP's own files."""
    if not path.exists():
        return Notes()
    try:
        strings = json.loads(_contents(path))
        return unpack(strings["notes"], strings["stored"])
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{path.name} is damaged: {error}") from None


def _contents(path: Path) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe must not be waited for
        with os.fdopen(fd, "rb") as file:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                raise FormatError(f"{path.name} is not a file")
            if found.st_size > _LIMIT:
                raise FormatError(f"{path.name} has {found.st_size:,} bytes, which no checkpoint needs")
            return file.read()
    except OSError as error:
        raise FormatError(f"{path.name} can't be read ({error.strerror})") from None
