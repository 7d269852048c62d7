"""Columns: what stands in each, and which of them fit a width."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from modsurg.errors import visible
from modsurg.views.summary.fold import SummaryLine
from modsurg.views.summary.rows import Content, Shape, Totals
from modsurg.views.svg import Style
from modsurg.views.text import cut, percent, scaled, size, widest, written

GAP = 2
BAR = 12
_SHRINK = (
    *(("notes", 18), ("layer", 20), ("name", 20), ("notes", 10), ("layer", 14), ("output", 9), ("name", 10)),
    *(("notes", 0), ("output", 0), ("macs", 0), ("layer", 4), ("name", 4)),
)


@dataclass(slots=True)
class Column:
    """A column of text.

    Attributes:
        name: Its key.
        title: Its heading.
        texts: One for each line.
        style: How it is drawn.
        right: Whether it is aligned at the right.
        width: In terminal columns.
    """

    name: str
    title: str
    texts: list[str]
    style: Style
    right: bool = False
    width: int = 0

    def __post_init__(self) -> None:
        self.texts = list(map(visible, self.texts))
        self.width = widest([self.title, *self.texts])


def columns(content: Content, lines: Sequence[SummaryLine]) -> list[Column]:
    """Every column that has something in it, in order, each as wide as it needs."""
    totals = content.totals
    batch = _batch(content)
    found = [
        Column("name", "name", ["  " * line.level + line.name for line in lines], "plain"),
        Column("layer", "layer", [line.layer for line in lines], "kind"),
    ]
    if totals.macs is not None:
        found.append(Column("output", "output", [_output(line, batch) for line in lines], "plain", right=True))
    found += _numbers("params", "params", lines, totals.params, _params_text(totals))
    if totals.macs is not None:
        found += _numbers("macs", "MACs", lines, totals.macs, scaled)
        found += _numbers("activations", "memory", lines, totals.activation_bytes or 0, size)[:1]
    share = "macs" if totals.macs else "params"
    found.append(Column("bar", "", [_bar(line.total(share) or 0, getattr(totals, share)) for line in lines], "bar"))
    found.append(Column("notes", "", [", ".join(line.rows[0].notes) for line in lines], "note"))
    return [column for column in found if any(column.texts) or column.name in ("name", "layer")]


def fit(found: list[Column], width: int, bars: bool) -> list[Column]:
    """The columns that fit: the less important ones drop out, then texts are shortened.

    Args:
        found: All of them.
        width: Terminal columns.
        bars: Whether to show the bars at all.
    """
    kept = [column for column in found if bars or column.name != "bar"]
    for name in ("bar", "activations", "macs %", "params %"):
        if taken(kept) > width:
            kept = [column for column in kept if column.name != name]
    for name, least in _SHRINK:
        over = taken(kept) - width
        column = next((each for each in kept if each.name == name), None)
        if over > 0 and column is not None:
            column.width = min(column.width, max(least, column.width - over))
            if not least and column.width < widest([column.title]):
                column.width = 0
            column.texts = _cut_below(column.texts, column.width)
            column.title = cut(column.title, column.width)
            kept = [each for each in kept if each.width > 0]
    return kept


def _cut_below(texts: Sequence[str], width: int) -> list[str]:
    """The texts as wide as that; before names are cut, those deep in the tree stand less far to the right."""
    bodies = [text.lstrip(" ") for text in texts]
    most = max(width // 2, width - widest(bodies))
    indents = [min(len(text) - len(body), most) for text, body in zip(texts, bodies, strict=True)]
    return [" " * indent + cut(body, width - indent) for indent, body in zip(indents, bodies, strict=True)]


def taken(found: Sequence[Column]) -> int:
    """Width of a line."""
    return sum(column.width for column in found) + GAP * (len(found) - 1)


def _numbers(
    name: str, title: str, lines: Sequence[SummaryLine], whole: int, text: Callable[[int], str]
) -> tuple[Column, Column]:
    numbers = [line.total(name) or 0 for line in lines]
    texts = [text(number) if number else "." for number in numbers]
    shares = [percent(number, whole) for number in numbers]
    return Column(name, title, texts, "number", right=True), Column(f"{name} %", "%", shares, "dim", right=True)


def _params_text(totals: Totals) -> Callable[[int], str]:
    return scaled if totals.params >= 10**9 else "{:,}".format


def _bar(part: int, whole: int) -> str:
    eighths = round(8 * BAR * part / whole) if whole else 0
    full, rest = divmod(min(eighths, 8 * BAR), 8)
    return "█" * full + " ▏▎▍▌▋▊▉"[rest].strip()


def _batch(content: Content) -> int | None:
    """The first dimension, if it is the same in what went in and in every output: it need not be repeated."""
    given = content.root.inputs
    if not given or not given[0]:
        return None
    shapes = [shape for row in content.rows() for shape in row.outputs or ()]
    return given[0][0] if all(len(shape) > 1 and shape[0] == given[0][0] for shape in shapes) else None


def _output(line: SummaryLine, batch: int | None) -> str:
    return shapes_text(line.rows[-1].outputs, batch)


def shapes_text(shapes: Sequence[Shape] | None, batch: int | None = None) -> str:
    """The first shape, and how many others there are."""
    if not shapes:
        return ""
    first = shapes[0] if batch is None else shapes[0][1:]
    return written(first) + (f" +{len(shapes) - 1}" if len(shapes) > 1 else "")
