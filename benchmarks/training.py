"""What the trainer costs beside loops written by hand and other trainers, the whole of `fit` included."""

import logging
import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.utils.data import DataLoader

from benchmarks.harness import Table, fresh, interleaved, there
from modsurg import Trainer
from modsurg.training.device import place

CPU = torch.device("cpu")
Batches = list[tuple[torch.Tensor, torch.Tensor]]
Peer = Callable[[nn.Module, Batches], object]


def linear() -> nn.Module:
    """Nothing but overhead."""
    return nn.Linear(48, 10)


def tutorial() -> nn.Module:
    """The tutorial's network for CIFAR-10."""
    convolutions = [
        layer
        for n_in, n_out in ((3, 32), (32, 32), (32, 64))
        for layer in (nn.Conv2d(n_in, n_out, 5, padding=2), nn.MaxPool2d(2))
    ]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(1024, 64), nn.Linear(64, 10))


def parts(model: nn.Module) -> tuple[torch.optim.Optimizer, nn.Module]:
    """Optimizer and loss."""
    return torch.optim.SGD(model.parameters(), lr=0.01), nn.CrossEntropyLoss()


def loop(model: nn.Module, batches: Batches) -> None:
    """What one writes by hand."""
    optimizer, loss = parts(model)
    model.train()
    for inputs, target in batches:
        optimizer.zero_grad()
        loss(model(inputs), target).backward()
        optimizer.step()


def tuned(model: nn.Module, batches: Batches) -> None:
    """The same with channels_last."""
    place(model, CPU, channels_last=True)
    loop(model, batches)


def ours(model: nn.Module, batches: Batches) -> None:
    """The same by the trainer."""
    Trainer(model, *parts(model), device=CPU, progress=False).fit(batches)


def ignite(model: nn.Module, batches: Batches) -> None:
    """The same by Ignite's engine."""
    from ignite.engine import create_supervised_trainer

    create_supervised_trainer(model, *parts(model)).run(batches, max_epochs=1)


def accelerate(model: nn.Module, batches: Batches) -> None:
    """The loop with what Accelerate prepares."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    optimizer, loss = parts(model)
    model, optimizer = accelerator.prepare(model, optimizer)
    for inputs, target in batches:
        optimizer.zero_grad()
        accelerator.backward(loss(model(inputs), target))
        optimizer.step()


def lightning(model: nn.Module, batches: Batches) -> None:
    """The same by Lightning, with all that can be turned off turned off."""
    import lightning

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.loss = nn.CrossEntropyLoss()

        def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
            return self.loss(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return parts(self.model)[0]

    loader = DataLoader(batches, batch_size=None)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    lightning.Trainer(max_epochs=1, accelerator="cpu", **quiet).fit(Module(), loader)


def each(peers: dict[str, Peer], make: Callable[[], nn.Module], batches: Batches, runs: int) -> dict[str, list[float]]:
    """Milliseconds a step."""

    def run(peer: Peer) -> None:
        torch.manual_seed(0)
        peer(make(), batches)

    times = interleaved({name: partial(run, peer) for name, peer in peers.items()}, runs)
    return {name: [value / len(batches) * 1e3 for value in values] for name, values in times.items()}


def overhead(runs: int) -> list[Table]:
    """1,000 steps of Linear(48, 10)."""
    batches = [(torch.randn(32, 48), torch.randint(10, (32,))) for _ in range(1000)]
    peers: dict[str, Peer] = {"Trainer": ours, "loop by hand": loop}
    peers |= {name: way for name, way in (("ignite", ignite), ("accelerate", accelerate)) if there(name)}
    if there("lightning"):
        peers["lightning"] = lightning
    times = each(peers, linear, batches, runs)
    by_hand = times.pop("loop by hand")
    over = {name: [a - b for a, b in zip(values, by_hand, strict=True)] for name, values in times.items()}
    middle = sorted(by_hand)[len(by_hand) // 2]
    note = f"The loop itself takes {middle:.3f} ms a step; each run is compared with the loop beside it."
    return [Table("`Linear(48, 10)`, what a step takes over a loop by hand", over, 0.05, unit="ms", note=note)]


def network(runs: int) -> list[Table]:
    """30 steps of 64 pictures."""
    batches = [(torch.randn(64, 3, 32, 32), torch.randint(10, (64,))) for _ in range(30)]
    peers: dict[str, Peer] = {"Trainer": ours, "plain loop": loop, "loop with the same settings": tuned}
    times = each(peers, tutorial, batches, runs)
    title = "The tutorial's network, a step of 64 pictures"
    alike = {name: times[name] for name in ("Trainer", "loop with the same settings")}
    return [
        Table(title, times, 0.85, ("plain loop",), unit="ms"),
        Table(f"{title}, like with like", alike, 1.02, ("loop with the same settings",), unit="ms"),
    ]


AFTERWARDS = """
import statistics, time, torch
from torch import nn
from modsurg import Trainer
torch.set_num_threads(1)
model = nn.Sequential(*(nn.Conv2d(16, 16, 3, padding=1) for _ in range(4)))
images = torch.randn(32, 16, 32, 32)
small = nn.Linear(8, 8)
trainer = Trainer(small, torch.optim.SGD(small.parameters(), lr=0.1), nn.MSELoss(), device="cpu", progress=False)
FIT
times = []
with torch.no_grad():
    for _ in range(40):
        start = time.perf_counter()
        model(images), torch.empty(8_000_000).fill_(1.0)
        times.append(time.perf_counter() - start)
print(statistics.median(times) * 1e3)
"""


def afterwards(runs: int) -> list[Table]:
    """Inference and a large allocation in a process that has trained, and in one that has not."""
    fit = "trainer.fit([(torch.ones(4, 8), torch.ones(4, 8))] * 10)"
    times = fresh({"after fit": AFTERWARDS.replace("FIT", fit), "without it": AFTERWARDS.replace("FIT", "")}, runs)
    return [Table("Inference in a process that has trained", times, 1.1, ("without it",), unit="ms")]


MEASUREMENTS = (overhead, network, afterwards)
QUICK = MEASUREMENTS
