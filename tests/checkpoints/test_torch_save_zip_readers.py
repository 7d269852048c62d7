"""Two readers of one archive: whatever is accepted here, torch's own reader sees the same records in it."""

import io
import os
import struct
import tempfile
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modsurg.checkpoints.formats.file_io import Region
from modsurg.checkpoints.formats.torch_save.zip import Archive
from modsurg.errors import FormatError

END = b"PK\x05\x06"


def saved(value):
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def zipped(records, comment=b"", compression=zipfile.ZIP_STORED):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, data in records:
            archive.writestr(zipfile.ZipInfo(name), data, compression)
        archive.comment = comment
    return stream.getvalue()


def records_of(data):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


BY_TORCH = saved({"w": torch.arange(3.0), "b": torch.zeros(2)})
OTHER = saved({"w": torch.ones(3)})
BY_PYTHON = zipped(records_of(BY_TORCH))
PACKED = zipped(records_of(BY_TORCH), compression=zipfile.ZIP_DEFLATED)


def open_archive(data, directory):
    path = Path(directory) / "a.pt"
    path.write_bytes(data)
    return path, os.open(path, os.O_RDONLY)


def assert_readers_agree(data):
    """Accepted here or not; True if so."""
    with tempfile.TemporaryDirectory() as directory:
        path, fd = open_archive(data, directory)
        try:
            archive = Archive(Region(fd, 0, len(data)))
            names = [name.removeprefix(archive.root) for name in archive._records]
            ours = {name: archive.read(name) for name in names}
        except FormatError:
            return False
        finally:
            os.close(fd)
        try:
            reader = torch._C.PyTorchFileReader(str(path))
            theirs = {name: reader.get_record(name) for name in reader.get_all_records()}
        except RuntimeError:  # torch refuses more than we do
            return True
        assert theirs == ours
        return True


def test_archives_as_they_should_be():
    for data in (BY_TORCH, BY_PYTHON, PACKED):
        assert assert_readers_agree(data)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([BY_TORCH, BY_PYTHON, PACKED]), st.data())
def test_damage_anywhere_outside_the_values(seed, data):
    changed = bytearray(seed)
    headers = [at for at in range(len(seed)) if seed[at : at + 2] == b"PK"]
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.sampled_from(headers)) + data.draw(st.integers(0, 60))
        changed[min(at, len(seed) - 1)] = data.draw(st.sampled_from([0, 1, 8, 65, 97, 127, 255]))
    assert_readers_agree(bytes(changed))


PIECES = [BY_TORCH, OTHER, BY_PYTHON, b"before", BY_TORCH[-98:], BY_TORCH[-22:], BY_PYTHON[-22:]]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(PIECES), min_size=2, max_size=4))
def test_archives_one_after_the_other(pieces):
    assert_readers_agree(b"".join(pieces))


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([BY_TORCH, BY_PYTHON]), st.data())
def test_end_records_that_say_something_else(seed, data):
    """Numbers of the end record, and of that with 64 bits, moved a little or to the greatest."""
    changed = bytearray(seed)
    end = seed.rindex(END)
    for at, layout in ((end + 8, "<H"), (end + 10, "<H"), (end + 12, "<I"), (end + 16, "<I"), (end - 12, "<Q")):
        if data.draw(st.booleans()):
            (old,) = struct.unpack_from(layout, seed, at)
            most = (1 << 8 * struct.calcsize(layout)) - 1
            new = data.draw(st.sampled_from([0, old, old + 1, max(old - 1, 0), most]))
            struct.pack_into(layout, changed, at, min(new, most))
    assert_readers_agree(bytes(changed))


PICKLE = ("a/data.pkl", b"\x80\x02N.")
VERSION = ("a/version", b"3\n")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"before" + BY_PYTHON, "not where its end record says"),
        (BY_PYTHON + b"after", "not at its end"),
        (zipped(records_of(BY_PYTHON), comment=b"note"), "not at its end"),
        (zipped(records_of(BY_PYTHON), comment=OTHER[-22:]), "not where its end record says"),
        (BY_PYTHON + OTHER, "its two end records differ"),
        (zipped([PICKLE, VERSION, ("a/DATA.pkl", b"")]), "differ in case only"),
        (zipped([PICKLE, VERSION, ("A/version", b"")]), "differ in case only"),
        (zipped([("b/version", b"3"), PICKLE]), "is outside the directory 'b/'"),
        (zipped([PICKLE, ("a/" + "n" * 600, b"")]), "readers take in different ways"),
        (zipped([PICKLE, ("a/b\\c", b"")]), "readers take in different ways"),
    ],
)
def test_readers_could_disagree(data, message, tmp_path):
    _, fd = open_archive(data, tmp_path)
    try:
        with pytest.raises(FormatError, match=message):
            Archive(Region(fd, 0, len(data)))
    finally:
        os.close(fd)


def test_the_header_before_a_record_differs_from_the_list(tmp_path):
    for at, value in ((6, 1), (8, 8), (14, 7), (22, 77)):  # flags, method, checksum, size of the first record
        changed = bytearray(BY_PYTHON)
        changed[at] = value
        _, fd = open_archive(bytes(changed), tmp_path)
        try:
            with pytest.raises(FormatError, match="is described in two ways"):
                Archive(Region(fd, 0, len(changed)))
        finally:
            os.close(fd)


def test_bytes_after_a_packed_record_are_refused():
    """A packed record that goes on after its end is read as far by one reader, and not at all by another."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    packed = packer.compress(PICKLE[1]) + packer.flush() + b"more"
    plain = bytearray(zipped([(PICKLE[0], packed), VERSION]))
    crc = zlib.crc32(PICKLE[1])
    listed = plain.index(b"PK\x01\x02")
    for at, layout, value in (
        (8, "<H", 8), (14, "<I", crc), (22, "<I", len(PICKLE[1])),
        (listed + 10, "<H", 8), (listed + 16, "<I", crc), (listed + 24, "<I", len(PICKLE[1])),
    ):  # fmt: skip
        struct.pack_into(layout, plain, at, value)
    assert not assert_readers_agree(bytes(plain))


def test_a_record_that_says_it_is_a_directory_is_refused():
    changed = bytearray(BY_PYTHON)
    changed[changed.index(b"PK\x01\x02") + 38] |= 0x10
    assert not assert_readers_agree(bytes(changed))
