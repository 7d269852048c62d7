"""Zip archives as torch writes them: records stored as they are, so that their bytes can be read in place."""

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Container
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final

from modsurg.checkpoints.formats.atomic import PendingFile
from modsurg.checkpoints.formats.file_io import PIECE, Region, read_into
from modsurg.errors import FormatError

_RECORD_LIMIT: Final = 256 << 20
_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR_64 = struct.Struct("<4sLQL")
_PADDING = struct.Struct("<2sH")
_SIZES_64 = struct.Struct("<2HQQ")
_PLACE_64 = struct.Struct("<2HQQQ")
_MAX_16, _MAX_32 = 0xFFFF, 0xFFFFFFFF
_DATE_1980 = 0x21
_ALIGNMENT = 64
_WORTH_A_THREAD = 1 << 20


class Archive:
    """The records of a zip archive that lies in a part of a file.

    Args:
        part: Where it lies; archives of torch.distributed.checkpoint lie inside other files.

    Raises:
        FormatError: It is no zip archive, is cut off, or its records lie.
    """

    def __init__(self, part: Region) -> None:
        self.part = part
        try:
            with zipfile.ZipFile(io.BufferedReader(_Window(part))) as file:
                records = file.infolist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OSError) as error:
            raise FormatError(
                f"it begins as a zip archive and is none: {error}. It was cut off or damaged: get it again"
            ) from None
        self._records = {info.filename: info for info in records}
        for info in records:
            if self._records[info.filename] is not info:
                raise FormatError(
                    f"record {info.filename!r} is in it twice, so readers would differ about what it holds"
                )
        self.root = self._find_root()

    def _find_root(self) -> str:
        """The directory in which torch keeps the records, with its slash."""
        for name in self._records:
            path = PurePosixPath(name)
            if path.name == "data.pkl" and len(path.parts) <= 2:
                return name.removesuffix("data.pkl")
        if any(name.endswith(".npy") for name in self._records):
            raise FormatError("it is an archive of numpy: open it with numpy.load")
        if any(name.endswith("model.json") for name in self._records):
            raise FormatError("it is TorchScript of torch 1.1 or older: open it with torch.jit.load(path).state_dict()")
        raise FormatError("it is a zip archive, but not one of torch.save: there is no data.pkl in it")

    def __contains__(self, name: str) -> bool:
        return self.root + name in self._records

    def region(self, name: str) -> Region:
        """Where the bytes of a record lie in the file.

        Raises:
            FormatError: No such record, compressed, or one that does not lie inside the file.
        """
        return self._stored(self._info(name))

    def _stored(self, info: zipfile.ZipInfo) -> Region:
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
            raise FormatError(
                f"record {self._short(info)!r} is compressed or encrypted, as torch.save never does: unpack it "
                "and zip it without compression (zip -0), or write it again with torch.save"
            )
        return self._extent(info)

    def _extent(self, info: zipfile.ZipInfo) -> Region:
        start = self.part.offset + info.header_offset
        inside = self.part.offset <= start < self.part.offset + self.part.nbytes
        header = os.pread(self.part.fd, _LOCAL.size, start) if inside else b""
        if len(header) < _LOCAL.size or not header.startswith(b"PK\x03\x04"):
            raise FormatError(f"record {info.filename!r} is not where the archive says: the file is damaged")
        *_, name_length, extra_length = _LOCAL.unpack(header)
        name = os.pread(self.part.fd, name_length, start + _LOCAL.size)
        if name.decode("utf-8" if info.flag_bits & 0x800 else "cp437", "replace") != info.orig_filename:
            raise FormatError(f"record {info.filename!r} has another name where it lies: the file is damaged")
        offset = start + _LOCAL.size + name_length + extra_length
        if offset + info.compress_size > self.part.offset + self.part.nbytes:
            raise FormatError(f"record {info.filename!r} goes beyond the end of the file: it was cut off or damaged")
        return Region(self.part.fd, offset, info.compress_size)

    def read(self, name: str) -> bytes:
        """A record that is no tensor, checked, and unpacked if need be: TorchScript compresses its code.

        Raises:
            FormatError: As `region`; also for a record over 256 MiB, and one whose checksum does not hold.
        """
        return self._content(self._info(name))

    def _content(self, info: zipfile.ZipInfo) -> bytes:
        if info.file_size > _RECORD_LIMIT:
            raise FormatError(
                f"record {self._short(info)!r} claims {info.file_size:,} bytes, which no file of torch needs"
            )
        deflated = info.compress_type == zipfile.ZIP_DEFLATED
        region = self._extent(info) if deflated else self._stored(info)
        data = bytearray(region.nbytes)
        read_into(region, memoryview(data))
        content = _inflate(data, info.file_size) if deflated else bytes(data)
        if _summed(info) and zlib.crc32(content) != info.CRC:
            raise FormatError(f"record {self._short(info)!r} is damaged: its checksum does not hold")
        return content

    def holds(self, name: str) -> bool | None:
        """Whether the checksum of a record holds, None if it has none; read through one small buffer."""
        return self._holds(self._info(name))

    def broken(self, known: Container[str]) -> str:
        """What is wrong with the first damaged record, `known` ones apart; empty if there is none."""
        for info in self._records.values():
            name = self._short(info)
            if name in known:
                continue
            try:
                self._extent(info)
                if info.compress_type != zipfile.ZIP_STORED:
                    self._content(info)
                elif self._holds(info) is False:
                    return f"record {name!r} is damaged: its checksum does not hold"
            except FormatError as error:
                return str(error)
        return ""

    def _holds(self, info: zipfile.ZipInfo) -> bool | None:
        if not _summed(info):
            return None
        region = self._stored(info)
        buffer = memoryview(bytearray(min(_WORTH_A_THREAD, region.nbytes)))
        crc = 0
        for start in range(0, region.nbytes, _WORTH_A_THREAD):
            piece = buffer[: region.nbytes - start]
            read_into(Region(region.fd, region.offset + start, len(piece)), piece)
            crc = zlib.crc32(piece, crc)
        return crc == info.CRC

    def _short(self, info: zipfile.ZipInfo) -> str:
        return info.filename.removeprefix(self.root)

    def _info(self, name: str) -> zipfile.ZipInfo:
        if name not in self:
            raise FormatError(f"record {name!r} is missing in the archive: the file was cut off or put together wrong")
        return self._records[self.root + name]


