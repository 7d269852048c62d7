"""Reading `.pt` files: every layout of a tensor, and files that are not what they seem."""

import io
import struct
import sys
import tempfile
import zipfile
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy
import pytest
import torch
from torch import nn

from modsurg import load_state, read_state, verify
from modsurg.checkpoints.formats.torch_save.reader import TorchSource
from modsurg.errors import FormatError, IntegrityError, TrustError


def saved(tmp_path, value, name="file.pt", **options):
    path = tmp_path / name
    torch.save(value, path, **options)
    return path


def same(a, b):
    """Equal in dtype, shape and every bit."""
    a, b = (tensor.detach().resolve_conj().resolve_neg().contiguous().clone() for tensor in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and bytes(a.untyped_storage()) == bytes(b.untyped_storage())


def layouts():
    base = torch.arange(24.0).reshape(4, 6)
    many = torch.randn(3, dtype=torch.complex64)
    return {
        "whole": base,
        "turned": base.t(),
        "part": base[1:3, 2:5].clone(),
        "window": base[1:3, 2:5],
        "row": base[2],
        "step": torch.arange(10)[::3],
        "expanded": torch.ones(1, 3).expand(5, 3),
        "last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "conj": many.conj(),
        "imag": torch.randn(3, dtype=torch.complex128).conj().imag,
        "number": torch.tensor(3),
        "none": torch.empty(0, 4),
        "parameter": nn.Parameter(torch.ones(2)),
    }


DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
    torch.float32, torch.float64, torch.complex64, torch.complex128, torch.uint16, torch.uint32, torch.uint64,
    torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"pickle_protocol": 4}, {"_use_new_zipfile_serialization": False}])
def test_every_layout(tmp_path, options):
    state = layouts()
    source = TorchSource(saved(tmp_path, state, **options))
    assert list(source) == list(state)
    for key, tensor in state.items():
        assert source[key].shape == tensor.shape
        assert same(source.read(key), tensor), key


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(tmp_path, dtype):
    tensor = torch.tensor([0, 1, 1], dtype=torch.uint8).to(dtype)
    source = TorchSource(saved(tmp_path, {"w": tensor}))
    assert source["w"].dtype == dtype
    assert source["w"].nbytes == tensor.nbytes
    assert same(source.read("w"), tensor)


def test_values_in_order_are_read_in_place(tmp_path):
    source = TorchSource(saved(tmp_path, layouts()))
    in_place = {key for key in source if source.region(key)}
    assert in_place == {"whole", "part", "row", "number", "none", "parameter"}


def test_ties_are_known(tmp_path):
    weight = torch.randn(3, 3)
    source = TorchSource(saved(tmp_path, {"a": weight, "b": weight, "c": weight.t(), "d": weight.clone()}))
    assert dict(source.notes.ties) == {"b": "a"}
    state = read_state(source.path)
    assert state["a"] is state["b"]


def test_fills_a_model(tmp_path):
    torch.manual_seed(0)
    old, new = (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)) for _ in range(2))
    old[0].to(memory_format=torch.channels_last)
    report = load_state(new, saved(tmp_path, old.state_dict()))
    assert report
    assert all(torch.equal(a, b) for a, b in zip(old.state_dict().values(), new.state_dict().values(), strict=True))


def test_module_versions_are_kept(tmp_path):
    source = TorchSource(saved(tmp_path, nn.Sequential(nn.BatchNorm1d(2)).state_dict()))
    assert dict(source.notes.versions) == {"0": 2}


