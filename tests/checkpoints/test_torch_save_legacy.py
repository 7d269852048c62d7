"""Files of torch.save from before 1.6 and before 0.1.10."""

import io
import pickle
import struct
import tarfile

import pytest
import torch
from torch import nn

from modsurg import load_state
from modsurg.checkpoints.formats.torch_save.reader import TorchSource
from modsurg.errors import FormatError, TrustError

OLD = {"_use_new_zipfile_serialization": False}
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001


def test_a_model(tmp_path):
    old, new = nn.Linear(3, 2), nn.Linear(3, 2)
    torch.save({"model_state": old.state_dict(), "step": 3}, tmp_path / "old.pt", **OLD)
    load_state(new, tmp_path / "old.pt")
    assert torch.equal(old.weight, new.weight)
    source = TorchSource(tmp_path / "old.pt")
    assert source.taken == "model_state"
    assert source.region("weight") is not None
    assert source.check("weight") is None


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_protocols_of_pickle(tmp_path, protocol):
    state = {"a": torch.arange(3.0), "b": torch.ones(2, dtype=torch.int8)}
    torch.save({"model": state, "text": b"x" * 300, "set": {1}}, tmp_path / "old.pt", pickle_protocol=protocol, **OLD)
    source = TorchSource(tmp_path / "old.pt")
    assert all(torch.equal(source.read(key), tensor) for key, tensor in state.items())


def test_views_and_ties(tmp_path):
    base = torch.arange(12.0)
    torch.save({"a": base, "b": base, "c": base[3:6], "d": base.reshape(3, 4).t()}, tmp_path / "old.pt", **OLD)
    source = TorchSource(tmp_path / "old.pt")
    assert source.notes.ties == {"b": "a"}
    assert source.read("c").tolist() == [3, 4, 5]
    assert torch.equal(source.read("d"), base.reshape(3, 4).t())


class Storage:
    def __init__(self, *identity):
        self.identity = identity


class Kind:
    """Pickles as a name of torch."""

    def __init__(self, name):
        self.name = name


class Pickler(pickle._Pickler):  # the one in Python, so that a name can be written for an object
    def persistent_id(self, value):
        return value.identity if isinstance(value, Storage) else getattr(value, "reference", None)

    def save(self, value, save_persistent_id=True):
        if isinstance(value, Kind):
            self.write(b"ctorch\n" + value.name.encode() + b"\n")
        else:
            super().save(value, save_persistent_id)


def dumped(value):
    out = io.BytesIO()
    Pickler(out, 2).dump(value)
    return out.getvalue()


class Tensor:
    def __init__(self, storage, shape, stride):
        self.args = storage, 0, shape, stride

    def __reduce__(self):
        return torch._utils._rebuild_tensor, self.args


def test_a_storage_inside_another(tmp_path):
    """As torch 0.2 wrote the views of a storage."""
    view = Storage("storage", Kind("FloatStorage"), "7", "cpu", 6, ("8", 2, 3))
    parts = [MAGIC, PROTOCOL, {"little_endian": True}, {"w": Tensor(view, (3,), (1,))}, ["7"]]
    data = b"".join(map(dumped, parts)) + struct.pack("<q6f", 6, *range(6))
    (tmp_path / "old.pt").write_bytes(data)
    assert TorchSource(tmp_path / "old.pt").read("w").tolist() == [2, 3, 4]
    assert torch.load(tmp_path / "old.pt", weights_only=True)["w"].tolist() == [2, 3, 4]


@pytest.mark.parametrize(
    ("numel", "keys", "count", "message"),
    [
        (6, ["7"], 7, "cut off: a storage ends at byte"),
        (6, ["7"], -1, "a length that can't be"),
        (6, ["7"], 1 << 61, "a length that can't be"),
        (9, ["7"], 6, "its storage should have 36 bytes, and the file has 24"),
        (6, [], 6, "w: its storage '7' is missing in the file"),
        (6, ["8"], 6, "it is damaged or cut off"),
        (6, 3, 6, "it is damaged or cut off"),
    ],
)
def test_lies(tmp_path, numel, keys, count, message):
    storage = Storage("storage", Kind("FloatStorage"), "7", "cpu", numel, None)
    parts = [MAGIC, PROTOCOL, {}, {"w": Tensor(storage, (3,), (1,))}, keys]
    (tmp_path / "old.pt").write_bytes(b"".join(map(dumped, parts)) + struct.pack("<q6f", count, *range(6)))
    with pytest.raises(FormatError, match=message):
        TorchSource(tmp_path / "old.pt")


def test_another_protocol(tmp_path):
    (tmp_path / "old.pt").write_bytes(b"".join(map(dumped, [MAGIC, 1002, {}, {}, []])))
    with pytest.raises(FormatError, match="of a protocol that torch never wrote"):
        TorchSource(tmp_path / "old.pt")


class Reference:
    def __init__(self, key):
        self.reference = key


def tar_file(path, state=None, **members):
    """As torch 0.1 wrote it: one storage of six floats, a view of it, and two tensors."""
    state = {"w": Reference(101), "v": Reference(102)} if state is None else state
    storages = dumped(1) + dumped((11, "cpu", Kind("FloatStorage"))) + struct.pack("<q6f", 6, *range(6))
    storages += dumped([(12, 11, 4, 2)])
    tensors = dumped(2)
    tensors += dumped((101, 11, Kind("FloatTensor"))) + struct.pack("<ii2q2qq", 2, 0, 3, 2, 1, 3, 0)
    tensors += dumped((102, 12, Kind("FloatTensor"))) + struct.pack("<iiqqq", 1, 0, 2, 1, 0)
    contents = {"storages": storages, "tensors": tensors, "pickle": dumped(state)} | members
    with tarfile.open(path, "w") as tar:
        for name, data in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_a_tar_file(tmp_path):
    tar_file(tmp_path / "a.pt")
    source = TorchSource(tmp_path / "a.pt")
    assert source.read("w").tolist() == [[0, 3], [1, 4], [2, 5]]
    assert source.read("v").tolist() == [4, 5]
    theirs = torch.load(tmp_path / "a.pt", weights_only=False)
    assert torch.equal(source.read("w"), theirs["w"])
    assert torch.equal(source.read("v"), theirs["v"])


class Evil:
    def __reduce__(self):
        return eval, ("1/0",)


def test_hostile_and_foreign_tar_files(tmp_path):
    tar_file(tmp_path / "a.pt", {"w": Reference(101), "x": Evil()})
    with pytest.raises(TrustError, match=r"wants to call builtins\.eval"):
        TorchSource(tmp_path / "a.pt")
    tar_file(tmp_path / "a.pt", {"w": Reference(109)})
    with pytest.raises(FormatError, match="damaged or cut off"):
        TorchSource(tmp_path / "a.pt")
    with tarfile.open(tmp_path / "b.pt", "w") as tar:
        tar.add(tmp_path / "a.pt", "model/weights.pt")
    with pytest.raises(FormatError, match=r"a tar archive, but not one of torch\.save"):
        TorchSource(tmp_path / "b.pt")


def test_a_tar_file_cut_off(tmp_path):
    tar_file(tmp_path / "a.pt")
    data = (tmp_path / "a.pt").read_bytes()
    end = data.index(b"pickle\0") + 512 + 20
    for length in range(0, end, 97):
        (tmp_path / "a.pt").write_bytes(data[:length])
        with pytest.raises(FormatError, match=r"a\.pt"):
            TorchSource(tmp_path / "a.pt")
