"""Writing directories that torch.distributed.checkpoint loads."""

import fcntl
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from modsurg import convert, save_state
from modsurg.errors import SaveError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


def source(tmp_path, **state):
    return save_state(state or {"w": torch.arange(6.0).reshape(2, 3)}, tmp_path / "a.safetensors")


def test_torch_loads_it(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(3, 4))
    model[2].weight = model[0].weight
    convert(save_state(model, tmp_path / "a.safetensors"), tmp_path / "run")
    state = {key: torch.zeros_like(value) for key, value in model.state_dict().items()}
    dcp.load(state, checkpoint_id=tmp_path / "run")
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_values_that_are_not_in_order(tmp_path):
    torch.save({"t": torch.arange(6.0).reshape(2, 3).t(), "e": torch.ones(1).expand(4)}, tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "run")
    state = {"t": torch.zeros(3, 2), "e": torch.zeros(4)}
    dcp.load(state, checkpoint_id=tmp_path / "run")
    assert torch.equal(state["t"], torch.arange(6.0).reshape(2, 3).t())
    assert state["e"].tolist() == [1] * 4


def test_an_empty_directory_is_taken(tmp_path):
    (tmp_path / "run").mkdir()
    convert(source(tmp_path), tmp_path / "run")
    assert (tmp_path / "run" / ".metadata").exists()


def test_a_directory_with_something_in_it_is_refused(tmp_path):
    convert(source(tmp_path), tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(SaveError, match="run exists already: give the name of a directory that does not, or remove it"):
        convert(source(tmp_path, v=torch.ones(1)), tmp_path / "run")
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_what_a_killed_process_left_is_cleared(tmp_path):
    dead = tmp_path / ".run.0badcafe.saving"
    dead.mkdir()
    (dead / "__0_0.distcp").write_bytes(b"half")
    alive = tmp_path / ".run.00000000.saving"
    alive.mkdir()
    lock = os.open(alive, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    convert(source(tmp_path), tmp_path / "run")
    os.close(lock)
    assert sorted(os.listdir(tmp_path)) == [".run.00000000.saving", "a.safetensors", "run"]


def test_places_where_nothing_can_be_written(tmp_path):
    with pytest.raises(SaveError, match=r"/proc/run: can't be written"):
        convert(source(tmp_path), "/proc/run")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_disk_that_is_full(tmp_path):
    path = source(tmp_path, w=torch.ones(1_000_000))
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this container may not mount")
    try:
        with pytest.raises(
            SaveError, match=r"run: no room for it: [0-9,]+ bytes were written and at least 2,[0-9,]+ more"
        ):
            convert(path, disk / "run")
        assert not os.listdir(disk)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


LIMITED = """
    import resource, signal, sys
    from modsurg import convert

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    convert(sys.argv[1], sys.argv[2])
"""


def test_no_room(tmp_path):
    """A limit on the size of files stands for a full disk."""
    path = source(tmp_path, w=torch.ones(100_000))
    script = "\n".join(line.strip() for line in LIMITED.splitlines())
    done = subprocess.run([sys.executable, "-c", script, path, tmp_path / "run"], capture_output=True, text=True)
    assert "SaveError: run: DCP could not write it" in done.stderr
    assert os.listdir(tmp_path) == ["a.safetensors"]
