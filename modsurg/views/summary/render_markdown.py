"""A summary as a Markdown table."""

import re
from collections.abc import Sequence

from modsurg.views.summary.columns import Column, columns
from modsurg.views.summary.fold import SummaryLine
from modsurg.views.summary.render_text import flow_text, totals_parts
from modsurg.views.summary.rows import Content
from modsurg.views.text import longest_run


def table(content: Content, lines: Sequence[SummaryLine]) -> str:
    """Header, table and totals; a name is the whole path."""
    shown = [column for column in columns(content, lines) if column.name != "bar"]
    shown[0] = Column("name", "name", [line.path for line in lines], "plain")
    title = " ".join(
        filter(None, [f"**{_safe(content.root.layer)}**" if content.root.layer else "", flow_text(content)])
    )
    about = ", ".join(map(_safe, content.about))
    rows = [
        _row([column.title or " " for column in shown]),
        _row(["---:" if column.right else "---" for column in shown]),
        *(_row([_cell(column, number) for column in shown]) for number in range(len(lines))),
    ]
    notes = [content.note] if content.note else []
    head = f"{title} ({about})" if title else about
    return "\n\n".join([head, "\n".join(rows), " ".join(totals_parts(content.totals)), *map(_safe, notes)]) + "\n"


def _cell(column: Column, number: int) -> str:
    text = column.texts[number].strip()
    return _code(text) if column.name == "name" else _safe(text)


def _code(text: str) -> str:
    """Return a text as code in a cell of a table, where a bar must be escaped even so."""
    text = text.replace("|", r"\|")
    run = longest_run(text, "`")
    return f"{'`' * (run + 1)} {text} {'`' * (run + 1)}" if run else f"`{text}`"


def _safe(text: str) -> str:
    """Escape what Markdown would read as more than text; `:` and `@`, so that an address is not a link."""
    return re.sub(r"([\\|*_<>\[\]`&~#!:@])", r"\\\1", text)


def _row(texts: Sequence[str]) -> str:
    return "| " + " | ".join(texts) + " |"
