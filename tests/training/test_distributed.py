"""The same script in one process and in two, under torchrun with gloo."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.torch_version import TorchVersion
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from modsurg.errors import BatchError, TrainingError
from modsurg.training import distributed_data as under_test
from modsurg.training.data import ResumableLoader
from modsurg.training.distributed import (
    check_sharding,
    gathered,
    is_peer_lost,
    join_processes,
    peer_lost_error,
    rank,
    summed,
)
from modsurg.training.distributed_data import split_training, split_validation

OLD = torch.__version__ < "2.9"
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


@pytest.mark.skipif(OLD, reason="FSDP2 of this torch can't train on a cpu")
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
    print(f"{len(before) > 0} {len(threads())} {vars(own)}")  # in one piece, whatever the other process says
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
    if strategy == "fsdp" and OLD:
        pytest.skip("FSDP2 of this torch can't train on a cpu")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    command = [sys.executable, *launcher, sys.executable, "-c", LEAVE, strategy]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    said = re.findall(r"\w+ \d+ \{.*?\}", done.stdout)  # gloo may say more, in the midst of a line
    assert said == ["True 0 {'kept': True}"] * 2, done.stdout + done.stderr


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


@pytest.mark.skipif(torch.__version__ < "2.8", reason="this torch waits for the others with Python's lock held")
def test_a_process_that_ends_does_not_wait_for_one_that_is_busy():
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    done = subprocess.run([sys.executable, *launcher, sys.executable, "-c", BUSY], capture_output=True, text=True)
    assert "exitcode  : 3" in done.stderr
    assert "busy to the end" not in done.stdout


TOGETHER = """
import json
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from modsurg import Trainer, freeze
from modsurg.errors import ModsurgError
from modsurg.training.distributed import gathered, rank

x = torch.randn(44, 4, generator=torch.Generator().manual_seed(0))
batches = list(zip(x.split(8), x.sum(1, keepdim=True).split(8)))  # the last has 4 samples, and is of the second process

class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(x, x.sum(1, keepdim=True)))

class Scaled(nn.MSELoss):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, output, target):
        return super().forward(output, target) * self.scale

class Unused(nn.Sequential):
    def forward(self, x):
        return self[0](x)

def make(model=None, loss=None, **options):
    torch.manual_seed(0)
    model, loss = model or nn.Sequential(nn.Linear(4, 1)), loss or nn.MSELoss()
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.05)
    return Trainer(model, optimizer, loss, device="cpu", progress=False, **options)

def own_body(call):
    trainer = make()
    for epoch in trainer.epochs(batches):
        for inputs, target in epoch:
            epoch.step(trainer.loss(call(trainer)(inputs), target))
    return trainer

def fit(trainer, loader):
    trainer.fit(loader)
    return trainer

def frozen_on_the_way():
    trainer = make(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)))
    trainer.fit(batches, epochs=2, on_step=lambda trainer: freeze(trainer.model, "0"))
    return trainer

def weighted():
    # one step of two batches that weigh 8 and 2, one in each process, beside the same step by hand
    weights = {float(batches[0][1].sum()): 8, float(batches[1][1].sum()): 2}
    trainer, alone = (make(samples=lambda batch: weights[float(batch[1].sum())]) for _ in range(2))
    trainer.fit(batches[:2])
    losses = [alone.loss(alone.model(inputs), target) for inputs, target in batches[:2]]
    ((8 * losses[0] + 2 * losses[1]) / 10).backward()
    alone.optimizer.step()
    for ours, other in zip(trainer.model.parameters(), alone.model.parameters(), strict=True):
        torch.testing.assert_close(ours, other)
    return trainer

cases = {
    "weighted": weighted,
    "past the wrapper": lambda: own_body(lambda trainer: trainer.model),
    "through it": lambda: own_body(lambda trainer: trainer.runner),
    "windows": lambda: fit(make(accumulate=3), batches),
    "stream": lambda: fit(make(), DataLoader(Stream(), batch_size=8)),
    "frozen on the way": frozen_on_the_way,
    "loss": lambda: make(loss=Scaled()),
    "unused": lambda: fit(make(Unused(nn.Linear(4, 1), nn.Linear(2, 2))), batches),
}
said = {}
for name, case in cases.items():
    try:
        trainer = case()
        first, second = gathered([p.tolist() for p in trainer.model.parameters()])
        said[name] = f"{trainer.step} steps, {'alike' if first == second else 'apart'}"
    except ModsurgError as error:
        said[name] = str(error)
if rank() == 0:
    print(json.dumps(said))
"""


def test_two_processes_train_one_model_or_say_why_not(tmp_path):
    script = tmp_path / "together.py"
    script.write_text(TOGETHER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout.splitlines()[-1])
    steps = {"weighted": 1, "through it": 3, "windows": 1, "stream": 3, "frozen on the way": 6}
    alike = {name: said.pop(name) for name in steps}
    assert alike == {name: f"{number} steps, alike" for name, number in steps.items()}
    where = r"epoch 1, batch 1 \(step 1\): "
    for name, words in (
        ("past the wrapper", where + r".* called itself, .*: call trainer.runner\(inputs\), or epoch.forward\(batch\)"),
        ("loss", "scale of the loss would train alone in each process: make it a part of the model"),
        ("unused", where + r'1.weight and 1 more got no gradient, .*: modsurg.freeze\(model, "..."\)'),
    ):
        assert re.match(words, said[name])


@pytest.fixture
def two(monkeypatch):
    """Calls a function as each of two processes; what the first one gathers is what the second one gets."""

    def call(function, *arguments):
        sent, results = [], []

        def gathered(value):
            sent.append(value)
            return sent

        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 2)
        monkeypatch.setattr(under_test, "gathered", gathered)
        for number in range(2):
            monkeypatch.setattr(torch.distributed, "get_rank", lambda *_, number=number: number)
            results.append(list(function(*arguments)))
        return results

    return call


class Backwards:
    """Batches of one's own."""

    def __iter__(self):
        return iter([[5, 4], [3], [2, 1, 0]])


