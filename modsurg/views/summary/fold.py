"""Which rows of a summary are shown, and which of them stand for several."""

import re
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

from modsurg.views.summary.rows import Row


@dataclass(slots=True)
class SummaryLine:
    """One or several equal neighbours.

    Attributes:
        rows: One row, or a run of them that stand under consecutive numbers.
        level: How deep; the children of the root are at 0.
        open: Whether its children have lines of their own.
    """

    rows: tuple[Row, ...]
    level: int
    open: bool

    @property
    def name(self) -> str:
        """`conv1`, or of a run `1-5`."""
        return self.path.rpartition(".")[2]

    @property
    def path(self) -> str:
        """`layer3.1`, or of a run `layer3.1-5`."""
        first, last = self.rows[0], self.rows[-1]
        return first.path if first is last else f"{first.path}-{_numbered(last.name)[1]}"

    @property
    def layer(self) -> str:
        """Class and arguments, with the number of a run."""
        if len(self.rows) == 1:
            return self.rows[0].layer
        return f"{len(self.rows)} x {self.rows[0].layer or 'the same'}"

    def total(self, name: str) -> int | None:
        """The sum of a column; None where no row has it."""
        if len(self.rows) == 1:
            total: int | None = getattr(self.rows[0], name)
            return total
        numbers = [number for row in self.rows if (number := getattr(row, name)) is not None]
        return sum(numbers) if numbers else None


@dataclass(frozen=True, slots=True)
class View:
    """What to show of a tree.

    Attributes:
        depth: Levels below the root, None for all of them. Down to there runs of equal blocks are opened; without a
            depth they are folded.
        paths: If not None, only the rows at these paths, with all that is below and above them, nothing folded.
        expands_first: Whether the first of a run of equal blocks is opened below the line of the run.
    """

    depth: int | None = None
    paths: frozenset[str] | None = None
    expands_first: bool = False

    def lines(self, root: Row) -> Iterator[SummaryLine]:
        """The lines under the root, in order."""
        marks = {} if self.paths is not None else signatures(root)
        above = _above(self.paths)
        waiting = [(row, 0) for row in reversed(self._kept(root.children, above, False))]
        inside: set[int] = set()
        expanded: set[int] = set()
        while waiting:
            row, level = waiting.pop()
            run = [row]
            if self.depth is None or level + 1 == self.depth:
                while waiting and waiting[-1][1] == level and _follows(run[-1], waiting[-1][0], marks):
                    run.append(waiting.pop()[0])
            within = id(row) in inside or (self.paths is not None and row.path in self.paths)
            is_open = len(run) == 1 or (self.expands_first and marks[id(row)] not in expanded)
            children = self._kept(row.children, above, within) if is_open and level + 1 != self.depth else []
            if len(run) > 1 and children:
                expanded.add(marks[id(row)])
                row = run[0]
                children = row.children
            if within:
                inside.update(map(id, children))
            yield SummaryLine(tuple(run), level, bool(children))
            waiting.extend((child, level + 1) for child in reversed(children))

    def _kept(self, rows: list[Row], above: set[str], within: bool) -> list[Row]:
        if self.paths is None or within:
            return rows
        return [row for row in rows if row.path in above]


def _above(paths: frozenset[str] | None) -> set[str]:
    found: set[str] = set()
    for path in paths or ():
        while path and path not in found:
            found.add(path)
            path = path.rpartition(".")[0]
    return found


def _numbered(name: str) -> tuple[str, str]:
    """`layer_` and `11` of `layer_11`; the number is empty where there is none."""
    stem = re.sub(r"[0-9]+$", "", name)
    return stem, name[len(stem) :]


def _follows(row: Row, after: Row, marks: dict[int, int]) -> bool:
    """Whether two neighbours are alike and numbered one after the other; a name besides the number is for blocks."""
    if id(row) not in marks or marks[id(row)] != marks.get(id(after)):
        return False
    (stem, number), (other, follower) = _numbered(row.name), _numbered(after.name)
    if stem != other or not number or not follower or (stem and not row.children):
        return False
    return int(follower) == int(number) + 1


def signatures(root: Row) -> dict[int, int]:
    """A number for each row by its id; equal where two rows print alike all the way down but for their names."""
    rows, waiting = [], [root]
    while waiting:
        row = waiting.pop()
        rows.append(row)
        waiting.extend(row.children)
    numbers: dict[Hashable, int] = {}
    found: dict[int, int] = {}
    for row in reversed(rows):
        below = tuple([(child.name, found[id(child)]) for child in row.children])
        seen = (row.inputs, row.outputs, row.macs, row.activations, row.calls)
        key = (row.kind, row.detail, row.params, row.trainable, row.buffers, seen, *row.notes, below)
        found[id(row)] = numbers.setdefault(key, len(numbers))
    return found
