"""What a comparison found: changes, and how they print."""

import html
import shutil
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from modsurg.errors import visible
from modsurg.views.diff.layout import DiffLine, folded, laid_out
from modsurg.views.diff.values import Values
from modsurg.views.svg import Style, draw_svg
from modsurg.views.text import in_colour, longest_run

Kind = Literal[
    "added",
    "removed",
    "replaced",
    "renamed",
    "moved",
    "wrapped",
    "unwrapped",
    "shape",
    "dtype",
    "role",
    "requires_grad",
    "tied",
    "value",
    "values",
]
ROOT = "(root)"
_MARKS = {"added": "+", "removed": "-"}
_COLOURS = {"+": "32", "-": "31", "~": "33", "!": "35", " ": "2"}
_NAMES = {
    "shape": "of another shape",
    "dtype": "of another dtype",
    "role": "of another role",
    "requires_grad": "with another requires_grad",
    "tied": "tied otherwise",
    "value": "other values",
    "values": "with other values",
}


@dataclass(frozen=True, slots=True)
class Difference:
    """One difference.

    Attributes:
        kind: What differs.
        path: In the new tree; in the old one for what was removed.
        old_path: In the old tree; None for what was added.
        old: What was there, as text: a class with its arguments, a shape, a dtype; "" where nothing was.
        new: What is there, as text.
        values: How the values differ, for the kind "values".
        under: The highest module below which every tensor has this very change; None if that is the tensor alone.
    """

    kind: Kind
    path: str
    old_path: str | None
    old: str
    new: str
    values: Values | None = None
    under: str | None = None

    @property
    def name(self) -> str:
        """The last segment of the path."""
        return self.path.rpartition(".")[2]

    def to_dict(self) -> dict[str, Any]:
        """Plain data: kind, path, old_path, old, new and values, always all of them."""
        return {
            "kind": self.kind,
            "path": self.path,
            "old_path": self.old_path,
            "old": self.old,
            "new": self.new,
            "values": self.values.to_dict() if self.values is not None else None,
        }


