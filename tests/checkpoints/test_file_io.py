"""Bytes between files and memory."""

import gc
import os

import pytest
import torch

from modsurg.checkpoints.formats import file_io as transfer
from modsurg.checkpoints.formats.file_io import Region, as_plain, is_plain, memory, read_all, read_into
from modsurg.errors import FormatError


def test_memory_is_the_tensors_own_and_keeps_it_alive():
    tensor = torch.zeros(3, dtype=torch.uint8)
    view = memory(tensor)
    view[1] = 7
    assert tensor.tolist() == [0, 7, 0]
    view = memory(torch.full((1000,), 3, dtype=torch.uint8))
    gc.collect()
    others = [torch.zeros(1000, dtype=torch.uint8) for _ in range(100)]
    assert bytes(view) == b"\3" * 1000
    assert len(memory(others[0][:0])) == 0


def test_plain():
    assert is_plain(torch.ones(2, 3))
    assert is_plain(torch.ones(()))
    values = torch.randn(2, 3, dtype=torch.complex64)
    for odd in (
        torch.ones(2, 3).t(),
        values.conj(),
        values.conj().imag,
        torch.ones(2, device="meta"),
        torch.eye(2).to_sparse(),
    ):
        assert not is_plain(odd)
    assert is_plain(as_plain(values.conj().t()))
    assert torch.equal(as_plain(values.conj().t()), values.conj().t())
    assert as_plain(values).data_ptr() == values.data_ptr()


def test_short_reads_go_on(tmp_path, monkeypatch):
    content = bytes(range(256)) * 4
    (tmp_path / "a").write_bytes(content)
    real = os.preadv
    monkeypatch.setattr(transfer.os, "preadv", lambda fd, views, offset: real(fd, [views[0][:7]], offset))
    with open(tmp_path / "a", "rb") as file:
        buffer = bytearray(1000)
        read_into(Region(file.fileno(), 10, 1000), memoryview(buffer))
        assert bytes(buffer) == content[10:1010]
        with pytest.raises(FormatError, match="the file ends at byte 1024"):
            read_into(Region(file.fileno(), 100, 1000), memoryview(buffer))


@pytest.mark.parametrize("piece", [1, 100, 1 << 20])
def test_many_tensors_by_threads(piece, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "PIECE", piece)
    values = torch.randint(0, 256, (3000,), dtype=torch.uint8)
    (tmp_path / "a").write_bytes(bytes(memory(values)))
    tensors = [torch.zeros(300, dtype=torch.uint8) for _ in range(10)]
    with open(tmp_path / "a", "rb") as file:
        begun = []
        read_all([(Region(file.fileno(), 300 * i, 300), tensor) for i, tensor in enumerate(tensors)], begun.append)
    assert list(dict.fromkeys(begun)) == list(range(10))
    assert torch.equal(torch.cat(tensors), values)
