"""A summary as lines of styled text, and these as plain text, in colour, or as a picture."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from modsurg.views.summary.columns import GAP, Column, columns, fit, shapes_text, taken
from modsurg.views.summary.fold import SummaryLine
from modsurg.views.summary.rows import Content, Totals
from modsurg.views.svg import Style, Styled
from modsurg.views.text import cells, padded, size, wrapped

_CODES: dict[Style, str] = {"title": "1", "dim": "2", "kind": "36", "number": "32", "bar": "34", "note": "33"}


@dataclass(frozen=True, slots=True)
class Medium:
    """Where a summary is printed.

    Attributes:
        width: Terminal columns, never exceeded.
        bars: Whether shares are drawn.
    """

    width: int = 80
    bars: bool = False


def styled(content: Content, lines: Sequence[SummaryLine], medium: Medium) -> list[list[Styled]]:
    """Header, table, totals and notes, each line as pieces of text with a style."""
    table = fit(columns(content, lines), medium.width, medium.bars) if lines else []
    used = max(taken(table) if table else 0, min(60, medium.width))
    found = list(header(content, used, medium.width))
    if table:
        titles, *rows = zip(*(_padded(column, column is table[-1]) for column in table), strict=True)
        found.append([(text, "dim") for text in titles])
        styles = [column.style for column in table]
        found += [list(zip(row, styles, strict=True)) for row in rows]
    found += [[(text, "title")] for text in _filled(totals_parts(content.totals), medium.width)]
    if content.note:
        found += [[(text, "note")] for text in wrapped(content.note, medium.width)]
    return found


def plain(lines: Iterable[Sequence[Styled]]) -> str:
    """The text alone."""
    return "\n".join("".join(text for text, _ in line).rstrip() for line in lines)


def coloured(lines: Iterable[Sequence[Styled]]) -> str:
    """The text with the escape sequences of a terminal."""
    return "\n".join("".join(_paint(text, style) for text, style in line).rstrip() for line in lines)


def _paint(text: str, style: Style) -> str:
    code = _CODES.get(style)
    if code is None or not text.strip():
        return text
    body = text.strip()
    before, after = text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :]
    return f"{before}\x1b[{code}m{body}\x1b[0m{after}"


def header(content: Content, used: int, width: int) -> Iterable[list[Styled]]:
    """Class, shapes and whereabouts, on one line or on two."""
    root = content.root
    title, flow = root.layer, flow_text(content)
    about = ", ".join(content.about)
    left = f"{title}   {flow}".strip() if title else flow
    if cells(left) + GAP + cells(about) <= width:
        space = max(used, cells(left) + GAP + cells(about)) - cells(left) - cells(about)
        gap = " " * space if left else ""
        yield [(title, "title"), (left[len(title) :] + gap, "plain"), (about, "dim")]
        return
    for text in wrapped(left, width):
        yield [(text, "title")]
    for text in wrapped(about, width):
        yield [(text, "dim")]


def flow_text(content: Content) -> str:
    """`1x3x32x32 -> 1x10`."""
    root = content.root
    if root.inputs is None:
        return ""
    given = ", ".join(shapes_text([shape]) for shape in root.inputs[:3]) + (", ..." if len(root.inputs) > 3 else "")
    return f"{given} -> {shapes_text(root.outputs) or '?'}".lstrip()


def totals_parts(totals: Totals) -> list[str]:
    """The last line in pieces: everything in units that people use."""
    parts = [
        f"params {totals.params:,} ({totals.frozen_params:,} frozen, {totals.shared_params:,} shared), "
        f"{size(totals.param_bytes)}",
        f"buffers {totals.buffers:,}" + (f", {size(totals.buffer_bytes)}" if totals.buffers else ""),
    ]
    if totals.macs is not None:
        parts.append(_macs_text(totals.macs))
    if totals.activation_bytes:
        parts.append(f"outputs {size(totals.activation_bytes)}")
    return [part + ";" for part in parts[:-1]] + parts[-1:]


def _filled(parts: Sequence[str], width: int) -> list[str]:
    """Lines of at most `width`, broken between the parts where that is possible."""
    lines: list[str] = []
    for part in parts:
        if lines and cells(f"{lines[-1]} {part}") <= width:
            lines[-1] += f" {part}"
        else:
            lines += wrapped(part, width)
    return lines


def _macs_text(macs: int) -> str:
    if macs < 1_000_000:
        return f"{macs:,} MACs"
    for unit, power in (("M", 6), ("G", 9), ("T", 12), ("P", 15)):
        if macs < 999.995 * 10**power or unit == "P":
            break
    return f"{macs / 10**power:.2f} {unit}MACs"


def _padded(column: Column, last: bool) -> list[str]:
    """The title and every text, as wide as the column and the gap behind it."""
    gap = "" if last else " " * GAP
    return [text + gap for text in padded([column.title, *column.texts], column.width, column.right)]