VALIDATED = {
    "in order": ({"batch_size": 2}, [0, 1, 2, 3, 4, 5, 6]),
    "shuffled": ({"batch_size": 2, "shuffle": True}, [0, 1, 2, 3, 4, 5, 6]),
    "a part": ({"batch_size": 2, "sampler": SubsetRandomSampler([1, 3, 5])}, [1, 3, 5]),
    "batches": ({"batch_sampler": Backwards()}, [0, 1, 2, 3, 4, 5]),
    "a batch sampler of torch's": ({"batch_sampler": BatchSampler(SubsetRandomSampler([1, 2]), 2, False)}, [1, 2]),
    "one by one": ({"batch_size": None, "sampler": SubsetRandomSampler([1, 3, 5])}, [1, 3, 5]),
}


@pytest.mark.parametrize("how", VALIDATED)
def test_each_sample_that_a_sampler_gives_is_validated_once(two, how):
    options, expected = VALIDATED[how]
    first, second = two(split_validation, DataLoader(range(7), **options))
    samples = [[int(n) for batch in part for n in torch.as_tensor(batch).reshape(-1)] for part in (first, second)]
    assert all(samples)
    assert sorted(samples[0] + samples[1]) == expected


def test_what_is_distributed_already_stays(two):
    sampler = DistributedSampler(range(8), num_replicas=2, rank=0)
    for loader in (
        DataLoader(range(8), 2, sampler=sampler),
        DataLoader(range(8), batch_sampler=BatchSampler(sampler, 2, True)),
    ):
        assert [len(part) for part in (*two(split_validation, loader), *two(split_training, loader, 0))] == [2, 2, 2, 2]


def test_loaders_of_another_class_keep_their_habits(two):
    class Own(DataLoader):
        def set_epoch(self, epoch):
            told.append(epoch)

    told = []
    sampler = DistributedSampler(range(8), num_replicas=2, rank=0)
    distributed = Own(range(8), 2, sampler=sampler)
    assert [len(part) for part in (*two(split_validation, distributed), *two(split_training, distributed, 0))] == [
        2,
        2,
        2,
        2,
    ]
    first, second = two(lambda loader: ResumableLoader(split_training(loader, 0)).begin(3), Own(range(8), 2))
    assert [batch.tolist() for batch in (*first, *second)] == [[0, 1], [4, 5], [2, 3], [6, 7]]
    assert told == [3, 3]


@pytest.mark.parametrize(
    ("sampler", "name"),
    [
        (WeightedRandomSampler(torch.ones(8), 8), "WeightedRandomSampler"),
        (SubsetRandomSampler(range(4)), "SubsetRandomSampler"),
        (RandomSampler(range(8), replacement=True), "RandomSampler"),
        (RandomSampler(range(8), num_samples=4), "RandomSampler"),
    ],
)
def test_a_sampler_is_not_replaced_in_silence(sampler, name):
    for loader in (
        DataLoader(range(8), 2, sampler=sampler),
        DataLoader(range(8), batch_sampler=BatchSampler(sampler, 2, True)),
    ):
        with pytest.raises(BatchError, match=rf"{name} gives every process all .*sampler=DistributedSampler"):
            split_training(loader, 0)
    fix = r"batch_sampler=Backwards\(DistributedSampler\(dataset\), ...\), whose `sampler` is that one"
    with pytest.raises(BatchError, match=f"Backwards gives every process all of its samples: {fix}"):
        split_training(DataLoader(range(8), batch_sampler=Backwards()), 0)


def test_shuffled_batches_are_dealt_out(two):
    first, second = two(split_training, DataLoader(range(8), 2, shuffle=True), 0)
    assert sorted(int(n) for batch in (*first, *second) for n in batch) == list(range(8))


def test_alone_there_is_nothing_to_agree_on():
    device = torch.device("cpu")
    assert (join_processes(device), rank(), gathered(3), summed({"a": 2.0}, device)) == (1, 0, [3], {"a": 2.0})


def test_a_lost_peer_is_told_from_other_errors():
    assert is_peer_lost(RuntimeError("[pair.cc:534] Connection reset by peer"))
    assert not is_peer_lost(RuntimeError("shape mismatch"))
    assert "process 0: another process" in str(peer_lost_error(RuntimeError("Connection closed by peer")))


def test_what_does_not_go_with_sharding(monkeypatch):
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.8.0"))
    with pytest.raises(TrainingError, match="before torch 2.9, fully_shard adds up the gradients"):
        check_sharding(torch.device("cpu"), "fp32", None)
    with pytest.raises(TrainingError, match='no gradient scaler: precision="bf16"'):
        check_sharding(torch.device("cuda"), "fp16", None)
    with pytest.raises(TrainingError, match="can't average a sharded model"):
        check_sharding(torch.device("cuda"), "fp32", object())
