"""What the trainer costs: `python benchmarks/training.py [--runs 9] [--cpu-time]`.

Two tables, each run beside its peer and interleaved with it, medians: `Linear(48, 10)`, where only overhead shows, the
whole `fit` included; and the tutorial's network beside the plain loop and beside a loop with the trainer's settings.
`--cpu-time` counts the process's own time, for a machine on which others work too.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from modsurg import Trainer
from modsurg.training.devices import kept_memory, place

CPU = torch.device("cpu")
Batches = list[tuple[torch.Tensor, torch.Tensor]]


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


def loop(model: nn.Module, batches: Batches) -> None:
    """What one writes by hand."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loss = nn.CrossEntropyLoss()
    model.train()
    for inputs, target in batches:
        optimizer.zero_grad()
        loss(model(inputs), target).backward()
        optimizer.step()


def tuned(model: nn.Module, batches: Batches) -> None:
    """The same with channels_last and kept memory."""
    with kept_memory(CPU, on=True):
        place(model, CPU, channels_last=True)
        loop(model, batches)


def trainer(model: nn.Module, batches: Batches) -> None:
    """The same by the trainer."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    Trainer(model, optimizer, nn.CrossEntropyLoss(), device=CPU, progress=False).fit(batches)


def measure(
    peers: dict[str, Callable[[nn.Module, Batches], None]],
    make: Callable[[], nn.Module],
    batches: Batches,
    runs: int,
    clock: Callable[[], float],
) -> dict[str, float]:
    """Give milliseconds a step, the median of the runs."""
    times: dict[str, list[float]] = {name: [] for name in peers}
    for run in range(runs + 1):
        for name, peer in peers.items():
            torch.manual_seed(0)
            model = make()
            start = clock()
            peer(model, batches)
            if run:
                times[name].append((clock() - start) / len(batches) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    small = [(torch.randn(32, 48), torch.randint(10, (32,))) for _ in range(1000)]
    times = measure({"loop": loop, "trainer": trainer}, linear, small, options.runs, clock)
    over = times["trainer"] - times["loop"]
    print(f"Linear(48, 10)  loop {times['loop']:.3f} ms  trainer {times['trainer']:.3f} ms  over {over:.3f} ms a step")
    pictures = [(torch.randn(64, 3, 32, 32), torch.randint(10, (64,))) for _ in range(30)]
    peers = {"loop": loop, "tuned": tuned, "trainer": trainer}
    times = measure(peers, tutorial, pictures, max(options.runs // 3, 1), clock)
    ratios = (
        f"{times['trainer'] / times['loop']:.2f} of the loop, {times['trainer'] / times['tuned']:.2f} of the tuned one"
    )
    shown = "  ".join(f"{name} {value:.1f} ms" for name, value in times.items())
    print(f"tutorial's net  {shown}  {ratios}")


if __name__ == "__main__":
    main()
