"""Zip archives as torch writes them: records stored as they are, so that their bytes can be read in place."""

import struct
import zipfile
import zlib
from collections.abc import Container
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self

from modsurg.checkpoints.formats.atomic import PendingFile
from modsurg.checkpoints.formats.file_io import PIECE, Region, read_into
from modsurg.checkpoints.formats.remote import pread
from modsurg.errors import FormatError

_RECORD_LIMIT: Final = 256 << 20
_LISTING_LIMIT: Final = 256 << 20
_LONGEST_NAME: Final = 500  # torch's own reader cuts names at 512
_LOCAL: Final = struct.Struct("<4s5H3L2H")
_CENTRAL: Final = struct.Struct("<4s6H3L5H2L")
_END: Final = struct.Struct("<4s4H2LH")
_END_64: Final = struct.Struct("<4sQ2H2L4Q")
_LOCATOR_64: Final = struct.Struct("<4sLQL")
_FIELD: Final = struct.Struct("<2sH")
_SIZES_64: Final = 20
_MAX_16, _MAX_32 = 0xFFFF, 0xFFFFFFFF
_DESCRIBED_LATER: Final = 0x8
_DIRECTORY: Final = 0x10
_FLAGS: Final = 0x800 | _DESCRIBED_LATER | 0x6  # UTF-8 names, and how hard it was compressed
_ALIGNMENT: Final = 64
_STEP: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class _Record:
    """One record as the list at the end of the archive has it; `start` is where its header lies in the archive."""

    name: bytes
    flags: int
    method: int
    crc: int
    packed: int
    size: int
    start: int

    @property
    def text(self) -> str:
        return self.name.decode(errors="replace")


class Archive:
    """The records of a zip archive that lies in a part of a file.

    Readers of zip archives look for the list of the records in different ways. An archive is accepted only if all ways
    lead to the same list, and every record has one place and one name.

    Args:
        part: Where it lies; archives of torch.distributed.checkpoint lie inside other files.

    Raises:
        FormatError: It is not a zip archive, is cut off, or readers could see different records in it.
    """

    def __init__(self, part: Region) -> None:
        self.part = part
        records, listing = _read_records(part)
        self._records = {record.text: record for record in records}
        self._regions: dict[str, Region] = {}
        ends = 0
        for record in sorted(records, key=lambda record: record.start):
            if record.start < ends or (record.start and not self._regions):
                raise FormatError(f"record {record.text!r} is not where the archive says: the file is damaged")
            region = self._regions[record.text] = self._find(record)
            ends = region.offset + region.nbytes - part.offset
        if ends > listing:
            raise FormatError("its records go beyond the beginning of their list: the file is damaged")
        self.root = self._find_root()

    def _find_root(self) -> str:
        """The directory in which torch keeps the records, with its slash."""
        first = next(iter(self._records), "").partition("/")[0] + "/"
        outside = next((name for name in self._records if not name.startswith(first)), None)
        if outside is None and f"{first}data.pkl" in self._records:
            return first
        if any(name.endswith(".npy") for name in self._records):
            raise FormatError("it is an archive of numpy: open it with numpy.load")
        if any(name.endswith("/archive_format") or "/serialized_" in name for name in self._records):
            raise FormatError(
                "it is a program of torch.export: save_state(torch.export.load(path).state_dict, 'state.safetensors')"
            )
        if any(name.endswith("model.json") for name in self._records):
            raise FormatError("it is TorchScript of torch 1.1 or older: open it with torch.jit.load(path).state_dict()")
        if outside is not None and any(name.endswith("data.pkl") for name in self._records):
            raise FormatError(f"record {outside[:80]!r} is outside the directory {first!r} of the others")
        raise FormatError("it is a zip archive, but not one of torch.save: there is no data.pkl in it")

    def __contains__(self, name: str) -> bool:
        return self.root + name in self._records

    def region(self, name: str) -> Region:
        """Where the bytes of a record lie in the file.

        Raises:
            FormatError: No such record, or a compressed one.
        """
        return self._stored(self._record(name))

    def _stored(self, record: _Record) -> Region:
        if record.method != zipfile.ZIP_STORED:
            raise FormatError(
                f"record {self._short(record)!r} is compressed, as torch.save never does: unpack it and zip it without "
                "compression (zip -0), or write it again with torch.save"
            )
        return self._regions[record.text]

    def _find(self, record: _Record) -> Region:
        """Where the bytes lie, once the header before them says the same as the list."""
        start = self.part.offset + record.start
        header = pread(self.part.fd, _LOCAL.size + len(record.name), start)
        if len(header) < _LOCAL.size or not header.startswith(b"PK\x03\x04"):
            raise FormatError(f"record {record.text!r} is not where the archive says: the file is damaged")
        _, _, flags, method, _, _, crc, packed, size, name_length, extra_length = _LOCAL.unpack(header[: _LOCAL.size])
        if name_length != len(record.name) or header[_LOCAL.size :] != record.name:
            raise FormatError(f"record {record.text!r} has another name where it lies: the file is damaged")
        later = (0,) if flags & _DESCRIBED_LATER else ()
        same = zip((crc, packed, size), (record.crc, record.packed, record.size), strict=True)
        if (flags, method) != (record.flags, record.method) or not all(
            told in (known, _MAX_32, *later) for told, known in same
        ):
            raise FormatError(f"record {record.text!r} is described in two ways: the file is damaged")
        offset = start + _LOCAL.size + name_length + extra_length
        return Region(self.part.fd, offset, record.packed)

    def read(self, name: str) -> bytes:
        """A record that is not a tensor, checked, and unpacked if need be: TorchScript compresses its code.

        Raises:
            FormatError: As `region`; also for a record over 256 MiB, and one whose checksum does not hold.
        """
        return self._content(self._record(name))

    def _content(self, record: _Record) -> bytes:
        if record.size > _RECORD_LIMIT:
            raise FormatError(
                f"record {self._short(record)!r} claims {record.size:,} bytes, which no file of torch needs"
            )
        region = self._regions[record.text]
        content = bytearray(region.nbytes)
        read_into(region, memoryview(content))
        data = _inflate(content, record.size) if record.method == zipfile.ZIP_DEFLATED else bytes(content)
        if data is None or (_summed(record) and zlib.crc32(data) != record.crc):
            raise FormatError(f"record {self._short(record)!r} is damaged: its checksum does not hold")
        return data

    def holds(self, name: str) -> bool | None:
        """Whether the checksum of a record holds, None if it has none; read through one small buffer."""
        return self._holds(self._record(name))

    def broken(self, known: Container[str]) -> str:
        """What is wrong with the first damaged record, `known` ones apart; empty if there is none."""
        for record in self._records.values():
            name = self._short(record)
            if name in known:
                continue
            try:
                if record.method != zipfile.ZIP_STORED:
                    self._content(record)
                elif self._holds(record) is False:
                    return f"record {name!r} is damaged: its checksum does not hold"
            except FormatError as error:
                return str(error)
        return ""

    def _holds(self, record: _Record) -> bool | None:
        if not _summed(record):
            return None
        region = self._stored(record)
        buffer = memoryview(bytearray(min(_STEP, region.nbytes)))
        crc = 0
        for start in range(0, region.nbytes, _STEP):
            piece = buffer[: region.nbytes - start]
            read_into(Region(region.fd, region.offset + start, len(piece)), piece)
            crc = zlib.crc32(piece, crc)
        return crc == record.crc

    def _short(self, record: _Record) -> str:
        return record.text.removeprefix(self.root)

    def _record(self, name: str) -> _Record:
        if name not in self:
            raise FormatError(f"record {name!r} is missing in the archive: the file was cut off or put together wrong")
        return self._records[self.root + name]


