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
from modsurg.errors import FormatError

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


def test_a_tar_archive(tmp_path):
    (tmp_path / "a.txt").write_text("weights")
    with tarfile.open(tmp_path / "b.pt", "w") as tar:
        tar.add(tmp_path / "a.txt", "model/weights.pt")
    with pytest.raises(FormatError, match=r"it is a tar archive: unpack it, and open what is in it"):
        TorchSource(tmp_path / "b.pt")
