"""Converting between the formats: nothing lost, nothing run, and no more memory than two tensors."""

import os
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from torch import nn

from modsurg import (
    convert,
    load_checkpoint,
    load_model,
    load_state,
    read_state,
    save_checkpoint,
    save_model,
    save_state,
    summary,
)
from modsurg.errors import FormatError, ModsurgWarning, SaveError, TrustError

TARGETS = ["a.safetensors", "a.safetensors.index.json", "a.pt", "a.pth", "a.bin", "directory"]


class Counting(nn.Module):
    """Has extra state."""

    def __init__(self, value=None):
        super().__init__()
        self.value = value

    def get_extra_state(self):
        return self.value

    def set_extra_state(self, value):
        self.value = value


class Net(nn.Module):
    def __init__(self, value=None):
        super().__init__()
        self.z = nn.Linear(3, 4)
        self.count = Counting(value)
        self.a = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(3, 4))
        self.a[1].weight = self.z.weight
        self.register_buffer("low", torch.arange(3).half())


def state_of(path):
    with read_state(path) as state:
        return {key: state[key] for key in state}


def check_same(path, model):
    state = model.state_dict()
    found = state_of(path)
    assert list(found) == list(state)
    for key, value in state.items():
        if isinstance(value, torch.Tensor):
            assert found[key].dtype == value.dtype
            assert torch.equal(found[key], value)
    assert found["z.weight"] is found["a.1.weight"] or found["z.weight"].data_ptr() == found["a.1.weight"].data_ptr()
    assert found["count._extra_state"] == {"n": [1, 2]}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", TARGETS)
def test_there_and_on(tmp_path, source, target):
    model = Net({"n": [1, 2]})
    first = save_state(model, tmp_path / "first.safetensors", metadata={"who": "me"})
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    between = convert(first, tmp_path / "one" / source)
    done = convert(between.target, tmp_path / "two" / target)
    assert (done.tensors, done.nbytes, done.left, done.taken) == (10, 158, (), "")
    check_same(done.target, model)
    with read_state(done.target) as state:
        assert state.metadata == {"who": "me"}
        assert dict(state.source.notes.versions) == {"a.0": 2}
        assert dict(state.source.notes.ties) == {"a.1.weight": "z.weight"}
    fresh = Net()
    assert load_state(fresh, done.target)
    assert fresh.count.value == {"n": [1, 2]}


