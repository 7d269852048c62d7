"""Zip archives: what is written opens in Python's zipfile, large ones too; what lies is refused."""

import io
import os
import warnings
import zipfile
from itertools import pairwise

import pytest

from modsurg.checkpoints.formats.atomic import writing
from modsurg.checkpoints.formats.file_io import Region
from modsurg.checkpoints.formats.torch_save.zip import Archive, ArchiveWriter
from modsurg.errors import FormatError


def write(path, records):
    with writing(path) as file, ArchiveWriter(file, "a/") as writer:
        for name, data in records.items():
            writer.add(name, data)


def opened(path):
    fd = os.open(path, os.O_RDONLY)
    return Archive(Region(fd, 0, os.fstat(fd).st_size))


RECORDS = {"data.pkl": b"pickle", "data/0": b"x" * 1000, "data/1": b"", "data/2": os.urandom(3 << 20), "note": b"y"}


def test_python_opens_it(tmp_path):
    write(tmp_path / "a.zip", RECORDS)
    with zipfile.ZipFile(tmp_path / "a.zip") as file:
        assert file.testzip() is None
        assert {name.removeprefix("a/"): file.read(name) for name in file.namelist()} == RECORDS


def test_records_begin_at_multiples_of_64(tmp_path):
    write(tmp_path / "a.zip", RECORDS)
    archive = opened(tmp_path / "a.zip")
    regions = [archive.region(name) for name in RECORDS]
    assert all(region.offset % 64 == 0 for region in regions)
    assert all(a.offset + a.nbytes <= b.offset for a, b in pairwise(regions))
    assert archive.read("note") == b"y"
    assert all(archive.holds(name) for name in RECORDS)


@pytest.mark.soak
def test_more_records_than_the_old_format_can_count(tmp_path):
    records = {"data.pkl": b"", **{f"{number}": b"" for number in range(70_000)}}
    write(tmp_path / "a.zip", records)
    with zipfile.ZipFile(tmp_path / "a.zip") as file:
        assert len(file.namelist()) == len(records)


class Sparse(io.FileIO):
    """A file in which zeros are left as a hole."""

    def write(self, data):
        if any(bytes(data[:1])):
            return super().write(data)
        self.seek(len(data), os.SEEK_CUR)
        return len(data)


class Zeros:
    """Five gigabytes that take none."""

    def __len__(self):
        return 5 << 30

    def __getitem__(self, part):
        return memoryview(bytes(min(part.stop, len(self)) - part.start))


@pytest.mark.soak
def test_a_record_over_four_gigabytes(tmp_path):
    file = Sparse(tmp_path / "a.zip", "w")
    with file, ArchiveWriter(file, "a/") as writer:
        writer.add("data.pkl", b"p")
        writer.add("data/0", Zeros())
        writer.add("data/1", b"end")
    archive = opened(tmp_path / "a.zip")
    assert archive.region("data/0").nbytes == 5 << 30
    assert archive.read("data/1") == b"end"
    with zipfile.ZipFile(tmp_path / "a.zip") as theirs:
        assert theirs.read("a/data/1") == b"end"
        assert theirs.getinfo("a/data/0").file_size == 5 << 30


def test_an_archive_inside_a_file(tmp_path):
    write(tmp_path / "a.zip", RECORDS)
    content = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "b").write_bytes(b"before" + content + b"after")
    fd = os.open(tmp_path / "b", os.O_RDONLY)
    archive = Archive(Region(fd, 6, len(content)))
    assert archive.read("data/0") == RECORDS["data/0"]
    with pytest.raises(FormatError, match="cut off or damaged"):
        Archive(Region(fd, 6, len(content) - 30))


def test_a_record_elsewhere(tmp_path):
    """The list of the records points into the middle of one."""
    write(tmp_path / "a.zip", RECORDS)
    content = (tmp_path / "a.zip").read_bytes()
    start = content.rindex(b"PK\x01\x02", 0, content.rindex(b"a/note"))
    moved = content[: start + 42] + (5).to_bytes(4, "little") + content[start + 46 :]
    (tmp_path / "a.zip").write_bytes(moved)
    with pytest.raises(FormatError, match="is not where the archive says"):
        opened(tmp_path / "a.zip").read("note")


def test_two_records_at_one_place(tmp_path):
    write(tmp_path / "a.zip", RECORDS)
    content = (tmp_path / "a.zip").read_bytes()
    first, second = (content.rindex(b"PK\x01\x02", 0, content.rindex(name)) for name in (b"a/data.pkl", b"a/note"))
    moved = content[: second + 42] + content[first + 42 : first + 46] + content[second + 46 :]
    (tmp_path / "a.zip").write_bytes(moved)
    with pytest.raises(FormatError, match="record 'a/note' is not where the archive says: the file is damaged"):
        opened(tmp_path / "a.zip")


def test_a_record_that_is_there_twice(tmp_path):
    write(tmp_path / "a.zip", RECORDS)
    with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "a.zip", "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("a/note", "another")
    with pytest.raises(FormatError, match="record 'a/note' is in it twice, so readers would differ"):
        opened(tmp_path / "a.zip")


def test_a_missing_record(tmp_path):
    write(tmp_path / "a.zip", RECORDS)
    with pytest.raises(FormatError, match="record 'data/9' is missing"):
        opened(tmp_path / "a.zip").region("data/9")
