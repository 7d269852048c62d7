"""What the system says of a file in memory."""

import os

import pytest

from modsurg.checkpoints.formats import pagecache
from modsurg.checkpoints.formats.file_io import Region


@pytest.mark.parametrize("offset, nbytes", [(0, 1), (5, 4092), (4095, 2), (5000, 100_000)])
def test_both_ways_to_ask_agree(tmp_path, monkeypatch, offset, nbytes):
    path = tmp_path / "file"
    path.write_bytes(bytes(200_000))
    with path.open("rb") as file:
        region = Region(file.fileno(), offset, nbytes)
        first = pagecache.is_cached(region)
        monkeypatch.setattr(pagecache, "_counted", lambda *arguments: None)
        assert pagecache.is_cached(region) == first


def test_what_was_cut_off_is_not_in_memory(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(10_000))
    with path.open("rb") as file:
        assert not pagecache.is_cached(Region(file.fileno(), 0, 50_000))


def test_a_system_that_does_not_say(tmp_path, monkeypatch):
    class Silent:
        def syscall(self, *arguments):
            return -1

        def mincore(self, *arguments):
            return -1

    monkeypatch.setattr(pagecache, "_libc", Silent())
    path = tmp_path / "file"
    path.write_bytes(bytes(10_000))
    fd = os.open(path, os.O_RDONLY)
    assert not pagecache.is_cached(Region(fd, 0, 10_000))
    os.close(fd)
