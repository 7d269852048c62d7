"""What the measurements share: ways run in turn, medians with their spread, memory by the operating system, tables."""

import gc
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

Way = Callable[[], object]
ROOT = Path(__file__).resolve().parents[1]
PEERS = (
    *("torch", "torchvision", "safetensors", "huggingface_hub", "accelerate", "peft", "transformers"),
    *("torchinfo", "torchview", "torch-pruning", "lightning", "pytorch-ignite"),
)


@dataclass
class Table:
    """One measurement of several ways to do the same; the first way is ours.

    Attributes:
        title: What is done.
        times: Way -> what each run took, in `unit`.
        limit: The greatest ratio of ours to the fastest of `against` that meets the target, or the greatest value
            where `against` is empty.
        against: The peers that the target names.
        unit: "s", "MB" or the like.
        note: What a reader has to know.
        room: The file that measured it.
    """

    title: str
    times: dict[str, list[float]]
    limit: float | None = None
    against: tuple[str, ...] = ()
    unit: str = "s"
    note: str = ""
    room: str = ""

    @property
    def ours(self) -> str:
        """The first way."""
        return next(iter(self.times))

    @property
    def value(self) -> float:
        """What the target speaks of: a ratio to the fastest peer that it names, or our median."""
        peers = [statistics.median(self.times[name]) for name in self.against if name in self.times]
        return statistics.median(self.times[self.ours]) / (min(peers) if peers else 1.0)

    @property
    def noise(self) -> float:
        """Half of our range, as a part of our median."""
        values = self.times[self.ours]
        return (max(values) - min(values)) / 2 / max(statistics.median(values), 1e-12)

    def verdict(self) -> str:
        """Whether the target is met, in words."""
        if self.limit is None:
            return ""
        shown = (
            f"{self.value:.2f}x of {' or '.join(self.against)}"
            if self.against
            else f"{self.value:.3g} {self.unit}".rstrip()
        )
        limit = f"{self.limit:.3g}{'x' if self.against else ' ' + self.unit}".rstrip()
        return f"Target: at most {limit}. Measured: {shown}. **{'Met' if self.value <= self.limit else 'Missed'}.**"

    def markdown(self) -> str:
        """The table as the documentation has it."""
        scale, unit = (1e3, "ms") if self.unit == "s" and self.value_of(self.ours) < 1 else (1, self.unit)
        median = f"median, {unit}" if unit else "median"
        rows = [f"### {self.title}", "", f"| | {median} | range | |", "|---|---:|---:|---:|"]
        for name, values in self.times.items():
            low, middle, high = (scale * f for f in (min(values), statistics.median(values), max(values)))
            ours = self.value_of(self.ours)
            ratio = f"{self.value_of(name) / ours:.2f}x" if ours else ""
            rows.append(f"| {name} | {_number(middle)} | {_number(low)} to {_number(high)} | {ratio} |")
        text = "\n".join(rows)
        return "\n\n".join(part for part in (text, self.verdict(), self.note) if part) + "\n"

    def value_of(self, name: str) -> float:
        """The median of one way."""
        return statistics.median(self.times[name])

    def as_json(self) -> dict[str, object]:
        """Return everything that was measured."""
        return vars(self) | {"value": self.value}

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> "Table":
        """Return the table that `as_json` described."""
        return cls(**{name: value for name, value in entry.items() if name != "value"})


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def interleaved(ways: dict[str, Way], runs: int, prepare: Way | None = None) -> dict[str, list[float]]:
    """Seconds of each way: once to warm up, then `runs` times in turn, so that a slow minute falls on all of them."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for run in range(runs + 1):
        for name, way in ways.items():
            if prepare is not None:
                prepare()
            start = time.perf_counter()
            way()
            if run:
                times[name].append(time.perf_counter() - start)
    return times


def fresh(codes: dict[str, str], runs: int) -> dict[str, list[float]]:
    """The number that each program prints last, every run in a process of its own, in turn."""
    found: dict[str, list[float]] = {name: [] for name in codes}
    for _ in range(runs):
        for name, code in codes.items():
            done = subprocess.run(
                [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
            found[name].append(float(done.stdout.split()[-1]))
    return found


def extra_memory(way: Way) -> float:
    """MB of resident memory that a call takes at its highest, by the kernel; pages of mapped files count too."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    way()
    return (_status("VmHWM") - before) / 1e3


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def there(name: str) -> bool:
    """Whether a peer is installed; says so when not."""
    found = importlib.util.find_spec(name) is not None
    if not found:
        print(f"  {name} is not installed, and left out")
    return found


def machine() -> dict[str, str]:
    """What ran it."""
    from modsurg.views.environment import environment
    from modsurg.views.text import size

    known = environment()
    cpu, memory = known["cpu"], known["memory"]
    facts = {"date": time.strftime("%Y-%m-%d"), "python": platform.python_version(), "system": platform.platform()}
    facts["cpu"] = f"{cpu['name']}, {cpu['usable_cores']} cores"
    facts["memory"] = size(memory["total"])
    return facts | {name: version(name) for name in PEERS if importlib.util.find_spec(name.replace("pytorch-", ""))}


def slower(new: list[Table], old: dict[str, dict[str, Any]], margin: float = 0.1) -> Iterator[str]:
    """Lines about the tables whose value grew beyond the margin and both runs' noise."""
    before = {entry["title"]: entry for room in old.values() for entry in room["tables"]}
    for table in new:
        if table.title not in before:
            continue
        entry = before[table.title]
        known = Table.from_json(entry)
        if table.value > known.value * (1 + margin + max(table.noise, known.noise)):
            yield f"{table.title}: {known.value:.3g} before, {table.value:.3g} now"


def by_room(tables: list[Table]) -> dict[str, dict[str, Any]]:
    """Return the machine and the tables of each room, as the JSON files hold them."""
    facts = machine() if tables else {}
    rooms = dict.fromkeys(table.room for table in tables)
    return {room: {"machine": facts, "tables": [t.as_json() for t in tables if t.room == room]} for room in rooms}


def write(tables: list[Table], page: Path) -> None:
    """Put the tables into the page and into the JSON file beside it, in place of those of the same rooms."""
    begin, end = "<!-- measured -->\n", "<!-- end -->"
    head, rest = page.read_text().split(begin)
    file = page.with_suffix(".json")
    known = json.loads(file.read_text()) if file.exists() else {}
    known |= by_room(tables)
    rooms = {room: known[room] for room in sorted(known)}
    parts = [_section(room, **found) for room, found in rooms.items()]
    page.write_text(f"{head}{begin}\n{chr(10).join(parts)}\n{end}{rest.split(end)[1]}")
    file.write_text(json.dumps(rooms, indent=1) + "\n")


def _section(room: str, machine: dict[str, str], tables: list[dict[str, Any]]) -> str:
    facts = "\n".join(f"- {name}: {value}" for name, value in machine.items())
    parts = [f"## {room.capitalize()}\n\n`python -m benchmarks --full --only {room}`\n"]
    parts += [Table.from_json(entry).markdown() for entry in tables]
    parts.append(f'??? note "Machine and versions"\n\n{textwrap.indent(facts, "    ")}\n')
    return "\n".join(parts)
