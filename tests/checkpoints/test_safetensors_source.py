"""The safetensors format: what is written is read back exactly, by us and by the format's own library."""

import json
from pathlib import Path

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from modsurg.checkpoints.formats.derived import DerivedSource
from modsurg.checkpoints.formats.file_io import as_plain, memory
from modsurg.checkpoints.formats.memory import MemorySource
from modsurg.checkpoints.formats.safetensors.source import DTYPES, SafetensorsSource, write_safetensors
from modsurg.errors import FormatError, SaveError


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and memory(as_plain(a)) == memory(as_plain(b))


def written(path, state, **metadata):
    write_safetensors(path, MemorySource(state, metadata))
    return SafetensorsSource(path)


def random_bytes(dtype, shape):
    if dtype is torch.bool:
        return torch.rand(shape) < 0.5
    return torch.randint(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=torch.uint8).view(dtype)


def awkward():
    base = torch.randn(4, 6)
    values = torch.randn(3, dtype=torch.complex64)
    return {
        "w": base,
        "transposed": base.t(),
        "first": base[:3],
        "second": base[1:],
        "third": base[2:, 1::2],
        "bits": base.view(torch.int32),
        "expanded": torch.randn(1, 3).expand(5, 3),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "conjugate": values.conj(),
        "negative": values.conj().imag,
        "number": torch.tensor(1.5),
        "empty": torch.empty(0, 3),
        "": torch.ones(1),
        'clé ☃ "quoted"': torch.ones(2),
    }


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_of_the_format_is_kept(name, tmp_path):
    state = {"x": random_bytes(DTYPES[name], (3, 8))}
    source = written(tmp_path / "x.safetensors", state)
    assert same(source.read("x"), state["x"])
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as theirs:
        assert same(theirs.get_tensor("x"), state["x"])


def test_any_memory_layout_is_kept_by_value(tmp_path):
    state = awkward()
    source = written(tmp_path / "x.safetensors", state)
    theirs = load_file(tmp_path / "x.safetensors")
    assert list(source) == list(state)
    assert theirs.keys() == state.keys()
    for key, value in state.items():
        assert same(source.read(key), value), key
        assert same(theirs[key], value), key


def test_ties_are_stored_once_and_listed(tmp_path):
    weight = torch.randn(100, 100)
    source = written(tmp_path / "x.safetensors", {"a": weight, "b": torch.ones(1), "c": weight.detach()})
    assert list(source) == ["a", "b", "c"]
    assert source.notes.ties == {"c": "a"}
    assert source["c"].name == "c"
    assert same(source.read("c"), weight)
    assert (tmp_path / "x.safetensors").stat().st_size < 2 * weight.nbytes
    assert load_file(tmp_path / "x.safetensors").keys() == {"a", "b"}


def test_other_views_of_the_same_memory_are_no_ties(tmp_path):
    weight = torch.randn(4, 4)
    views = {"w": weight, "t": weight.t(), "i": weight.view(torch.int32), "r": weight.view(16)}
    views |= {"e": torch.empty(0), "f": torch.empty(0)}
    assert not written(tmp_path / "x.safetensors", views).notes.ties


def test_extra_state_is_kept_without_pickle(tmp_path):
    value = {
        "step": 3,
        "betas": (0.9, float("inf")),
        "mean": torch.arange(3.0),
        1: None,
        "bf": torch.ones(2).bfloat16(),
    }
    source = written(tmp_path / "x.safetensors", {"a": torch.ones(1), "m._extra_state": value, "z": torch.ones(1)})
    assert list(source.keys_in_order) == ["a", "m._extra_state", "z"]
    assert list(source) == ["a", "z"]
    kept = source.notes.extra["m._extra_state"]
    assert kept.keys() == value.keys()
    assert kept["betas"] == value["betas"]
    assert same(kept["mean"], value["mean"])
    assert same(kept["bf"], value["bf"])


def test_extra_state_that_is_an_object_is_refused(tmp_path):
    with pytest.raises(SaveError, match=r"m\._extra_state.*can't be kept without pickle"):
        written(tmp_path / "x.safetensors", {"m._extra_state": object()})
    assert not list(tmp_path.iterdir())


def test_same_values_same_bytes(tmp_path):
    state = {key: value.clone() for key, value in awkward().items()}
    written(tmp_path / "a.safetensors", state, epoch="3")
    written(tmp_path / "b.safetensors", {key: value.clone() for key, value in state.items()}, epoch="3")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_tensors_begin_at_the_multiple_that_their_length_has(tmp_path):
    sizes = [3, 64, 10, 128, 32, 1, 8, 16, 640, 5]
    source = written(
        tmp_path / "x.safetensors", {str(i): torch.zeros(n, dtype=torch.uint8) for i, n in enumerate(sizes)}
    )
    for key, size in enumerate(sizes):
        assert source.region(str(key)).offset % min(size & -size, 64) == 0
    assert list(source) == [str(i) for i in range(len(sizes))]


def test_metadata_is_the_users_own(tmp_path):
    source = written(tmp_path / "x.safetensors", {"a": torch.ones(1)}, epoch="3", note="ünïcode ✓")
    assert source.notes.metadata == {"epoch": "3", "note": "ünïcode ✓"}
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as theirs:
        assert theirs.metadata()["format"] == "pt"  # transformers asks for it
        assert theirs.metadata()["epoch"] == "3"


