"""The format of torch.save: `.pt`, `.pth`, `.bin`. Read without torch.load, straight from the storages in the file."""

import json
import os
import sys
import weakref
from pathlib import Path
from typing import Any

import torch

from modsurg.checkpoints.formats.file_io import Region
from modsurg.checkpoints.formats.remote import pread
from modsurg.checkpoints.formats.safetensors.header import foreign
from modsurg.checkpoints.formats.source import Entry, Notes, Source
from modsurg.checkpoints.formats.torch_save.find_state import Found, find_state, rebuild
from modsurg.checkpoints.formats.torch_save.legacy import is_legacy, is_tar, read_legacy
from modsurg.checkpoints.formats.torch_save.tensors import Storage, Stored, TorchFile, loading, stored_id
from modsurg.checkpoints.formats.torch_save.unpickler import unpickle
from modsurg.checkpoints.formats.torch_save.writer import METADATA
from modsurg.checkpoints.formats.torch_save.zip import Archive
from modsurg.errors import FormatError, TrustError
from modsurg.structure.schema import KEY as TREE


def read_zip(part: Region) -> TorchFile:
    """Open what torch has written since version 1.6, and TorchScript: an archive of a pickle and its storages.

    Args:
        part: Where the archive lies in a file.

    Raises:
        FormatError: Cut off, damaged or lying.
    """
    archive = Archive(part)
    order = archive.read("byteorder") if "byteorder" in archive else sys.byteorder.encode()
    if order not in (b"little", b"big"):
        raise FormatError(f"its byte order is {order!r:.40}, which is none")
    storages: dict[str, Region] = {}

    def persistent(saved: Any) -> Storage:
        storage = stored_id(saved)
        if storage.key not in storages:
            storages[storage.key] = archive.region(f"data/{storage.key}")
        return storage

    archive.region("data.pkl")  # refuses a packed one, which would be a thousand times as long as the file
    pickle = unpickle(archive.read("data.pkl"), loading(persistent))
    return TorchFile(pickle, storages, archive, order.decode() != sys.byteorder)


def open_torch(fd: int, path: Path) -> TorchFile:
    """Open what torch.save wrote, of whatever age.

    Raises:
        FormatError: It is nothing of that kind.
    """
    whole = Region(fd, 0, os.fstat(fd).st_size)
    start = pread(fd, 512, 0)
    if problem := foreign(start[:64], path):
        raise FormatError(problem.removeprefix(f"{path} is ").join(("it is ", "")))
    if start.startswith(b"PK"):
        return read_zip(whole)
    if is_tar(start):
        raise FormatError(
            "it is a tar archive: unpack it, and open what is in it. If torch 0.1 wrote it, in 2017 or before: "
            "torch.load(path, weights_only=False), if you trust whoever made it, and save that again"
        )
    if is_legacy(start):
        return read_legacy(whole)
    if not start:
        raise FormatError("it is empty: it was never written, or the copy failed")
    if start[8:9] == b"{":
        raise FormatError(f"it is a safetensors file: rename it to {path.stem}.safetensors")
    if start.startswith(b"\x80"):
        raise FormatError(
            "it is not a file of torch.save but a plain pickle. If you trust whoever made it: save_state({key: "
            "torch.as_tensor(value) for key, value in pickle.load(open(path, 'rb')).items()}, 'state.safetensors')"
        )
    raise FormatError(f"it is not a file of torch.save: it begins with {start[:8]!r}")


class TorchSource(Source):
    """The state in a file of torch.save, found inside a checkpoint if it is one, or at a `part` of it.

    Raises:
        FormatError: The file is cut off, foreign or lying, or has no state in it.
        TrustError: The file wants something done that is not data. Nothing of it ran.
    """

    def __init__(self, path: Path, part: str | None = None) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._close = weakref.finalize(self, os.close, fd)
        try:
            self._file = open_torch(fd, path)
            found = find_state(self._file.pickle, self._file.code, part)
            self._tensors = found.tensors
            for key, stored in found.tensors.items():
                _place(self._file, key, stored)
            self._holds: dict[str, bool | None] = {}
            notes = self._notes(found)
        except (FormatError, TrustError) as error:
            self.close()
            raise type(error)(f"{path}: {error}") from None
        self.taken, self.left, self.plain = found.taken, list(found.left), found.plain
        self.left_tensors, self.unreadable = found.left_tensors(), found.unreadable
        entries = {key: Entry(key, item.dtype, item.shape, item.nbytes) for key, item in found.tensors.items()}
        super().__init__(path, entries, notes)

    def _notes(self, found: Found) -> Notes:
        first: dict[object, str] = {}
        ties = {}
        for key, stored in found.tensors.items():
            owner = first.setdefault(stored.identity, key) if stored.numel else key
            if owner != key:
                ties[key] = owner
        extra = {key: rebuild(value, key, self._file.read) for key, value in found.extra.items()}
        tree = {} if found.tree is None else {TREE: json.dumps(found.tree)}
        return Notes({**_metadata(self._file), **tree}, ties, extra, found.versions, found.order)

    def region(self, key: str) -> Region | None:
        """Where the values lie, None if they are not in order or of the other byte order."""
        if not self._close.alive:
            raise ValueError(f"{self.path} was closed")
        stored = self._tensors[key]
        if not stored.contiguous or self._file.swaps(stored):
            return None
        place = self._file.places[stored.storage.key]
        return Region(place.fd, place.offset + stored.first, self[key].nbytes)

    def read(self, key: str) -> torch.Tensor:
        """The values, with the strides that they were saved with."""
        return super().read(key) if self.region(key) else self._file.read(self._tensors[key])

    def check(self, key: str) -> bool | None:
        """Whether the checksum of the tensor's storage holds; None if it has none, as before torch 1.6."""
        storage = self._tensors[key].storage.key
        if self._file.archive is None:
            return None
        if storage not in self._holds:
            self._holds[storage] = self._file.archive.holds(f"data/{storage}")
        return self._holds[storage]

    def rest(self) -> str:
        """What is wrong with the records besides those of the state, such as an optimizer's."""
        archive = self._file.archive
        return archive.broken({f"data/{key}" for key in self._holds}) if archive else ""

    def close(self) -> None:
        """Close the file."""
        self._close()


def _place(file: TorchFile, key: str, stored: Stored) -> None:
    try:
        file.place(stored.storage)
    except FormatError as error:
        raise FormatError(f"{key}: {error}") from None


def _metadata(file: TorchFile) -> dict[str, str]:
    """The user's strings, if `write_torch` kept any."""
    if file.archive is None or METADATA not in file.archive:
        return {}
    try:
        strings = json.loads(file.archive.read(METADATA))
    except ValueError as error:
        raise FormatError(f"its record {METADATA} is damaged: {error}") from None
    if not isinstance(strings, dict) or not all(isinstance(text, str) for text in strings.values()):
        raise FormatError(f"its record {METADATA} is damaged: no object of strings")
    return strings