def _summed(record: _Record) -> bool:
    """Whether a checksum was stored: torch writes zeros when it was told to compute none."""
    return record.crc != 0 or not record.size


def _inflate(data: bytes | bytearray, size: int) -> bytes | None:
    """Unpacked bytes, if they are `size` of them and the packed ones end there: a bomb stops at that size."""
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        content = unpacker.decompress(data, size + 1)
    except zlib.error:
        return None
    return content if len(content) == size and unpacker.eof and not unpacker.unused_data else None


def _read_records(part: Region) -> tuple[list[_Record], int]:
    """The list at the end of the archive, each entry of it checked, and where in the archive it begins."""
    count, nbytes, start = _read_end(part)
    listing = bytearray(nbytes)
    read_into(Region(part.fd, part.offset + start, nbytes), memoryview(listing))
    records: list[_Record] = []
    at = 0
    for _ in range(count):
        if nbytes - at < _CENTRAL.size or listing[at : at + 4] != b"PK\x01\x02":
            raise _damaged("its list of records is damaged")
        fields = _CENTRAL.unpack_from(listing, at)
        ends = at + _CENTRAL.size + sum(fields[10:13])
        if ends > nbytes:
            raise _damaged("its list of records is damaged")
        records.append(_read_record(fields, bytes(listing[at + _CENTRAL.size : ends])))
        at = ends
    if at != nbytes:
        raise _damaged("its list of records is longer than it says")
    seen: dict[str, _Record] = {}
    for record in records:
        other = seen.setdefault(record.text.casefold(), record)
        if other is not record:
            what = "is in it twice" if other.name == record.name else f"and {other.text!r} differ in case only"
            raise FormatError(f"record {record.text!r} {what}, so readers would differ about what it holds")
    return records, start


