"""Writing `.pt` files that everybody can open, the same bytes for the same values."""

import collections
import hashlib
import os
import zipfile

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import nn

from modsurg import load_state, read_state, save_state, verify
from modsurg.errors import SaveError

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
    torch.float32, torch.float64, torch.complex64, torch.complex128, torch.uint16, torch.uint32, torch.uint64,
    torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)


def bits(tensor):
    return bytes(tensor.detach().resolve_conj().resolve_neg().contiguous().clone().untyped_storage())


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_opens_it(tmp_path, mmap):
    base = torch.arange(6.0).reshape(2, 3)
    state = {
        "base": base,
        "turned": base.t(),
        "conj": torch.randn(2, dtype=torch.complex64).conj(),
        "expanded": torch.ones(1).expand(3),
        "number": torch.tensor(2),
        "empty": torch.empty(0, 2),
        "parameter": nn.Parameter(torch.ones(2)),
        **{f"kind.{dtype}": torch.tensor([0, 1], dtype=torch.uint8).to(dtype) for dtype in DTYPES},
    }
    save_state(state, tmp_path / "a.pt")
    theirs = torch.load(tmp_path / "a.pt", weights_only=True, mmap=mmap)
    assert list(theirs) == list(state)
    assert all(same(theirs[key], state[key]) for key in state)
    ours = read_state(tmp_path / "a.pt")
    assert all(same(ours[key], state[key]) for key in state)


@hypothesis.given(
    st.dictionaries(st.text(max_size=8), st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3)))
)
@hypothesis.settings(max_examples=40, deadline=None)
def test_round_trip(tmp_path_factory, shapes):
    path = tmp_path_factory.mktemp("trip") / "a.pt"
    state = {key: torch.ones(shape).to(dtype) for key, (dtype, shape) in shapes.items() if "_extra" not in key}
    save_state(state, path)
    ours = read_state(path)
    assert list(ours) == list(state)
    assert all(same(ours[key], state[key]) for key in state)


def test_ties_stay_tied(tmp_path):
    weight = torch.randn(200, 3)
    save_state({"a": weight, "b": weight}, tmp_path / "a.pt")
    assert (tmp_path / "a.pt").stat().st_size < 2 * weight.nbytes
    theirs = torch.load(tmp_path / "a.pt")
    assert theirs["a"].data_ptr() == theirs["b"].data_ptr()


def test_a_window_takes_its_own_room(tmp_path):
    save_state({"a": torch.zeros(100_000)[:10]}, tmp_path / "a.pt")
    assert (tmp_path / "a.pt").stat().st_size < 2000


def test_same_values_same_bytes(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    digests = set()
    for name in ("a.pt", "b.pth", "c.bin"):
        save_state(model, tmp_path / name, metadata={"b": "2", "a": "1"})
        digests.add(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert len(digests) == 1


def test_metadata_and_versions(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    save_state(model, tmp_path / "a.pt", metadata={"who": "mé"})
    assert read_state(tmp_path / "a.pt").metadata == {"who": "mé"}
    theirs = torch.load(tmp_path / "a.pt")
    assert theirs._metadata == {"": {"version": 1}, "0": {"version": 1}, "1": {"version": 2}}
    assert model.load_state_dict(theirs).missing_keys == []


class Counting(nn.Module):
    def __init__(self, value=None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.value = value

    def get_extra_state(self):
        return self.value

    def set_extra_state(self, value):
        self.value = value


def test_extra_state(tmp_path):
    value = {"n": 3, "t": torch.arange(3), "d": torch.float16, "l": [(1, None), {2}], "o": collections.OrderedDict(a=1)}
    save_state(nn.Sequential(Counting(value)), tmp_path / "a.pt")
    theirs = torch.load(tmp_path / "a.pt", weights_only=True)
    assert theirs["0._extra_state"]["n"] == 3
    model = nn.Sequential(Counting())
    assert load_state(model, tmp_path / "a.pt")
    assert model[0].value["t"].tolist() == [0, 1, 2]
    assert model[0].value["l"] == [(1, None), {2}]


@pytest.mark.parametrize("value", [lambda: 0, Counting, Counting(), {"x": [open]}, [b""]])
def test_extra_state_that_is_no_data(tmp_path, value):
    (tmp_path / "a.pt").write_bytes(b"old")
    with pytest.raises(SaveError, match=r"0\._extra_state is extra state that can't be kept: get_extra_state"):
        save_state(nn.Sequential(Counting(value)), tmp_path / "a.pt")
    assert (tmp_path / "a.pt").read_bytes() == b"old"


def test_tensors_in_extra_state_that_are_not_dense(tmp_path):
    for value, words in [
        (torch.eye(2).to_sparse(), "is a sparse tensor"),
        (torch.ones(2, device="meta"), "on the meta"),
    ]:
        with pytest.raises(SaveError, match=rf"0\._extra_state is extra state .*\(a tensor in it .*{words}"):
            save_state(nn.Sequential(Counting([value])), tmp_path / "a.pt")
        with pytest.raises(SaveError, match=rf"0\._extra_state\.0 .*{words}"):
            save_state(nn.Sequential(Counting([value])), tmp_path / "a.safetensors")
    assert os.listdir(tmp_path) == []


def test_checksums(tmp_path):
    save_state({"a": torch.randn(600_000), "b": torch.ones(1)}, tmp_path / "a.pt")
    assert verify(tmp_path / "a.pt").checked == ("a", "b")
    with zipfile.ZipFile(tmp_path / "a.pt") as file:
        assert file.testzip() is None


def test_values_lie_at_multiples_of_64(tmp_path):
    save_state({f"k{i}": torch.ones(i) for i in range(1, 9)}, tmp_path / "a.pt")
    source = read_state(tmp_path / "a.pt").source
    assert all(source.region(key).offset % 64 == 0 for key in source)