@dataclass(frozen=True)
class Diff:
    """What differs between two models, states or files. False if they are the same.

    Attributes:
        old: Name of the first: a class or a file.
        new: Name of the second.
        changes: In the order of the new tree, removed things where they stood.
        notes: What could not be compared.
        tensors: How many pairs of tensors were compared value by value.
        nbytes: How many bytes of the first side that took.
        left: What else in the files holds tensors and is not the same in both, or can't be compared.
    """

    old: str
    new: str
    changes: tuple[Difference, ...]
    notes: tuple[str, ...] = ()
    tensors: int = 0
    nbytes: int = 0
    left: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.changes or self.left)

    def __len__(self) -> int:
        return len(self.changes)

    def __iter__(self) -> Iterator[Difference]:
        return iter(self.changes)

    def __str__(self) -> str:
        return self.render(color=in_colour())

    def __repr__(self) -> str:
        return str(self) or "no differences"

    def render(self, width: int | None = None, color: bool = False) -> str:
        """The differences as text, empty if there are none.

        Args:
            width: Terminal columns; by default those of the terminal, 80 where there is none. A path is never cut.
            color: With escape sequences for a terminal.
        """
        width = width or shutil.get_terminal_size((80, 24)).columns
        rows = self._rows(max(width, 40))
        if color:
            return "\n".join(f"\x1b[{_COLOURS[mark]}m{mark}{text}\x1b[0m" for mark, text in rows)
        return "\n".join(mark + text for mark, text in rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, with the same keys always."""
        return {
            "old": self.old,
            "new": self.new,
            "same": not self,
            "tensors_compared": self.tensors,
            "bytes_compared": self.nbytes,
            "counts": self.counts,
            "changes": [change.to_dict() for change in self.changes],
            "notes": list(self.notes),
            "left": list(self.left),
        }

    @property
    def counts(self) -> dict[str, int]:
        """How many changes there are of each kind that occurs."""
        kinds = [change.kind for change in self.changes]
        return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}

    def to_markdown(self) -> str:
        """A code block that GitHub colours, with ! for what changed."""
        rows = "\n".join(("!" if mark == "~" else mark) + text for mark, text in self._rows(100))
        fence = "`" * max(3, 1 + longest_run(rows, "`"))  # a name in a stranger's file must not end the block
        return f"{fence}diff\n{rows}\n{fence}"

    def to_html(self) -> str:
        """Return a whole page."""
        title = html.escape(visible(f"{self.old} -> {self.new}"))
        return f'<!doctype html>\n<meta charset="utf-8">\n<title>{title}</title>\n{self._repr_html_()}\n'

    def to_svg(self, width: int = 100) -> str:
        """Return a picture of the text, light or dark as the reader's theme."""
        styles: dict[str, Style] = {"+": "number", "-": "removed", "~": "note", "!": "note"}
        rows = self._rows(width) or [(" ", " no differences")]
        return draw_svg([[(mark + text, styles.get(mark, "plain"))] for mark, text in rows])

    def _repr_html_(self) -> str:
        colours = {"+": "#2da44e", "-": "#cf222e", "~": "#bf8700"}
        rows = [
            f'<span style="color:{colours.get(mark, "inherit")}">{html.escape(mark + text)}</span>'
            for mark, text in self._rows(100)
        ]
        return f'<pre style="line-height:1.35">{"<br>".join(rows) or "no differences"}</pre>'

    def _rows(self, width: int) -> list[tuple[str, str]]:
        """Mark and text of each row."""
        rows = laid_out(folded([_visible(_line(change)) for change in _fold_prefixes(_spanning(self.changes))]), width)
        if len(rows) > 1 and len(self.changes) > 1:
            counts = [f"{count:,} {_NAMES.get(kind, kind)}" for kind, count in self.counts.items()]
            rows += [(" ", " " + text) for text in textwrap.wrap(", ".join(counts), width - 2)]
        for note in self.notes:
            first, *rest = textwrap.wrap(visible(note), width - 2, break_long_words=False)
            rows += [("!", f" {first}"), *((" ", f" {text}") for text in rest)]
        return rows


def _spanning(changes: tuple[Difference, ...]) -> Iterator[Difference]:
    """The changes, those that all tensors of a module have alike as one."""
    spans = Counter((change.kind, change.under, change.old, change.new) for change in changes)
    for change in changes:
        if change.under is None:
            yield change
            continue
        count = spans.pop((change.kind, change.under, change.old, change.new), 0)
        if count:
            yield Difference(change.kind, change.under, change.under, change.old, f"{change.new}  ({count:,} tensors)")


def _fold_prefixes(changes: Iterable[Difference]) -> Iterator[Difference]:
    """The changes, those that moved from one prefix to another as one: `backbone.* -> *`."""
    changes = list(changes)
    groups = Counter(_prefixes(change) for change in changes if change.kind == "moved")
    for change in changes:
        count = groups[_prefixes(change)] if change.kind == "moved" else 1
        if count > 1:
            old, new = _prefixes(change)
            groups[old, new] = 0
            yield Difference("moved", f"{new}*", f"{old}*", "", f"{count:,} moved")
        elif count:
            yield change


def _prefixes(change: Difference) -> tuple[str, str]:
    """What stands before the segments that the old and the new path have in common at their end."""
    old, new = (change.old_path or "").split("."), change.path.split(".")
    while old and new and old[-1] == new[-1]:
        old.pop()
        new.pop()
    return ".".join([*old, ""]), ".".join([*new, ""])


def _line(change: Difference) -> DiffLine:
    """A change in the form in which the report of an edit prints."""
    mark = _MARKS.get(change.kind, "~")
    path, old_path = change.path or ROOT, change.old_path or ROOT
    if change.kind == "renamed":
        parent = change.path.rpartition(".")[0]
        return DiffLine(mark, ".".join(filter(None, [parent, old_path.rpartition(".")[2]])), change.new, change.name)
    if change.kind == "moved" and path != old_path:
        return DiffLine(mark, old_path, change.new, path)
    if change.values is not None:
        return DiffLine(mark, path, _measured(change.values), values=change.values)
    word = "requires_grad " if change.kind == "requires_grad" else ""
    arrow = " -> " if change.old and change.new else ""
    return DiffLine(mark, old_path if change.kind == "wrapped" else path, word + change.old + arrow + change.new)


def _visible(line: DiffLine) -> DiffLine:
    return replace(line, path=visible(line.path), text=visible(line.text), goal=visible(line.goal))


def _measured(values: Values) -> str:
    size = f"{values.max_abs:.3g} (relative {values.max_rel:.3g})"
    at = f" at {list(values.index)}" if values.index else ""
    if values.differing == 1:
        return f"1 of {values.total:,} differs{at}: {_short(values.old)} -> {_short(values.new)}, by {size}"
    if values.differing == values.total:
        return f"all {values.total:,} differ, by up to {size}"
    return f"{values.differing:,} of {values.total:,} differ, by up to {size}{at if values.is_sparse else ''}"


def _short(number: complex) -> str:
    return f"{number:.6g}" if isinstance(number, float) else str(number)