def test_tensors_of_another_device_come_to_the_cpu(tmp_path):
    path = saved(tmp_path, {"w": torch.arange(3.0)}, pickle_protocol=2)
    rewrite(path, lambda name, data: data.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:7"))
    source = TorchSource(path)
    assert source.read("w").device.type == "cpu"
    assert source.read("w").tolist() == [0, 1, 2]


def test_the_other_byte_order(tmp_path):
    state = {
        "f": torch.randn(3),
        "c": torch.randn(2, dtype=torch.complex64),
        "i": torch.arange(5, dtype=torch.int16),
        "b": torch.tensor([1, 2], dtype=torch.uint8),
    }
    path = saved(tmp_path, state)
    widths = {"0": 4, "1": 4, "2": 2, "3": 1}

    def swap(name, data):
        if name.endswith("byteorder"):
            return b"big" if sys.byteorder == "little" else b"little"
        if "/data/" in name:
            width = widths[name.rpartition("/")[2]]
            return b"".join(data[at : at + width][::-1] for at in range(0, len(data), width))
        return data

    rewrite(path, swap)
    source = TorchSource(path)
    assert source.region("f") is None
    assert all(same(source.read(key), tensor) for key, tensor in state.items())


def rewrite(path, change, compression=zipfile.ZIP_STORED):
    """Write an archive again with changed records."""
    with zipfile.ZipFile(path) as old:
        records = {name: change(name, old.read(name)) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", compression) as new:
        for name, data in records.items():
            if data is not None:
                new.writestr(name, data)


# Files that are not what they seem


def hand_made(path, data):
    """An archive with this pickle and one storage of two floats."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", data)
        file.writestr("a/data/0", struct.pack("<2f", 1, 2))
        file.writestr("a/version", "3\n")
    return path


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value):
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def tensor_pickle(numel=2, offset=0, shape=(2,), stride=(1,), kind="FloatStorage", key="0"):
    """The pickle of {"w": tensor}, with whatever it is to claim."""
    parts = [b"\x80\x02}", text("w"), b"ctorch._utils\n_rebuild_tensor_v2\n((", text("storage"), b"ctorch\n"]
    parts += [kind.encode(), b"\n", text(key), text("cpu"), number(numel), b"tQ", number(offset)]
    parts += [b"(", *map(number, shape), b"t(", *map(number, stride), b"t\x89}tRs."]
    return b"".join(parts)


def test_the_hand_made_file_is_right(tmp_path):
    assert TorchSource(hand_made(tmp_path / "a.pt", tensor_pickle())).read("w").tolist() == [1, 2]


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        ({"numel": 3}, "w: its storage should have 12 bytes, and the file has 8"),
        ({"numel": 1 << 61}, "its storage should have"),
        ({"numel": -1}, "refers to"),
        ({"offset": 1}, r"a tensor of shape \(2,\) reaches beyond its storage of 2 elements"),
        ({"offset": -1}, "that can't be"),
        ({"shape": (3,)}, "reaches beyond"),
        ({"shape": (-2,)}, "that can't be"),
        ({"shape": (1 << 40, 1 << 40), "stride": (0, 0)}, "a shape that no memory can have"),
        ({"stride": (2,)}, "reaches beyond"),
        ({"stride": (1, 1)}, "that can't be"),
        ({"stride": (-1,)}, "that can't be"),
        ({"kind": "Tensor"}, r"a storage of class torch\.Tensor"),
        ({"key": "7"}, "record 'data/7' is missing"),
        ({"key": "../0"}, r"record 'data/\.\./0' is missing"),
    ],
)
def test_a_lying_pickle(tmp_path, claim, message):
    path = hand_made(tmp_path / "a.pt", tensor_pickle(**claim))
    with pytest.raises(FormatError, match=message):
        TorchSource(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"<!DOCTYPE html><html>Sign in</html>", "is an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n", "is a git-LFS pointer"),
        (b"hello", "it is not a file of torch.save: it begins with b'hello'"),
        (b"\x10\0\0\0\0\0\0\0{'__metadata__':{}}", r"it is a safetensors file: rename it to file\.safetensors"),
        (b"\x80\x02}q\x00.", "it is not a file of torch.save but a plain pickle. If you trust whoever made it"),
        (b"PK\x03\x04nothing", "it begins as a zip archive, but its list of records is not"),
        (b"PK\x05\x06" + bytes(18), "there is no data.pkl in it"),
        (bytes(4096), "it is not a file of torch.save"),
    ],
)
def test_another_file_under_the_name(tmp_path, content, message):
    path = tmp_path / "file.pt"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=f"file.pt.*{message}"):
        TorchSource(path)


def test_archives_of_others(tmp_path):
    numpy.savez(tmp_path / "a.npz", w=numpy.ones(2))
    (tmp_path / "a.npz").rename(tmp_path / "a.pt")
    with pytest.raises(FormatError, match=r"an archive of numpy: open it with numpy\.load"):
        TorchSource(tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "b.pt", "w") as file:
        file.writestr("net/model.json", "{}")
    with pytest.raises(FormatError, match=r"TorchScript of torch 1\.1 or older: open it with torch\.jit\.load"):
        TorchSource(tmp_path / "b.pt")


def test_a_compressed_tensor(tmp_path):
    path = saved(tmp_path, {"w": torch.zeros(10000)})
    rewrite(path, lambda name, data: data, zipfile.ZIP_DEFLATED)
    with pytest.raises(FormatError, match=r"record 'data\.pkl' is compressed.*write it again with torch\.save"):
        TorchSource(path)


def test_a_bomb(tmp_path):
    path = tmp_path / "a.pt"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file,
        file.open("a/data.pkl", "w", force_zip64=True) as out,
    ):
        for _ in range(300):
            out.write(bytes(1 << 20))
    with pytest.raises(FormatError, match=r"record 'data\.pkl' is compressed"):
        TorchSource(path)


def test_a_damaged_pickle_is_found_at_once(tmp_path):
    path = saved(tmp_path, {"weight": torch.ones(3)})
    data = bytearray(path.read_bytes())
    data[data.index(b"weight")] ^= 1
    path.write_bytes(data)
    with pytest.raises(FormatError, match=r"'data\.pkl' is damaged: its checksum does not hold"):
        TorchSource(path)


def test_a_damaged_tensor_is_found_by_verify(tmp_path):
    path = saved(tmp_path, {"a": torch.zeros(300), "b": torch.full((300,), 7.0)})
    data = bytearray(path.read_bytes())
    data[data.rindex(struct.pack("<f", 7))] ^= 1
    path.write_bytes(data)
    assert verify(path).damaged == ("b",)
    assert verify(path).checked == ("a",)
    with pytest.raises(IntegrityError, match="1 is damaged: b"):
        load_state(Holder(a=300, b=300), path, verify=True)


def test_a_file_without_checksums(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        path = saved(tmp_path, {"w": torch.ones(3)})
    finally:
        torch.serialization.set_crc32_options(True)
    assert TorchSource(path).read("w").tolist() == [1, 1, 1]
    assert verify(path).unhashed == ("w",)


class Holder(nn.Module):
    def __init__(self, **sizes):
        super().__init__()
        for name, size in sizes.items():
            self.register_buffer(name, torch.zeros(size))


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
def test_cut_off_anywhere(tmp_path, options):
    path = saved(tmp_path, {"w": torch.arange(40.0), "v": torch.ones(3)}, **options)
    data = path.read_bytes()
    for length in {*range(0, len(data), 17), len(data) - 1, len(data) - 22, len(data) - 23}:
        path.write_bytes(data[:length])
        with pytest.raises(FormatError, match=r"file\.pt"):
            TorchSource(path)


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=150, deadline=None)
def test_a_byte_changed_anywhere(options, data):
    """Never anything but one of our errors, or a state that can be read."""
    buffer = io.BytesIO()
    torch.save({"model": {"w": torch.arange(4.0), "v": torch.ones(2).half()}, "e": [1, "x", (2.5,)]}, buffer, **options)
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "file.pt")
        path.write_bytes(content)
        try:
            with TorchSource(path) as source:
                for key in source:
                    source.read(key)
        except (FormatError, TrustError):
            pass


def test_closed(tmp_path):
    source = TorchSource(saved(tmp_path, {"w": torch.ones(2)}))
    source.close()
    with pytest.raises(ValueError, match="was closed"):
        source.read("w")
