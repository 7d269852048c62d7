"""Reading directories of torch.distributed.checkpoint without running their pickles."""

import os
import pickle
import shutil
import struct
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from modsurg import load_state, read_state, verify
from modsurg.checkpoints.formats.dcp.reader import DistributedSource
from modsurg.errors import FormatError, TrustError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


def saved(path, state):
    dcp.save(state, checkpoint_id=path)
    return path


def test_a_state(tmp_path):
    state = {
        "w": torch.arange(6.0).reshape(2, 3),
        "t": torch.arange(6.0).reshape(2, 3).t(),
        "h": torch.ones(3, dtype=torch.bfloat16),
        "number": torch.tensor(3),
        "empty": torch.empty(0, 2),
    }
    source = DistributedSource(saved(tmp_path / "run", state))
    assert list(source) == list(state)
    for key, tensor in state.items():
        assert torch.equal(source.read(key), tensor)
        assert source[key].dtype == tensor.dtype
        assert source.check(key)
    assert source.region("w") is not None


def test_fills_a_model(tmp_path):
    old, new = (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in range(2))
    optimizer = torch.optim.Adam(old.parameters())
    old(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    state = {"model": old.state_dict(), "optim": optimizer.state_dict(), "step": 3, "notes": ["a", torch.ones(1)]}
    path = saved(tmp_path / "run", {"app": state})
    with DistributedSource(path) as source:
        assert source.taken == "app.model"
        assert list(source.left) == ["app.optim", "app.step", "app.notes"]
    assert load_state(new, path)
    assert torch.equal(old[0].weight, new[0].weight)


def test_extra_state(tmp_path):
    state = {"w": torch.ones(1), "a._extra_state": {"n": 3, "t": torch.ones(2)}, "b._extra_state": (1, "x")}
    source = DistributedSource(saved(tmp_path / "run", state))
    extra = source.notes.extra
    assert extra["b._extra_state"] == (1, "x")
    assert extra["a._extra_state"]["n"] == 3
    assert extra["a._extra_state"]["t"].tolist() == [1, 1]


RANKS = """
    import os
    import sys
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    rank, ranks = int(sys.argv[3]), int(sys.argv[4])
    dist.init_process_group("gloo", init_method=sys.argv[2], rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    full = torch.arange(35.0).reshape(7, 5)
    state = {
        "rows": distribute_tensor(full, mesh, [Shard(0)]),
        "columns": distribute_tensor(full, mesh, [Shard(1)]),
        "copy": distribute_tensor(full, mesh, [Replicate()]),
        "plain": torch.ones(3),
        "small": distribute_tensor(torch.ones(1), mesh, [Shard(0)]),
    }
"""
SAVE = (
    RANKS
    + """
    dcp.save({"model": state}, checkpoint_id=sys.argv[1])
    os._exit(0)  # gloo's threads may end an interpreter that is being finalised
"""
)
LOAD = (
    RANKS
    + """
    for tensor in state.values():
        tensor.zero_()
    dcp.load(state, checkpoint_id=sys.argv[1])
    assert torch.equal(state["rows"].full_tensor(), full)
    assert torch.equal(state["columns"].full_tensor(), full)
    os._exit(0)  # gloo's threads may end an interpreter that is being finalised
"""
)


def launch(program, ranks, folder, argument):
    """Run a program on several processes that find each other through a file."""
    script = folder / "program.py"
    script.write_text(textwrap.dedent(program))
    meeting = folder / f"meeting{ranks}"
    meeting.unlink(missing_ok=True)
    processes = [
        subprocess.Popen(
            [sys.executable, script, argument, f"file://{meeting}", str(rank), str(ranks)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert not any(process.returncode for process in processes), errors


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """What two processes saved together."""
    folder = tmp_path_factory.mktemp("shared")
    launch(SAVE, 2, folder, str(folder / "run"))
    return folder / "run"


def test_two_processes_save_one_loads(shared):
    full = torch.arange(35.0).reshape(7, 5)
    with DistributedSource(shared) as source:
        assert source.taken == "model"
        assert sorted(source) == ["columns", "copy", "plain", "rows", "small"]
        assert source.region("rows") is None
        assert all(torch.equal(source.read(key), full) for key in ("rows", "columns", "copy"))
        assert source.read("small").tolist() == [1]
    assert verify(shared)


def copied(shared, tmp_path):
    return shutil.copytree(shared, tmp_path / "run")


def test_a_file_is_missing_or_cut_off(shared, tmp_path):
    path = copied(shared, tmp_path)
    file = path / "__1_0.distcp"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(FormatError, match=r"__1_0\.distcp is cut off at byte"):
        dict(read_state(path))
    file.unlink()
    with pytest.raises(FormatError, match=r"__1_0\.distcp can't be opened \(No such file or directory\)"):
        dict(read_state(path))


def test_a_damaged_piece(shared, tmp_path):
    path = copied(shared, tmp_path)
    file = path / "__1_0.distcp"
    content = bytearray(file.read_bytes())
    content[content.rindex(struct.pack("<f", 34))] ^= 1
    file.write_bytes(content)
    assert len(verify(path).damaged) == 1


@pytest.mark.parametrize("share", [0, 0.3, 0.9, 0.99])
def test_an_index_that_is_cut_off(shared, tmp_path, share):
    path = copied(shared, tmp_path)
    content = (path / ".metadata").read_bytes()
    (path / ".metadata").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(FormatError, match=r"run: the pickle is (damaged or )?cut off"):
        DistributedSource(path)


class Evil:
    def __reduce__(self):
        return os.system, ("touch it_ran",)


def test_a_hostile_index(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = saved(tmp_path / "run", {"w": torch.ones(1)})
    index = dcp.FileSystemReader(path).read_metadata()
    index.planner_data = Evil()
    (path / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(TrustError, match=r"names posix\.system, not a class of torch\.distributed\.checkpoint"):
        DistributedSource(path)
    assert not (tmp_path / "it_ran").exists()


def changed(path, change):
    """The same directory with a changed index."""
    index = dcp.FileSystemReader(path).read_metadata()
    change(index)
    (path / ".metadata").write_bytes(pickle.dumps(index))


def first(index):
    return next(iter(index.storage_data.values()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: setattr(first(index), "relative_path", "../x"), r"refers to a file \.\./x outside"),
        (lambda index: setattr(first(index), "relative_path", "/etc/passwd"), "outside the directory"),
        (lambda index: setattr(first(index), "offset", -1), "stands for sizes"),
        (lambda index: setattr(first(index), "length", 1 << 40), "is cut off at byte"),
        (lambda index: setattr(first(index), "transform_descriptors", ["zstd"]), "written through an extension"),
        (lambda index: setattr(first(index), "length", 100), "as a zip archive, but its list"),
        (lambda index: index.storage_data.clear(), "is damaged"),
        (lambda index: index.state_dict_metadata["w"].chunks.clear(), "are not the whole of a tensor"),
        (lambda index: index.state_dict_metadata["w"].chunks.append(index.state_dict_metadata["w"].chunks[0]), "whole"),
        (
            lambda index: setattr(index.state_dict_metadata["w"], "size", torch.Size([9])),
            r"not the whole of a tensor \(9",
        ),
        (lambda index: setattr(index.state_dict_metadata["w"], "size", torch.Size([2])), r"a piece \(4,\) at \(0,\)"),
        (lambda index: setattr(index.state_dict_metadata["w"].properties, "dtype", torch.int32), "is not what"),
        (lambda index: setattr(index, "state_dict_metadata", 3), "is damaged"),
        (lambda index: setattr(index.state_dict_metadata["w"], "size", torch.Size([0, 1 << 59, 1 << 59])), "no memory"),
    ],
)
def test_a_lying_index(tmp_path, change, message):
    path = saved(tmp_path / "run", {"w": torch.arange(4.0)})
    changed(path, change)
    with pytest.raises(FormatError, match=message):
        read_state(path)["w"]


def test_no_index(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(FormatError, match=r"is a directory, not a checkpoint: it has no \.metadata"):
        read_state(tmp_path / "run")


@pytest.mark.soak
def test_three_processes_load(shared, tmp_path):
    from modsurg import convert

    convert(shared, tmp_path / "again")
    launch(LOAD, 3, tmp_path, str(tmp_path / "again"))


@pytest.mark.parametrize("text", ['{"notes": "a", "stored": []}', '{"notes": []}', "[" * 100_000, "3", "{"])
def test_notes_beside_it_that_are_damaged(tmp_path, text):
    path = saved(tmp_path / "run", {"w": torch.arange(4.0)})
    (path / "modsurg.json").write_text(text)
    with pytest.raises(FormatError, match=r"modsurg\.json is damaged|the notes of modsurg"):
        read_state(path)


def test_an_index_that_is_a_pipe(tmp_path):
    (tmp_path / "run").mkdir()
    os.mkfifo(tmp_path / "run" / ".metadata")
    with pytest.raises(FormatError, match=r"\.metadata is not a file"):
        DistributedSource(tmp_path / "run")


ADVICE = (
    RANKS
    + """
    from modsurg import read_state, save_state
    from modsurg.errors import TrustError
    path = sys.argv[1] + "/rank.pt"
    torch.save({"rows": state["rows"], "columns": state["columns"]}, path)
    try:
        read_state(path)
    except TrustError as error:
        os.chdir(sys.argv[1])
        eval(str(error).split("as wrote it: ")[1])
    assert torch.equal(read_state("state.safetensors")["columns"], full)
    os._exit(0)  # gloo's threads may end an interpreter that is being finalised
"""
)


def test_the_line_for_a_file_of_one_rank_can_be_executed(tmp_path):
    launch(ADVICE, 1, tmp_path, str(tmp_path))
    assert read_state(tmp_path / "state.safetensors")["rows"].shape == (7, 5)
