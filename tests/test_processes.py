"""The same script in one process and in two, under torchrun with gloo."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, WeightedRandomSampler

from modsurg.errors import BatchError, TrainingError
from modsurg.training.processes import check_sharding, divided, farewell, gathered, join, lost, rank, summed

SCRIPT = str(Path(__file__).with_name("data_parallel.py"))


def start(directory, strategy, end=0, how="new", processes=2):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, SCRIPT, str(directory), strategy, str(end), how]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def start_without_a_launcher(directory, strategy, end):
    """Two processes that nobody ends when the other one does; returns what the first says last."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    command = [sys.executable, SCRIPT, str(directory), strategy, str(end), "new"]
    environment = {**os.environ, **address, "OMP_NUM_THREADS": "1"}
    first, second = (
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**environment, "RANK": one}) for one in "01"
    )
    with first, second:
        assert second.wait(300) == -signal.SIGKILL
        return first.communicate(timeout=300)[1]


def numbers(result):
    assert result.returncode == 0, result.stderr
    return torch.tensor(json.loads(result.stdout.splitlines()[-1]), dtype=torch.float64)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return numbers(start(tmp_path_factory.mktemp("alone"), "ddp", processes=1))


def test_a_killed_process_ends_the_others_with_words_and_the_run_goes_on(tmp_path, alone):
    words = start_without_a_launcher(tmp_path, "ddp", end=5)
    assert "another process of this run has ended, so this one ends too" in words
    assert "resume=True" in words
    shutil.copytree(tmp_path, tmp_path / "copy")
    for directory, processes in ((tmp_path, 2), (tmp_path / "copy", 1)):
        resumed = numbers(start(directory, "ddp", how="resume", processes=processes))
        torch.testing.assert_close(resumed, alone, atol=1e-5, rtol=0)


@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 of this torch can't run on a cpu")
def test_sharded_as_one_process(tmp_path, alone):
    start(tmp_path, "fsdp", end=8)
    assert (tmp_path / "last" / ".metadata").exists()
    resumed = numbers(start(tmp_path, "fsdp", how="resume"))
    torch.testing.assert_close(resumed, alone, atol=1e-5, rtol=0)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["best", "last", "sharded-00000009"]


LEAVE = """
import atexit, sys, threading
from pathlib import Path
import torch
from torch import nn
from modsurg import Trainer
def threads():
    named = {path.parent.name: path.read_text() for path in Path("/proc/self/task").glob("*/comm")}
    return {one for one, name in named.items() if "autograd" not in name} - pythons
def look():
    print(len(before) > 0, len(threads()), vars(own))
atexit.register(look)  # which runs after what the trainer registers
model = nn.Linear(6, 3)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
trainer = Trainer(model, optimizer, nn.MSELoss(), device="cpu", strategy=sys.argv[1], progress=False)
trainer.fit([(torch.ones(2, 6), torch.ones(2, 3))] * 4)
pythons = {str(thread.native_id) for thread in threading.enumerate()}
before = threads()
class DeviceMesh:
    pass
own = DeviceMesh()
own.kept = True
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads as Linux shows them")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_no_thread_outlives_the_group(strategy):
    """One that lets go of a tensor after the interpreter aborts the process."""
    if strategy == "fsdp" and not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("FSDP2 of this torch can't run on a cpu")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    command = [sys.executable, *launcher, sys.executable, "-c", LEAVE, strategy]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.stdout == "True 0 {'kept': True}\n" * 2, done.stderr


BUSY = """
import sys, time
import torch
import torch.distributed as dist
from torch import nn
from modsurg import Trainer
model = nn.Linear(6, 3)
trainer = Trainer(model, torch.optim.SGD(model.parameters()), nn.MSELoss(), device="cpu", progress=False)
if dist.get_rank() == 0:
    work = dist.all_reduce(torch.ones(3), async_op=True)
    sys.exit(3)
time.sleep(40)
print("busy to the end", flush=True)
"""


@pytest.mark.skipif(torch.__version__ < (2, 8), reason="this torch waits for the others with Python's lock held")
def test_a_process_that_ends_does_not_wait_for_one_that_is_busy():
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    done = subprocess.run([sys.executable, *launcher, sys.executable, "-c", BUSY], capture_output=True, text=True)
    assert "exitcode  : 3" in done.stderr
    assert "busy to the end" not in done.stdout


def test_a_sampler_is_not_replaced_in_silence():
    weighted = DataLoader(range(8), 2, sampler=WeightedRandomSampler(torch.ones(8), 8))
    with pytest.raises(BatchError, match=r"WeightedRandomSampler gives every process all .*sampler=DistributedSampler"):
        divided(weighted, 0)


def test_alone_there_is_nothing_to_agree_on():
    device = torch.device("cpu")
    assert (join(device), rank(), gathered(3), summed({"a": 2.0}, device)) == (1, 0, [3], {"a": 2.0})


def test_a_lost_peer_is_told_from_other_errors():
    assert lost(RuntimeError("[pair.cc:534] Connection reset by peer"))
    assert not lost(RuntimeError("shape mismatch"))
    assert "process 0: another process" in str(farewell(RuntimeError("Connection closed by peer")))


def test_what_does_not_go_with_sharding():
    with pytest.raises(TrainingError, match='no gradient scaler: precision="bf16"'):
        check_sharding("fp16", None)
    with pytest.raises(TrainingError, match="can't average a sharded model"):
        check_sharding("fp32", object())
