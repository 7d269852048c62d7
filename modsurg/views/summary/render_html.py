"""A summary as HTML that folds without a script, in the colours of the page around it."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from html import escape

from modsurg.views.summary.columns import Column, columns
from modsurg.views.summary.fold import SummaryLine, View
from modsurg.views.summary.render_text import flow_text, totals_parts
from modsurg.views.summary.rows import Content
from modsurg.views.text import cells

LIMIT = 3000
INDENT = 2


def fragment(content: Content, lines: Sequence[SummaryLine]) -> str:
    """One `div` with its own style; the first rows of a very large tree."""
    about = escape(", ".join(content.about))
    flow = escape(flow_text(content))
    drawn = _Table(content, lines)
    head = f'<div class="ms-head"><b>{escape(content.root.layer)}</b> <span>{flow}</span> <i>{about}</i></div>'
    totals = " ".join(totals_parts(content.totals))
    notes = f'<div class="ms-note">{escape(content.note)}</div>' if content.note else ""
    rest = f'<div class="ms-note">{len(lines) - LIMIT:,} more lines</div>' if len(lines) > LIMIT else ""
    return (
        f'<div class="modsurg" style="--columns: {drawn.template}"><style>{_STYLE}</style>'
        f'{head}<div class="ms-table">{drawn.heading}{drawn.tree(lines[:LIMIT])}</div>'
        f'{rest}<div class="ms-total">{escape(totals)}</div>{notes}</div>'
    )


class _Table:
    """Rows as nested `details`; what is folded or closed holds its content all the same, while there is room."""

    def __init__(self, content: Content, lines: Sequence[SummaryLine]) -> None:
        self._content = content
        self._room = LIMIT - len(lines)
        every = (
            [*lines, *(SummaryLine((row,), 0, False) for row in content.rows())]
            if content.root.children
            else list(lines)
        )
        shown = columns(content, every)
        self._names = [column.name for column in shown if column.name != "bar"]
        deepest = max((row.path.count(".") for row in content.rows()), default=0)
        widths = {column.name: column.width + (4 if column.title == "%" else 1) for column in shown}
        widths["name"] += INDENT * min(deepest, 12) + 3
        self.template = " ".join(f"{min(widths[name], 60)}ch" for name in self._names)
        titles = {column.name: column for column in shown}
        self.heading = self._row([(titles[name], titles[name].title) for name in self._names], 0, "ms-row ms-titles")

    def tree(self, lines: Iterable[SummaryLine]) -> str:
        """The lines, nested by their level."""
        shown = list(lines)
        found: list[str] = []
        levels: list[int] = []
        for line, cell_columns in zip(shown, self._cells(shown), strict=True):
            while levels and levels[-1] >= line.level:
                found.append("</details>")
                levels.pop()
            row = self._row(cell_columns, line.level)
            inner = "" if line.open else self._closed(line)
            if line.open or inner:
                found.append(f"<details{' open' if line.open else ''}><summary>{row}</summary>{inner}")
                levels.append(line.level)
            else:
                found.append(row)
        return "".join(found) + "</details>" * len(levels)

    def _closed(self, line: SummaryLine) -> str:
        below: list[SummaryLine]
        if len(line.rows) > 1:
            below = [SummaryLine((row,), line.level + 1, False) for row in line.rows]
        else:
            start = line.level + 1
            below = [replace(each, level=each.level + start) for each in View().lines(line.rows[0])]
        self._room -= len(below)
        return self.tree(below) if below and self._room >= 0 else ""

    def _cells(self, lines: Sequence[SummaryLine]) -> Iterable[list[tuple[Column | None, str]]]:
        found = {column.name: column for column in columns(self._content, lines)} if lines else {}
        for number in range(len(lines)):
            yield [(found[name], found[name].texts[number]) if name in found else (None, "") for name in self._names]

    @staticmethod
    def _row(texts: Iterable[tuple[Column | None, str]], level: int, kind: str = "ms-row") -> str:
        pieces = []
        for column, text in texts:
            classes = f"ms-{column.style}" + (" ms-right" if column.right else "") if column else ""
            style = f' style="padding-left:{INDENT * min(level, 12)}ch"' if column and column.name == "name" else ""
            if column and column.title == "%" and text not in ("%", "."):
                classes, style = classes + " ms-share", f' style="--share:{text}%"'
            full = f' title="{escape(text.strip())}"' if cells(text) > 58 else ""
            pieces.append(f'<span class="{classes}"{style}{full}>{escape(text.strip())}</span>')
        return f'<div class="{kind}">{"".join(pieces)}</div>'


_STYLE = """
.modsurg { font: 13px/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  color: inherit; overflow-x: auto; padding: .25em 0 }
.modsurg .ms-table { width: max-content; border-block: 1px solid rgba(128,128,128,.35); margin: .4em 0;
  padding: .2em 0 }
.modsurg .ms-row { display: grid; grid-template-columns: var(--columns);
  column-gap: 1ch; padding: 0 1ch; white-space: pre; border-radius: 3px }
.modsurg .ms-row > span { overflow: hidden; text-overflow: ellipsis }
.modsurg .ms-row:hover { background: rgba(128,128,128,.14) }
.modsurg summary { display: block; cursor: pointer; list-style: none }
.modsurg summary::-webkit-details-marker { display: none }
.modsurg .ms-row > span:first-child::before { content: " "; display: inline-block; width: 2ch; opacity: .65 }
.modsurg details > summary > .ms-row > span:first-child::before { content: "\\25B8" }
.modsurg details[open] > summary > .ms-row > span:first-child::before { content: "\\25BE" }
.modsurg .ms-titles, .modsurg .ms-dim, .modsurg .ms-head i { opacity: .68 }
.modsurg .ms-head i { font-style: normal; margin-left: 3ch }
.modsurg .ms-head span { margin-left: 2ch }
.modsurg .ms-right { text-align: right }
.modsurg .ms-share { opacity: .85; border-radius: 2px;
  background: linear-gradient(to right, rgba(76,132,222,.38) var(--share), transparent 0) }
.modsurg .ms-note { color: #b07d10 }
.modsurg .ms-total { font-weight: 600 }
"""
