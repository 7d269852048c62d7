"""What keeping costs: `python benchmarks/keeping.py [--runs 5] [--megabytes 400]`.

States of one size, saved and loaded, beside safetensors, torch and raw writes; whole models beside their constructors.
Interleaved in one process, page cache warm, medians.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from safetensors.torch import load_file
from torch import nn

from modsurg import load_model, load_state, save_model, save_state


def interleaved(ways: dict[str, Callable[[], object]], runs: int) -> None:
    """Run each way in turn and print the medians, the first as 1.00."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(runs + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - start)
    first = statistics.median(times[next(iter(ways))][1:])
    for name, values in times.items():
        median = statistics.median(values[1:])
        print(f"  {name:44} {median * 1000:8.0f} ms  ({min(values[1:]) * 1000:.0f} to {max(values[1:]) * 1000:.0f})"
              f"  {median / first:.2f}x")  # fmt: skip


def write_raw(path: Path, tensors: list[torch.Tensor]) -> None:
    """The same bytes without a format."""
    with path.open("wb", buffering=0) as file:
        for tensor in tensors:
            file.write(memoryview(tensor.detach().numpy()).cast("B"))
        os.fsync(file.fileno())


def read_raw(path: Path, tensors: list[torch.Tensor]) -> None:
    """The same bytes into the parameters' own memory."""
    with path.open("rb", buffering=0) as file:
        for tensor in tensors:
            file.readinto(memoryview(tensor.detach().numpy()).cast("B"))


def states(folder: Path, megabytes: int, runs: int) -> None:
    """Save and load one state."""
    model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(megabytes // 4)))
    tensors = list(model.parameters())
    safe, pt, raw = folder / "state.safetensors", folder / "state.pt", folder / "raw"
    print(f"save_state, {megabytes} MB")
    interleaved(
        {
            "raw write + fsync": lambda: write_raw(raw, tensors),
            "save_state .safetensors": lambda: save_state(model, safe),
            "save_state .pt": lambda: save_state(model, pt),
        },
        runs,
    )
    print(f"load_state, {megabytes} MB")
    interleaved(
        {
            "readinto the parameters": lambda: read_raw(raw, tensors),
            "load_state .safetensors": lambda: load_state(model, safe),
            "load_file + load_state_dict": lambda: model.load_state_dict(load_file(safe)),
            "load_state .pt": lambda: load_state(model, pt),
            "torch.load + load_state_dict": lambda: model.load_state_dict(torch.load(pt)),
        },
        runs,
    )


def whole(folder: Path, name: str, runs: int) -> None:
    """Open one whole model."""
    build = getattr(torchvision.models, name)
    path, pickled, state = folder / "model.safetensors", folder / "model.pt", folder / "model-state.pt"
    model = build()
    save_model(model, path)
    torch.save(model, pickled)
    torch.save(model.state_dict(), state)
    print(f"load_model, {name}")
    interleaved(
        {
            "load_model .safetensors": lambda: load_model(path),
            "constructor + load_state_dict": lambda: build().load_state_dict(torch.load(state)),
            "unsafe torch.load(mmap=True)": lambda: torch.load(pickled, mmap=True, weights_only=False),
        },
        runs,
    )


def main() -> None:
    """Measure all of it in a temporary folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=400)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        states(Path(folder), options.megabytes, options.runs)
        for name in ("resnet152", "vit_b_16"):
            whole(Path(folder), name, options.runs)


if __name__ == "__main__":
    main()
