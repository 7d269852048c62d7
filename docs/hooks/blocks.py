"""Show examples as a reader wants them: code that copies cleanly, what it prints below, in colour.

A ```python fence with prompts becomes a block of code for each piece that prints something, and a block of output under
it. In output, lines of a report or a diff (`+`, `-`, `~`) and the columns of a summary are coloured.
"""

import doctest
import html
import re
import textwrap
from typing import Any

FENCE = re.compile(r"^(?P<indent> *)```python\n(?P<code> *>>>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)
OUTPUT = re.compile(r'(?<=<div class="language-text output highlight">)(.*?)(?=</div>)', re.DOTALL)
CODE = re.compile(r"(?<=<code>)(.*?)(?=</code>)", re.DOTALL)
MARKS = {"+": "added", "-": "removed", "~": "changed", "!": "noted"}
HEADER = re.compile(r"^name +layer\b.*$")
CELL = re.compile(r"\S+")
ERROR = re.compile(r"\w+Error: ")


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Part each fence with prompts into code and output."""
    return FENCE.sub(lambda fence: textwrap.indent(_part(textwrap.dedent(fence["code"])), fence["indent"]), markdown)


def on_page_content(content: str, **kwargs: Any) -> str:
    """Colour the blocks of output."""
    return OUTPUT.sub(lambda block: CODE.sub(lambda code: _colour(code[1]), block[1]), content)


def _part(text: str) -> str:
    blocks, code = [], ""
    for example in doctest.DocTestParser().get_examples(text):
        code += example.source
        want = example.want.replace("Traceback (most recent call last):\n", "")
        want = re.sub(r"^modsurg\.errors\.", "", want)
        if want.strip():
            blocks += [f"```python\n{code}```", f"```{{.text .output}}\n{want}```"]
            code = ""
    if code:
        blocks.append(f"```python\n{code}```")
    return "\n\n".join(blocks)


def _colour(code: str) -> str:
    lines = [html.unescape(line) for line in re.sub(r"</?(?:span|a)\b[^>]*>", "", code).split("\n")]
    starts: list[int] = []
    coloured = []
    for line in lines:
        if HEADER.match(line):
            starts = [match.start() for match in CELL.finditer(line)]
            coloured.append(_span("header", line))
        elif starts and line.startswith("params "):
            starts = []
            coloured.append(_span("total", line))
        elif ERROR.match(line):
            coloured.append(_span("error", line))
        elif starts:
            name, layer = line[: starts[1]], line[starts[1] :]
            words = re.match(r"(.*?)( {2,}.*|)$", layer)
            assert words is not None
            coloured.append(html.escape(name) + _span("layer", words[1]) + _span("number", words[2]))
        elif line[:1] in MARKS and line[1:2] == " ":
            coloured.append(_span(MARKS[line[0]], line))
        else:
            coloured.append(html.escape(line))
    return "\n".join(coloured)


def _span(kind: str, text: str) -> str:
    return f'<span class="{kind}">{html.escape(text)}</span>' if text else ""
