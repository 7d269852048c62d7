"""What a look costs: `python benchmarks/looking.py [--runs 5] [--cpu-time]`.

`summary` beside torchinfo on three models, each in a process of its own that has made the model, so that the tool's
imports count; then a tree of 100,000 modules, and a sparse safetensors file of 100 GB from the shell, python included.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

MODELS = {
    "resnet152": ("import torchvision; model = torchvision.models.resnet152()", "(1, 3, 224, 224)", "torch.float32"),
    "vit_b_16": ("import torchvision; model = torchvision.models.vit_b_16()", "(1, 3, 224, 224)", "torch.float32"),
    "bert": (
        "from transformers import BertConfig, BertModel; model = BertModel(BertConfig())",
        "(1, 128)",
        "torch.long",
    ),
}
TOOLS = {
    "modsurg": "from modsurg import summary; str(summary(model, {shape}))",
    "torchinfo": (
        "from torchinfo import summary; "
        "str(summary(model, {shape}, dtypes=[{dtype}], depth=99, verbose=0, device='cpu'))"
    ),
}
TREE = """
from torch import nn
model = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2 + n % 7), nn.ReLU(), nn.BatchNorm1d(4), nn.Dropout())
                        for n in range(20_000)))
"""


def seconds(setup: str, look: str, clock: str) -> float:
    """Time of `look` in a new process, after `setup`."""
    code = f"import time, torch\n{setup}\nstart = time.{clock}()\n{look}\nprint(time.{clock}() - start)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def sparse_file(path: Path, tensors: int = 745) -> None:
    """100 GB that take no room on the disk."""
    size = 8192 * 8192 * 2
    header = {
        f"layers.{n}.weight": {"dtype": "BF16", "shape": [8192, 8192], "data_offsets": [n * size, (n + 1) * size]}
        for n in range(tensors)
    }
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + tensors * size)


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cpu-time", action="store_true", help="the process's own time")
    options = parser.parse_args()
    clock = "process_time" if options.cpu_time else "perf_counter"
    print(f"{'':10}{'modsurg':>12}{'torchinfo':>12}{'ratio':>8}")
    for name, (setup, shape, dtype) in MODELS.items():
        times: dict[str, list[float]] = {tool: [] for tool in TOOLS}
        for _ in range(options.runs):
            for tool, look in TOOLS.items():
                times[tool].append(seconds(setup, look.format(shape=shape, dtype=dtype), clock))
        ours, theirs = (statistics.median(times[tool]) for tool in TOOLS)
        print(f"{name:10}{ours:10.3f} s{theirs:10.3f} s{theirs / ours:7.1f}x")
    look = "from modsurg import summary; summary(model)"
    print(f"100,000 modules: {statistics.median(seconds(TREE, look, clock) for _ in range(options.runs)):.2f} s")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "big.safetensors")
        sparse_file(file)
        command = f"import subprocess, sys; subprocess.run([sys.executable, '-m', 'modsurg', 'summary', {str(file)!r}])"
        timed = [seconds("", f"{command}  # {n}", "perf_counter") for n in range(options.runs)]
        print(f"100 GB of safetensors: {statistics.median(timed):.2f} s")


if __name__ == "__main__":
    main()