def test_same_source_same_bytes(tmp_path):
    first = save_state(Net([1]), tmp_path / "first.safetensors")
    for name in ("a.pt", "b.pt"):
        convert(first, tmp_path / name)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
    convert(tmp_path / "a.pt", tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == first.read_bytes()


def test_a_checkpoint_of_somebody(tmp_path):
    model = nn.Linear(3, 2)
    torch.save({"model": model.state_dict(), "epoch": 3, "optimizer": {}}, tmp_path / "run.pt")
    done = convert(tmp_path / "run.pt", tmp_path / "net.safetensors")
    assert (done.taken, done.left) == ("model", ("epoch", "optimizer"))
    arrow = f"{tmp_path}/run.pt (its 'model') -> {tmp_path}/net.safetensors"
    assert str(done) == f"{arrow}: 2 tensors, 32 bytes; left out: epoch, optimizer"
    assert list(state_of(done.target)) == ["weight", "bias"]


def test_rename_only_and_dtype(tmp_path):
    save_state({"body.a": torch.ones(2), "body.n": torch.tensor(3), "head.w": torch.ones(1)}, tmp_path / "a.pt")
    done = convert(
        tmp_path / "a.pt", tmp_path / "b.safetensors", rename={"body.": "trunk."}, only="body", dtype=torch.bfloat16
    )
    found = state_of(tmp_path / "b.safetensors")
    assert {key: value.dtype for key, value in found.items()} == {"trunk.a": torch.bfloat16, "trunk.n": torch.int64}
    assert done.left == ("head.w",)
    done = convert(tmp_path / "a.pt", tmp_path / "c.pt", rename={"head": None})
    assert list(state_of(tmp_path / "c.pt")) == ["body.a", "body.n"]


def test_shards(tmp_path):
    save_state({f"k{i}": torch.ones(100) for i in range(5)}, tmp_path / "a.pt")
    done = convert(tmp_path / "a.pt", tmp_path / "b.safetensors", shard_size=800)
    assert done.target.name == "b.safetensors.index.json"
    assert len(list(tmp_path.glob("b-*.safetensors"))) == 3
    assert list(state_of(done.target)) == [f"k{i}" for i in range(5)]


@pytest.mark.parametrize("name", ["a.safetensors.index.json", "a-00001-of-00003.safetensors"])
def test_a_part_beside_the_set_that_it_comes_from(tmp_path, name):
    state = {f"k{i}": torch.ones(100) for i in range(3)}
    index = save_state(state, tmp_path / "a.safetensors", shard_size=400)
    done = convert(tmp_path / name, tmp_path / "a.safetensors", only="k0", shard_size="1GB")
    assert list(state_of(done.target)) == ["k0"]
    assert list(state_of(index)) == list(state)
    save_state(state, tmp_path / "a.safetensors", shard_size="1GB")
    assert os.listdir(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
def test_onto_itself(tmp_path, name):
    path = save_state({"w": torch.arange(50.0)}, tmp_path / name)
    convert(path, path, dtype=torch.float16, rename={"w": "v"})
    assert torch.equal(state_of(path)["v"], torch.arange(50).half())
    assert os.listdir(tmp_path) == [name]


def test_progress(tmp_path):
    save_state({"a": torch.ones(2), "b": torch.ones(6), "c": torch.empty(0)}, tmp_path / "a.pt")
    seen = []
    convert(tmp_path / "a.pt", tmp_path / "b.safetensors", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (32, 32)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rename": {"w": "v"}}, "rename gives 'w' and 'v' the same name 'v'; nothing was written"),
        ({"rename": {"x": "v"}}, "rename: 'x' matches no key; nothing was written"),
        ({"rename": lambda key: 3}, "rename gives 'w' the name 3, which is not a string; nothing was written"),
        ({"only": "x"}, "only='x' matches no key of .*; nothing was written. The keys are like w, v"),
        ({"only": 3}, "3 chooses no keys: give a name"),
        ({"rename": [("w", "x")]}, "rename=.* must be a dict such as"),
        ({"dtype": torch.int8}, r"dtype=torch\.int8 would lose"),
        ({"shard_size": "many"}, "shard_size='many' is not a size"),
    ],
)
def test_what_can_not_be(tmp_path, options, message):
    save_state({"w": torch.ones(1), "v": torch.ones(2)}, tmp_path / "a.pt")
    (tmp_path / "b.safetensors").write_bytes(b"old")
    with pytest.raises(SaveError, match=message):
        convert(tmp_path / "a.pt", tmp_path / "b.safetensors", **options)
    assert (tmp_path / "b.safetensors").read_bytes() == b"old"


def test_targets_that_can_not_be(tmp_path):
    path = save_state({"w": torch.ones(1, dtype=torch.complex128)}, tmp_path / "a.pt")
    with pytest.raises(SaveError, match="w: safetensors has no complex128: save to"):
        convert(path, tmp_path / "b.safetensors")
    with pytest.raises(SaveError, match="the name does not say which format to write"):
        convert(path, tmp_path / "b.onnx")
    with pytest.raises(SaveError, match="knows no shard_size"):
        convert(path, tmp_path / "b", shard_size=3)
    with pytest.raises(SaveError, match=f"{tmp_path} exists already"):
        convert(path, tmp_path)
    with pytest.raises(SaveError, match="there is no directory"):
        convert(path, tmp_path / "no" / "b")
    with pytest.raises(FileNotFoundError, match=r"no\.pt"):
        convert(tmp_path / "no.pt", tmp_path / "b.safetensors")
    assert os.listdir(tmp_path) == ["a.pt"]


class Evil:
    def __reduce__(self):
        return os.system, ("touch it_ran",)


def test_a_hostile_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"w": torch.ones(1), "x": Evil()}, "a.pt")
    with pytest.raises(TrustError, match=r"would run posix\.system"):
        convert("a.pt", "b.safetensors")
    assert os.listdir() == ["a.pt"]


@pytest.mark.parametrize("target", ["b.safetensors", "b.pt", "b"])
def test_a_source_that_breaks_off(tmp_path, target):
    path = save_state({"a": torch.ones(10), "b": torch.ones(1 << 16)}, tmp_path / "a.safetensors")

    def cut(done, total):
        os.truncate(path, 5000)

    with pytest.raises((FormatError, SaveError), match="cut off"):
        convert(path, tmp_path / target, progress=cut)
    assert os.listdir(tmp_path) == ["a.safetensors"]