def test_a_file_of_the_library_is_read(tmp_path):
    state = {"b": torch.randn(3), "a": torch.arange(5)}
    save_file(state, tmp_path / "x.safetensors", metadata={"who": "them"})
    source = SafetensorsSource(tmp_path / "x.safetensors")
    assert all(same(source.read(key), value) for key, value in state.items())
    assert source.notes.metadata == {"who": "them"}
    assert source.check("a") is None
    assert source.sealed is None


@pytest.mark.parametrize(
    "state, message",
    [
        ({"net.z": torch.ones(2, dtype=torch.complex128)}, r"net\.z: safetensors has no complex128: save to \.pt"),
        ({"__metadata__": torch.ones(2)}, "can't be called '__metadata__' in safetensors: rename it"),
        ({"\ud800": torch.ones(2)}, "is not valid text"),
        ({"net.s": torch.eye(2).to_sparse()}, r"net\.s is a sparse tensor.*to_dense"),
        ({"net.s": torch.eye(2).to_sparse_csr()}, r"net\.s is a sparse tensor.*sparse_csr"),
        ({"net.m": torch.ones(2, device="meta")}, r"net\.m is on the meta device and has no values"),
        ({"net.q": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}, r"net\.q is a quantised tensor"),
        ({"net.n": torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged)}, r"net\.n is a .*ested"),
        ({"net.l": torch.nn.LazyLinear(2).weight}, r"net\.l is not initialised yet: run the model once"),
        ({"model": {"a": torch.ones(1)}}, r"model is itself a state .*state\['model'\]"),
        ({"epoch": 3}, r"epoch is of type int.*metadata="),
        ({3: torch.ones(1)}, "key 3 is not a string"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(state, message, tmp_path):
    with pytest.raises(SaveError, match=message):
        written(tmp_path / "x.safetensors", state)
    assert not list(tmp_path.iterdir())


def test_a_closed_file_is_not_read(tmp_path):
    source = written(tmp_path / "x.safetensors", {"a": torch.ones(1)})
    source.close()
    with pytest.raises(ValueError, match="was closed"):
        source.read("a")


def with_header(path, change):
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


@pytest.mark.parametrize(
    "name, text",
    [
        ("modsurg.ties", "[[1]]"),
        ("modsurg.ties", '[[0, "b", "nowhere"]]'),
        ("modsurg.ties", '[[0, "a", "a"]]'),
        ("modsurg.ties", "[" * 100_000),
        ("modsurg.extra", '{"a": 1}'),
        ("modsurg.extra", '[[0, "e", [{"$tensor": "x"}, {"x": ["torch.float32", [2], ""]}]]]'),
        ("modsurg.ties", f'[[{10**30}, "b", "a"]]'),
        ("modsurg.extra", '[[0, "e", [{"$tensor": "x"}, {"x": ["torch.load", [1], ""]}]]]'),
        ("modsurg.versions", '{"a": "b"}'),
        ("modsurg.hashes", "[1]"),
        ("modsurg.hashes", "{"),
    ],
)
def test_damaged_notes_are_one_clear_error(name, text, tmp_path):
    path = tmp_path / "x.safetensors"
    written(path, {"a": torch.ones(1)}).close()
    with_header(path, lambda header: header["__metadata__"].update({name: text}))
    with pytest.raises(FormatError, match=r"x\.safetensors: .*damaged"):
        SafetensorsSource(path)


def test_a_dtype_that_torch_lacks_is_named(tmp_path):
    header = json.dumps({"x": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"abc")
    with pytest.raises(FormatError, match="'x' is of dtype F6_E2M3"):
        SafetensorsSource(tmp_path / "x.safetensors")


shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
kinds = st.sampled_from([torch.float32, torch.int64, torch.bool, torch.bfloat16, torch.uint16, torch.complex64])


@settings(deadline=None, max_examples=40)
@given(
    st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), st.tuples(shapes, kinds), max_size=8)
)
def test_any_state_goes_round(tmp_path_factory, plan):
    plan.pop("__metadata__", None)
    state = {key: (torch.randn(shape) * 3).to(kind) for key, (shape, kind) in plan.items()}
    path = tmp_path_factory.mktemp("round") / "x.safetensors"
    source = written(path, state)
    assert list(source) == list(state)
    assert all(same(source.read(key), value) and source.check(key) for key, value in state.items())
    theirs = load_file(path)
    assert all(same(theirs[key], value) for key, value in state.items())


def test_another_dtype_is_for_floating_tensors_only(tmp_path):
    state = {"a": torch.randn(3), "n": torch.arange(3), "h": torch.randn(3).double()}
    derived = DerivedSource(MemorySource(state), dtype=torch.float16, names={"x.a": "a", "n": "n"})
    write_safetensors(tmp_path / "x.safetensors", derived)
    found = load_file(tmp_path / "x.safetensors")
    assert same(found["x.a"], state["a"].half())
    assert same(found["n"], state["n"])
    assert len(found) == 2


def test_a_tie_survives_when_its_first_name_is_left_out(tmp_path):
    weight = torch.randn(3)
    source = MemorySource({"a": weight, "b": weight, "c": weight})
    derived = DerivedSource(source, names={"x": "b", "y": "c"})
    assert derived.notes.ties == {"y": "x"}
    write_safetensors(tmp_path / "x.safetensors", derived)
    assert same(SafetensorsSource(Path(tmp_path / "x.safetensors")).read("y"), weight)


def test_a_header_that_is_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr("modsurg.checkpoints.formats.safetensors.source.HEADER_LIMIT", 1000)
    with pytest.raises(SaveError, match=r"the header would take .* bytes; safetensors allows 1,000: save to \.pt"):
        written(tmp_path / "x.safetensors", {"a" * 1000: torch.ones(1)})
