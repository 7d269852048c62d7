"""The rows of a printed comparison: equal lines folded, the rest drawn as a tree and wrapped."""

import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field, replace

from modsurg.views.diff.values import Values
from modsurg.views.text import cells, padded

MANY = 20
ALIGNED = 28


@dataclass(frozen=True, slots=True)
class DiffLine:
    """One change before it has its place.

    Attributes:
        mark: + - or ~.
        path: Where it stands.
        text: What changed.
        goal: The new name or the new path, after an arrow.
        values: For lines about values, so that several can be one.
        count: How many changes it stands for.
    """

    mark: str
    path: str
    text: str
    goal: str = ""
    values: Values | None = None
    count: int = 1


@dataclass(slots=True)
class _Branch:
    lines: list[DiffLine] = field(default_factory=list)
    children: dict[str, "_Branch"] = field(default_factory=dict)


def folded(lines: list[DiffLine]) -> list[DiffLine]:
    """Lines that say the same of block after block as one, with * for the number.

    Children of one container that all moved by the same step are one line too. Lines about values differ from each
    other; they are put together only where there are many.
    """
    runs = _runs(lines)
    lines = _grouped(lines, runs.get, _as_run)
    lines = _grouped(lines, _place_and_text, _as_one)
    if sum(line.values is not None for line in lines) > MANY:
        lines = _grouped(lines, lambda line: (line.mark, _starred(line)) if line.values else None, _as_one)
    return lines


def laid_out(lines: Iterable[DiffLine], width: int) -> list[tuple[str, str]]:
    """Mark and text of each row, the tree indented, paths without a branch on one row."""
    root = _Branch()
    for line in lines:
        *parents, name = line.path.split(".")
        branch = root
        for part in parents:
            branch = branch.children.setdefault(part, _Branch())
        branch.children.setdefault(f"{name} -> {line.goal}" if line.goal else name, _Branch()).lines.append(line)
    rows: list[tuple[str, str]] = []
    _draw(root, 1, width, rows)
    return rows


def _draw(branch: _Branch, indent: int, width: int, rows: list[tuple[str, str]]) -> None:
    named = [_chained(name, child) for name, child in branch.children.items()]
    widths = [cells(name) for name, child in named if child.lines and cells(name) <= ALIGNED]
    column = max(widths, default=0)
    for name, child in named:
        by_mark: dict[str, list[str]] = {}
        for line in child.lines:
            by_mark.setdefault(line.mark, []).append(line.text)
        for mark, texts in by_mark.items():
            rows += _wrapped(mark, name, "; ".join(filter(None, texts)), indent, column, width)
        if not child.lines:
            rows.append((" ", " " * indent + name))
        _draw(child, indent + 2, width, rows)


def _chained(name: str, branch: _Branch) -> tuple[str, _Branch]:
    while not branch.lines and len(branch.children) == 1:
        (part, branch), *_ = branch.children.items()
        name = f"{name}.{part}"
    return name, branch


def _wrapped(mark: str, name: str, text: str, indent: int, column: int, width: int) -> list[tuple[str, str]]:
    start = " " * indent + padded([name], column)[0] + "  "
    if not text:
        return [(mark, start.rstrip())]
    hang = " " * (cells(start) + 1 if cells(start) + 41 <= width else indent + 5)
    rows, row, is_empty = [], mark + start, True
    for word in text.split(" "):
        if not is_empty and cells(row) + 1 + cells(word) > width:
            rows.append(row)
            row, is_empty = hang, True
        row, is_empty = row + ("" if is_empty else " ") + word, False
    first, *rest = [*rows, row]
    return [(mark, first[len(mark) :]), *((" ", row[1:]) for row in rest)]


def _grouped(
    lines: list[DiffLine], key: Callable[[DiffLine], Hashable], merge: Callable[[list[DiffLine]], DiffLine]
) -> list[DiffLine]:
    """Three or more lines of one key as one, where the first of them stood; lines whose key is None stay."""
    groups: dict[Hashable, list[DiffLine]] = {}
    for line in lines:
        found = key(line)
        groups.setdefault(id(line) if found is None else found, []).append(line)
    return [line for group in groups.values() for line in ([merge(group)] if len(group) > 2 else group)]


def _place_and_text(line: DiffLine) -> Hashable:
    """None for what goes somewhere, and for a block that is gone or new: its number is what one wants to know."""
    is_block = line.mark != "~" and line.path.rpartition(".")[2][:1].isdecimal()
    return None if line.goal or is_block else (line.mark, _starred(line), line.text)


def _starred(line: DiffLine) -> str:
    return re.sub(r"\d+", "*", line.path)


def _as_one(group: list[DiffLine]) -> DiffLine:
    values = [line.values for line in group if line.values is not None]
    if not values:
        count = sum(line.count for line in group)
        return replace(group[0], path=_starred(group[0]), text=f"{group[0].text}  in {count:,} places", count=count)
    worst = max(values, key=lambda one: math.inf if math.isnan(one.max_abs) else one.max_abs)
    text = (
        f"{sum(one.differing for one in values):,} of {sum(one.total for one in values):,} in {len(values):,} tensors "
        f"differ, by up to {worst.max_abs:.3g} (relative {max(one.max_rel for one in values):.3g})"
    )
    return replace(group[0], path=_starred(group[0]), text=text, count=len(values))


def _runs(lines: list[DiffLine]) -> dict[DiffLine, Hashable]:
    """The run to which each numbered child belongs: neighbours that came, went, or moved by the same step."""
    found: dict[DiffLine, Hashable] = {}
    ranks: Counter[Hashable] = Counter()
    for line in lines:
        parent, _, name = line.path.rpartition(".")
        if not name.isdecimal() or (line.goal and not line.goal.isdecimal()) or (line.mark == "~" and not line.goal):
            continue
        way = (parent, line.mark, int(line.goal) - int(name) if line.goal else line.text)
        found[line] = (*way, int(name) - ranks[way])
        ranks[way] += 1
    return found


def _as_run(group: list[DiffLine]) -> DiffLine:
    texts = {line.text for line in group}
    path = f"{group[0].path}-{group[-1].path.rpartition('.')[2]}"
    goal = f"{group[0].goal}-{group[-1].goal}" if group[0].goal else ""
    return replace(group[0], path=path, goal=goal, text=texts.pop() if len(texts) == 1 else "", count=len(group))