def _summed(info: zipfile.ZipInfo) -> bool:
    """Whether a checksum was stored: torch writes zeros when it was told to compute none."""
    return info.CRC != 0 or not info.file_size


def _inflate(data: bytes | bytearray, size: int) -> bytes:
    """Unpacked bytes, at most `size` of them: a bomb stops there and fails its checksum."""
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
    except zlib.error:
        return b""


class _Window(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, part: Region) -> None:
        self._part = part
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._part.nbytes}[whence]
        if at < 0:
            raise OSError("a place before the beginning")
        self._at = at
        return at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # the stub has no name for its type
        size = max(0, min(len(buffer), self._part.nbytes - self._at))
        count = os.preadv(self._part.fd, [memoryview(buffer)[:size]], self._part.offset + self._at)
        self._at += count
        return count


@dataclass(frozen=True, slots=True)
class _Written:
    name: bytes
    crc: int
    nbytes: int
    offset: int


class ArchiveWriter:
    """Writes records one after the other, each at a multiple of 64 bytes, with nothing in it that changes by the day.

    Args:
        file: Where to.
        root: The directory of the records, with its slash.
    """

    def __init__(self, file: PendingFile, root: str) -> None:
        self._file = file
        self._root = root
        self._written: list[_Written] = []
        self._pool = ThreadPoolExecutor(1)

    def add(self, name: str, data: bytes | memoryview) -> None:
        """Write one record; large ones are checksummed while they are written."""
        start = self._file.written
        full_name = (self._root + name).encode()
        header = _local_header(full_name, len(data), start)
        self._file.write(header)
        crc = 0
        for at in range(0, len(data), PIECE):
            crc = self._write(data[at : at + PIECE], crc)
        self._file.patch(struct.pack("<L", crc), start + 14)
        self._written.append(_Written(full_name, crc, len(data), start))

    def _write(self, piece: bytes | memoryview, crc: int) -> int:
        if len(piece) < _WORTH_A_THREAD:
            self._file.write(piece)
            return zlib.crc32(piece, crc)
        sum_ = self._pool.submit(zlib.crc32, piece, crc)
        try:
            self._file.write(piece)
        finally:
            crc = sum_.result()
        return crc

    def finish(self) -> None:
        """Write the list of the records."""
        self._pool.shutdown()
        start = self._file.written
        for record in self._written:
            self._file.write(_central_header(record))
        self._file.write(_end(len(self._written), self._file.written - start, start))


def archive_size(root: str, sizes: dict[str, int]) -> int:
    """How many bytes an archive of records with these sizes takes."""
    at = central = 0
    for name, nbytes in sizes.items():
        full_name = (root + name).encode()
        central += len(_central_header(_Written(full_name, 0, nbytes, at)))
        at += len(_local_header(full_name, nbytes, at)) + nbytes
    return at + central + len(_end(len(sizes), central, at))


def _local_header(name: bytes, nbytes: int, start: int) -> bytes:
    """The header of a record, padded so that its bytes begin at a multiple of 64."""
    extra = _SIZES_64.pack(1, 16, nbytes, nbytes) if nbytes >= _MAX_32 else b""
    size = min(nbytes, _MAX_32)
    padding = -(start + _LOCAL.size + len(name) + len(extra) + _PADDING.size) % _ALIGNMENT
    extra += _PADDING.pack(b"FB", padding) + b"Z" * padding
    fields = (45 if nbytes >= _MAX_32 else 20, 0x800, 0, 0, _DATE_1980, 0, size, size, len(name), len(extra))
    return _LOCAL.pack(b"PK\x03\x04", *fields) + name + extra


def _central_header(record: _Written) -> bytes:
    large = record.nbytes >= _MAX_32 or record.offset >= _MAX_32
    extra = _PLACE_64.pack(1, 24, record.nbytes, record.nbytes, record.offset) if large else b""
    size, offset = (_MAX_32, _MAX_32) if large else (record.nbytes, record.offset)
    version = 45 if large else 20
    fields = (version, version, 0x800, 0, 0, _DATE_1980, record.crc, size, size, len(record.name), len(extra))
    return _CENTRAL.pack(b"PK\x01\x02", *fields, 0, 0, 0, 0, offset) + record.name + extra


def _end(count: int, size: int, start: int) -> bytes:
    large = count >= _MAX_16 or size >= _MAX_32 or start >= _MAX_32
    end_64 = _END_64.pack(b"PK\x06\x06", _END_64.size - 12, 45, 45, 0, 0, count, count, size, start)
    locator = _LOCATOR_64.pack(b"PK\x06\x07", 0, start + size, 1)
    count, size, start = min(count, _MAX_16), min(size, _MAX_32), min(start, _MAX_32)
    end = _END.pack(b"PK\x05\x06", 0, 0, count, count, size, start, 0)
    return (end_64 + locator if large else b"") + end
