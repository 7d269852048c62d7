"""How the cost grows: with the modules of a tree, the tensors of a state and the bytes of a file; 1.0 is linear."""

import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks.editing import make, tree
from benchmarks.harness import ROOT, Table, Way, interleaved
from modsurg import diff, load_state, read_state, replace, save_state, select, summary, verify

Sizes = dict[int, dict[str, list[float]]]


def exponent(points: list[tuple[int, float]]) -> float:
    """The slope of log cost over log size, by least squares over the larger half, where constants no longer count."""
    points = sorted(points)[-max(3, len(points) // 2 + 1) :]
    x, y = ([math.log(value) for value in column] for column in zip(*points, strict=True))
    middle_x, middle_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True)) / sum((a - middle_x) ** 2 for a in x)


def grow(what: str, ways_of: Callable[[int], dict[str, Way]], sizes: list[int], runs: int) -> list[Table]:
    """Measure at every size, draw, and give the exponents as a table."""
    measured: dict[str, list[tuple[int, float]]] = {}
    for size in sizes:
        for name, times in interleaved(ways_of(size), runs).items():
            measured.setdefault(name, []).append((size, sorted(times)[len(times) // 2]))
    draw(what, measured)
    slopes = {name: [exponent(points)] for name, points in sorted(measured.items(), key=lambda one: -exponent(one[1]))}
    spans = f"From {sizes[0]:,} to {sizes[-1]:,}. The steepest comes first; 1.0 is linear."
    picture = f"![Cost against {what}](pictures/measured/{_file(what)})"
    return [Table(f"Growth with {what}: exponents", slopes, 1.15, unit="", note=f"{spans}\n\n{picture}")]


def draw(what: str, measured: dict[str, list[tuple[int, float]]]) -> None:
    """Cost against size, both logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for name, points in measured.items():
        axis.loglog(*zip(*points, strict=True), marker=".", label=f"{name} ({exponent(points):.2f})")
    axis.set(xlabel=what, ylabel="seconds")
    axis.legend()
    folder = ROOT / "docs/pictures/measured"
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / _file(what), dpi=100)


def _file(what: str) -> str:
    return f"{what.replace(' ', '-')}.png"


def trees(runs: int) -> list[Table]:
    """Trees of 1,000 to 100,000 modules."""

    def ways(size: int) -> dict[str, Way]:
        model, other = tree(size // 100), tree(size // 100)
        return {
            "select": lambda: select(model, "*.*.1"),
            "replace": lambda: replace(model, "*.*.1", make).undo(),
            "summary": lambda: str(summary(model)),
            "diff": lambda: diff(model, other),
        }

    return grow("modules", ways, [1_000, 3_000, 10_000, 30_000, 100_000], min(runs, 3))


def tensors(runs: int) -> list[Table]:
    """States of 10 to 100,000 tensors of 16 numbers."""
    with tempfile.TemporaryDirectory() as name:

        def ways(size: int) -> dict[str, Way]:
            state = {f"layers.{n}.weight": torch.ones(16) for n in range(size)}
            model = nn.ParameterDict({f"w{n}": torch.ones(16) for n in range(size)})
            path, kept = Path(name, f"{size}.safetensors"), save_state(model, Path(name, f"m{size}.safetensors"))
            return {
                "save_state": lambda: save_state(state, path),
                "load_state": lambda: load_state(model, kept),
                "read_state": lambda: list(read_state(kept)),
                "verify": lambda: verify(kept),
            }

        return grow("tensors", ways, [10, 100, 1_000, 10_000, 30_000, 100_000], min(runs, 3))


def files(runs: int) -> list[Table]:
    """Files of 10 MB to 5 GB."""
    with tempfile.TemporaryDirectory() as name:

        def ways(megabytes: int) -> dict[str, Way]:
            model = nn.ParameterDict({f"w{n}": torch.ones(megabytes << 15) for n in range(8)})
            path = Path(name, "state.safetensors")
            return {
                "save_state": lambda: save_state(model, path),
                "load_state": lambda: load_state(model, path),
                "verify": lambda: verify(path),
            }

        return grow("megabytes", ways, [10, 100, 1_000, 5_000], min(runs, 3))


MEASUREMENTS = (trees, tensors, files)
QUICK = ()
