"""Lines of styled text as a picture."""

from collections.abc import Sequence
from html import escape
from typing import Literal

from modsurg.views.text import cells

Style = Literal["plain", "title", "dim", "kind", "number", "bar", "note", "removed"]
Styled = tuple[str, Style]


def draw_svg(lines: Sequence[Sequence[Styled]]) -> str:
    """The text as an SVG that follows the reader's theme."""
    width = max((sum(cells(text) for text, _ in line) for line in lines), default=0)
    step, unit, margin = 20, 8.4, 16
    rows = []
    for number, line in enumerate(lines):
        at, pieces = 0, []
        for text, style in line:
            if text.strip():
                pieces.append(_piece(text, style, margin + at * unit, unit))
            at += cells(text)
        rows.append(f'<text y="{margin + 14 + number * step}">{"".join(pieces)}</text>')
    size_x, size_y = round(2 * margin + width * unit), 2 * margin + step * len(lines)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{size_x}" height="{size_y}" '
        f'viewBox="0 0 {size_x} {size_y}" role="img">\n<style>{_SVG_STYLE}</style>\n'
        f'<rect width="100%" height="100%" rx="8" class="page"/>\n' + "\n".join(rows) + "\n</svg>\n"
    )


def _piece(text: str, style: Style, x: float, unit: float) -> str:
    shown = text.rstrip()
    lead = len(shown) - len(shown.lstrip())
    body = shown.lstrip()
    length = f' textLength="{cells(body) * unit:.1f}" lengthAdjust="spacingAndGlyphs"'
    return f'<tspan x="{x + lead * unit:.1f}" class="{style}"{length}>{escape(body)}</tspan>'


_SVG_STYLE = """
text { font: 14px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; white-space: pre }
.page { fill: #fbfbfa } .plain { fill: #24292f } .title { fill: #24292f; font-weight: 600 } .dim { fill: #6e7781 }
.kind { fill: #0b6e8a } .number { fill: #1a7f37 } .bar { fill: #4a7fd6 } .note { fill: #9a6700 }
.removed { fill: #cf222e }
@media (prefers-color-scheme: dark) {
.page { fill: #16191d } .plain { fill: #d5dae0 } .title { fill: #f0f3f6 } .dim { fill: #8b949e }
.kind { fill: #6cc7dd } .number { fill: #7ec98f } .bar { fill: #6f9ee8 } .note { fill: #e0b252 }
.removed { fill: #ff7b72 } }
"""