def _read_record(fields: tuple[Any, ...], rest: bytes) -> _Record:
    flags, method, crc, packed, size, name_length, extra_length = fields[3], fields[4], *fields[7:12]
    disk, start = fields[13], fields[16]
    name, extra = rest[:name_length], rest[name_length : name_length + extra_length]
    wide = [value for value in (size, packed, start) if value == _MAX_32]
    sizes = iter(_wide_values(extra, len(wide)))
    size, packed, start = (next(sizes) if value == _MAX_32 else value for value in (size, packed, start))
    record = _Record(name, flags, method, crc, packed, size, start)
    if not 0 < len(name) <= _LONGEST_NAME or b"\0" in name or b"\\" in name:
        raise FormatError(f"record {record.text[:80]!r} has a name that readers take in different ways")
    try:
        name.decode()
    except UnicodeDecodeError:
        raise FormatError(f"record {record.text[:80]!r} has a name that is not UTF-8 text") from None
    if disk or flags & ~_FLAGS or method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise FormatError(f"record {record.text!r} is encrypted or compressed in a way that torch never uses")
    if size and (name.endswith(b"/") or fields[15] & _DIRECTORY):  # torch's reader gives memory as it was for these
        raise FormatError(f"record {record.text!r} is a directory with contents: the file is damaged")
    if method == zipfile.ZIP_STORED and packed != size:
        raise FormatError(f"record {record.text!r} is described in two ways: the file is damaged")
    return record


def _wide_values(extra: bytes, count: int) -> list[int]:
    """The numbers of 64 bits that stand in for `count` of 32 bits; none without need, and in one field only."""
    found: list[bytes] = []
    at = 0
    while at < len(extra):
        kind, length = _FIELD.unpack_from(extra, at) if len(extra) - at >= _FIELD.size else (b"", _MAX_16)
        at += _FIELD.size + length
        if at > len(extra):
            raise _damaged("its list of records is damaged")
        if kind == b"\x01\x00":
            found.append(extra[at - length : at])
    if len(found) != bool(count) or (found and len(found[0]) != 8 * count):
        raise _damaged("its list of records gives sizes in two ways")
    return list(struct.unpack(f"<{count}Q", found[0])) if found else []


def _read_end(part: Region) -> tuple[int, int, int]:
    """How many records there are, how long their list is, and where it begins in the archive."""
    size = min(part.nbytes, _END.size + _LOCATOR_64.size + _END_64.size)
    tail = pread(part.fd, size, part.offset + part.nbytes - size)
    if len(tail) < _END.size or not tail[-_END.size :].startswith(b"PK\x05\x06"):
        raise _damaged("its list of records is not at its end")
    _, disk, first, here, count, nbytes, start, comment = _END.unpack(tail[-_END.size :])
    ends = part.nbytes - _END.size
    wide = tail[: -_END.size]
    if wide[-_LOCATOR_64.size :].startswith(b"PK\x06\x07"):
        _, first_64, end_at, disks = _LOCATOR_64.unpack(wide[-_LOCATOR_64.size :])
        ends -= _LOCATOR_64.size + _END_64.size
        found = wide[: _END_64.size]
        if (first_64, end_at, disks) != (0, ends, 1) or not found.startswith(b"PK\x06\x06"):
            raise _damaged("its two end records differ")
        _, length, _, _, disk_64, other_64, *values = _END_64.unpack(found)
        told = zip((here, count, nbytes, start), values, (_MAX_16, _MAX_16, _MAX_32, _MAX_32), strict=True)
        if length != _END_64.size - 12 or disk_64 or other_64 or any(a not in (b, limit) for a, b, limit in told):
            raise _damaged("its two end records differ")
        here, count, nbytes, start = values
    elif _MAX_16 in (here, count) or _MAX_32 in (nbytes, start):
        raise _damaged("its end record gives no sizes")
    if disk or first or comment or here != count or start + nbytes != ends or nbytes > _LISTING_LIMIT:
        raise _damaged("its list of records is not where its end record says")
    return count, nbytes, start


def _damaged(what: str) -> FormatError:
    return FormatError(f"it begins as a zip archive, but {what}: it was cut off or damaged. Get it again")


class ArchiveWriter:
    """Writes records one after the other, each at a multiple of 64 bytes, with nothing in it that changes by the day.

    The list of the records is written at the end of the `with` block.

    Args:
        file: Where to.
        root: The directory of the records, with its slash.
    """

    def __init__(self, file: PendingFile, root: str) -> None:
        self._zip = zipfile.ZipFile(file, "w")  # type: ignore[call-overload]  # it only writes, seeks and tells
        self._file = file
        self._root = root

    def add(self, name: str, data: bytes | memoryview) -> None:
        """Write one record."""
        info = zipfile.ZipInfo(self._root + name)
        large = len(data) >= zipfile.ZIP64_LIMIT
        header = _LOCAL.size + len(info.filename.encode()) + (_SIZES_64 if large else 0) + _FIELD.size
        padding = -(self._file.tell() + header) % _ALIGNMENT
        info.extra = _FIELD.pack(b"FB", padding) + b"Z" * padding
        with self._zip.open(info, "w", force_zip64=large) as record:
            for at in range(0, len(data), PIECE):
                record.write(data[at : at + PIECE])
        info.extra = b""  # the list of the records has no need of it

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None:
            self._zip.fp = None  # nothing more is written
        self._zip.close()
