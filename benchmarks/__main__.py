"""Measure modsurg beside its peers: `python -m benchmarks [--full] [--only ROOM] [--json FILE] [--against FILE]`.

Every table says whether its target is met. `--against` an earlier JSON names what got slower since, and then exits
with 1; `--write` puts the tables into docs/benchmarks.md. Measure on a machine that does nothing else.
"""

import argparse
import compileall
import importlib
import json
import sys
import time
import traceback
from pathlib import Path

from benchmarks.harness import ROOT, Table, by_room, slower, write

ROOMS = ("editing", "shaping", "keeping", "merging", "looking", "training", "growth")


def measure(rooms: list[str], runs: int, full: bool) -> tuple[list[Table], int]:
    """Print the tables as they come; them, and how many measurements failed."""
    tables, failed = [], 0
    for room in rooms:
        module = importlib.import_module(f"benchmarks.{room}")
        for measurement in module.MEASUREMENTS if full else module.QUICK:
            start = time.perf_counter()
            try:
                found = measurement(runs)
            except Exception:  # one that fails must not cost the others
                traceback.print_exc()
                failed += 1
                continue
            for table in found:
                table.room = room
                print(table.markdown(), flush=True)
            tables += found
            print(f"({measurement.__name__}: {time.perf_counter() - start:.0f} s)\n", flush=True)
    return tables, failed


def main() -> int:
    """Measure, compare, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split("\n")[0])
    parser.add_argument("--full", action="store_true", help="every table, up to half an hour; else those that gate")
    parser.add_argument("--only", choices=ROOMS, action="append", help="one room; may be given several times")
    parser.add_argument("--runs", type=int, help="of each way (5; 9 with --full)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured there")
    parser.add_argument("--against", type=Path, metavar="FILE", help="tell what is slower than in this JSON")
    parser.add_argument(
        "--write",
        action="store_true",
        help="put the tables into docs/benchmarks.md, in place of those of the same rooms",
    )
    options = parser.parse_args()
    compileall.compile_dir(ROOT / "modsurg", quiet=1)  # as pip does with every package that it installs
    tables, failed = measure(options.only or list(ROOMS), options.runs or (9 if options.full else 5), options.full)
    if options.json:
        options.json.write_text(json.dumps(by_room(tables), indent=1))
    if options.write:
        write(tables, ROOT / "docs/benchmarks.md")
    worse = list(slower(tables, json.loads(options.against.read_text()))) if options.against else []
    print(*(f"slower: {line}" for line in worse), sep="\n")
    return int(bool(worse or failed))


if __name__ == "__main__":
    sys.exit(main())
