"""What an edit costs: `python benchmarks/editing.py [--runs 5]`.

`replace` of 20,000 modules in a tree of 101,001, every check on, beside a bare loop of `set_submodule`, interleaved in
one process; and how much of both is making the new modules.
"""

import argparse
import statistics
import time
from collections.abc import Callable

from torch import nn

from modsurg import replace


def tree() -> nn.Module:
    """101,001 modules, three levels deep."""
    return nn.Sequential(*(nn.Sequential(*(leaves() for _ in range(20))) for _ in range(1000)))


def leaves() -> nn.Module:
    """Two layers with an activation behind each."""
    return nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1), nn.ReLU())


def timed(action: Callable[[], object]) -> tuple[float, object]:
    """Seconds of one call, and what it returned."""
    start = time.perf_counter()
    result = action()
    return time.perf_counter() - start, result


def main() -> None:
    """Measure and print one line for each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    model = tree()
    chosen = {n for n, m in model.named_modules() if n.endswith(".1") and type(m) is nn.ReLU}

    def loop() -> None:
        for name, _ in list(model.named_modules()):
            if name in chosen:
                model.set_submodule(name, nn.Linear(4, 4))

    times: dict[str, list[float]] = {"modsurg.replace": [], "set_submodule loop": [], "making the modules": []}
    for _ in range(runs):
        seconds, report = timed(
            lambda: replace(model, lambda path, module: path in chosen, lambda old: nn.Linear(4, 4))
        )
        times["modsurg.replace"].append(seconds)
        report.undo()  # type: ignore[attr-defined]  # a Report
        del report
        times["set_submodule loop"].append(timed(loop)[0])
        for name in chosen:
            model.set_submodule(name, nn.ReLU())
        times["making the modules"].append(timed(lambda: [nn.Linear(4, 4) for _ in chosen])[0])
    for name, values in times.items():
        print(f"{name:20} {statistics.median(values):.2f} s  ({min(values):.2f} to {max(values):.2f})")


if __name__ == "__main__":
    main()