MEASURE = """
    import sys
    from pathlib import Path
    import torch
    from modsurg import convert

    def resident(name):
        words = Path("/proc/self/status").read_text().split()
        return int(words[words.index(name) + 1])

    torch.set_num_threads(1)
    folder, targets = Path(sys.argv[1]), sys.argv[2:]
    for name in targets:
        convert(folder / "small.safetensors", folder / "small" / name)
    before = resident("VmRSS:")
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
    for name in targets:
        convert(folder / "large.safetensors", folder / "large" / name)
    print(resident("VmHWM:") - before)
"""


def extra_memory(folder, count, size, targets):
    """Bytes that converting `count` tensors of `size` bytes takes on top of a small one, in a process of its own."""
    save_state({f"k{i}": torch.empty(size // 4).fill_(i) for i in range(count)}, folder / "large.safetensors")
    save_state({"k": torch.ones(3)}, folder / "small.safetensors")
    (folder / "small").mkdir()
    (folder / "large").mkdir()
    (folder / "measure.py").write_text(textwrap.dedent(MEASURE))
    command = [sys.executable, "-W", "ignore", folder / "measure.py", folder, *targets]
    return 1024 * int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="the highest memory is told under /proc")
@pytest.mark.parametrize("target", ["b.pt", "b.safetensors", "b.safetensors.index.json", "b"])
def test_memory_is_two_tensors(tmp_path, target):
    size = 40 << 20  # given back to the system at once when it is freed
    assert extra_memory(tmp_path, 8, size, [target]) < 2 * size + (8 << 20)


@pytest.mark.parametrize("target", ["b.safetensors", "b.pt"])
def test_a_whole_model_in_another_dtype_says_so(tmp_path, target):
    path = save_model(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), tmp_path / "a.safetensors")
    convert(path, tmp_path / target, dtype=torch.float16)
    shown = summary(tmp_path / target)
    assert str(shown).splitlines()[0].split() == ["Sequential", f"{target},", "float16"]
    assert shown.to_dict()["total"]["param_bytes"] == 2 * 28
    if target.endswith("tensors"):
        assert load_model(tmp_path / target)[0].weight.dtype == torch.float16


@pytest.mark.parametrize("options", [{"only": "0"}, {"rename": {"0": "first"}}, {"rename": {"1": None}}])
@pytest.mark.parametrize("target", ["b.safetensors", "b.pt"])
def test_part_of_a_whole_model_is_a_state(tmp_path, options, target):
    path = save_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), tmp_path / "a.safetensors")
    done = convert(path, tmp_path / target, **options)
    state = state_of(done.target)
    assert summary(done.target).to_dict()["total"]["params"] == sum(value.numel() for value in state.values())
    with pytest.raises(FormatError, match=r"build the model, then load_state\(model, path\)"):
        load_model(done.target)


def test_a_model_taken_out_of_a_run_is_a_state(tmp_path):
    model = nn.Linear(4, 2)
    path = save_checkpoint(tmp_path / "run.safetensors", step=3, model=model)
    convert(path, tmp_path / "b.safetensors", only="model", rename={"model.": ""})
    shown = summary(tmp_path / "b.safetensors")
    assert "a run at" not in str(shown)
    assert shown.to_dict()["total"]["params"] == 10
    assert load_state(nn.Linear(4, 2), tmp_path / "b.safetensors")
    convert(path, tmp_path / "whole.safetensors")
    assert load_checkpoint(tmp_path / "whole.safetensors", model=model) == 3


def test_one_file_of_several_is_not_taken_for_all(tmp_path):
    index = save_state({"a": torch.ones(9), "b": torch.ones(9)}, tmp_path / "a.safetensors", shard_size=36)
    part = sorted(tmp_path.glob("a-*"))[0]
    with pytest.warns(ModsurgWarning, match=rf"is one of several files; for all of them: convert {index}$"):
        convert(part, tmp_path / "b.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert convert(index, tmp_path / "b.pt").tensors == 2


@pytest.mark.soak
@pytest.mark.parametrize("target", ["b.pt", "b.safetensors.index.json", "b"])
def test_five_gigabytes(tmp_path, target):
    assert extra_memory(tmp_path, 50, 100 << 20, [target]) < 500 << 20
