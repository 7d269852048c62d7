"""Files of torch.save before version 1.6: one pickle after the other, then the storages.

They are read in place: the file says before each storage how long it is, so the storages are found by counting.
"""

import mmap
import struct
from typing import Any, Final

from modsurg.checkpoints.formats.file_io import Region
from modsurg.checkpoints.formats.remote import fetch
from modsurg.checkpoints.formats.torch_save.tensors import (
    Storage,
    TorchFile,
    loading,
    storage_dtype,
    storage_key,
)
from modsurg.checkpoints.formats.torch_save.unpickler import unpickle
from modsurg.errors import FormatError

_MAGIC: Final = 0x1950A86A20F9469CFC6C
_PROTOCOL: Final = 1001
_DAMAGE: Final = (struct.error, LookupError, TypeError, ValueError)


def is_legacy(start: bytes) -> bool:
    """Whether a file that begins so was written by torch.save before version 1.6."""
    return start.startswith(b"\x80") and _MAGIC.to_bytes(10, "little") in start[:32]


def is_tar(start: bytes) -> bool:
    """Whether a file that begins so is a tar archive."""
    return start[257:262] == b"ustar"


def read_legacy(whole: Region) -> TorchFile:
    """Open what torch.save wrote before version 1.6.

    The pickles: a magic number, a protocol number, the system, the object, the keys of the storages, which follow.

    Raises:
        FormatError: Cut off, damaged or lying.
    """
    expected: dict[str, Storage] = {}

    def persistent(saved: Any) -> object:
        if saved[0] == "module":
            return saved[1]
        kind, key, numel, view = saved[1], storage_key(saved[2]), saved[4], saved[5]
        storage = expected.setdefault(key, Storage(key, storage_dtype(kind), _count(numel)))
        return storage if view is None else Storage(key, storage.dtype, _count(view[2]), _count(view[1]))

    try:
        with _mapped(whole) as data:
            stream = _Stream(data, 0)
            if stream.unpickle() != _MAGIC or stream.unpickle() != _PROTOCOL:
                raise FormatError("it is of a protocol that torch never wrote")
            stream.unpickle()
            pickle = unpickle(data, loading(persistent), stream.at)
            stream.at = pickle.end
            places = {}
            for key in map(storage_key, stream.unpickle()):
                places[key] = stream.counted(whole, expected[key].dtype.itemsize)
    except _DAMAGE as error:
        raise _damaged(error) from None
    return TorchFile(pickle, places)


class _Stream:
    """Pickles, numbers and storages, one after the other."""

    def __init__(self, data: mmap.mmap, at: int) -> None:
        self.data = data
        self.at = at

    def unpickle(self) -> Any:
        part = unpickle(self.data, loading(_nothing), self.at)
        self.at = part.end
        return part.value

    def numbers(self, layout: str) -> tuple[int, ...]:
        found = struct.unpack_from(layout, self.data, self.at)
        self.at += struct.calcsize(layout)
        return found

    def counted(self, whole: Region, itemsize: int) -> Region:
        """The storage that begins here with the number of its elements."""
        nbytes = _count(self.numbers("<q")[0]) * itemsize
        region = Region(whole.fd, self.at, nbytes)
        self.at += nbytes
        if self.at > whole.nbytes:
            raise FormatError(f"it is cut off: a storage ends at byte {self.at:,}, and the file at {whole.nbytes:,}")
        return region


def _mapped(whole: Region) -> mmap.mmap:
    fetch(whole.fd)
    return mmap.mmap(whole.fd, whole.nbytes, prot=mmap.PROT_READ)


def _nothing(saved: object) -> object:
    raise FormatError("the file is damaged: a reference where there can be none")


def _count(number: Any) -> int:
    if type(number) is not int or not 0 <= number < 1 << 60:
        raise FormatError("the file is damaged: a length that can't be")
    return number


def _damaged(error: Exception) -> FormatError:
    return error if isinstance(error, FormatError) else FormatError(f"it is damaged or cut off ({error!r:.100})")
