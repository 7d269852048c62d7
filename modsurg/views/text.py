"""Numbers, sizes and shapes as people write them, and how a text stands in a terminal: how wide, in which colours."""

import os
import re
import sys
import textwrap
import unicodedata
from collections.abc import Sequence


def at_terminal() -> bool:
    """Whether what is printed is seen at a terminal that can draw."""
    return sys.stdout is not None and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def in_colour() -> bool:
    """Whether it is to be in colour as well: nobody has set NO_COLOR to anything (no-color.org)."""
    return at_terminal() and not os.environ.get("NO_COLOR")


def scaled(number: int) -> str:
    """A count with three digits that matter.

    Example:
        >>> [scaled(n) for n in (0, 999, 2_457_600, 14_630_805_110_784)]
        ['0', '999', '2.46M', '14.6T']
    """
    value = float(number)
    for unit in ("", "k", "M", "G", "T", "P"):
        if abs(value) < 999.5 or unit == "P":
            break
        value /= 1000
    if not unit:
        return str(number)
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f}{unit}"


def size(nbytes: int) -> str:
    """Bytes in units of 1024.

    Example:
        >>> [size(n) for n in (12, 582_312, 44_629_909)]
        ['12 B', '569 KiB', '42.6 MiB']
    """
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 999.5 or unit == "TiB":
            break
        value /= 1024
    digits = 0 if unit == "B" or value >= 99.95 else 1
    return f"{value:.{digits}f} {unit}"


def percent(part: int, whole: int) -> str:
    """A share with one decimal; a point where there is none.

    Example:
        >>> percent(1, 8), percent(1, 100_000), percent(0, 8)
        ('12.5', '0.0', '.')
    """
    return f"{100 * part / whole:.1f}" if part and whole else "."


def written(shape: Sequence[int]) -> str:
    """A shape such as `3x224x224`; a number is `scalar`, a size that varies `?`.

    Example:
        >>> written((3, 224, 224)), written(()), written((2, -1, 8))
        ('3x224x224', 'scalar', '2x?x8')
    """
    return "x".join("?" if size < 0 else str(size) for size in shape) or "scalar"


def longest_run(text: str, character: str) -> int:
    """Length of the longest run of a character.

    Example:
        >>> longest_run("a``b`", "`")
        2
    """
    return max(map(len, re.findall(f"{re.escape(character)}+", text)), default=0)


def cells(text: str) -> int:
    """Columns that a text takes in a terminal: wide characters two, combining ones none.

    Example:
        >>> cells("conv1"), cells("卷积层")
        (5, 6)
    """
    if text.isascii():
        return len(text)
    return sum(_cell(character) for character in text)


def _cell(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) in ("Cf", "Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def cut(text: str, width: int) -> str:
    """The text, shortened with an ellipsis where it is wider than `width`.

    Example:
        >>> cut("Conv2d 3->64 k7", 10), cut("卷积层", 4)
        ('Conv2d 3-…', '卷…')
    """
    if cells(text) <= width:
        return text
    return _head(text, width - 1) + "…" if width > 0 else ""


def _head(text: str, width: int) -> str:
    """As much from the start of the text as fits."""
    used = 0
    for index, character in enumerate(text):
        used += _cell(character)
        if used > width:
            return text[:index]
    return text


def widest(texts: Sequence[str]) -> int:
    """Columns that the widest of several texts takes."""
    return max(map(len if all(map(str.isascii, texts)) else cells, texts), default=0)


def padded(texts: Sequence[str], width: int, right: bool = False) -> list[str]:
    """Each text with spaces up to `width` columns, before it if it stands at the right."""
    fill = str.rjust if right else str.ljust
    if all(map(str.isascii, texts)):
        return [fill(text, width) for text in texts]
    return [fill(text, width + len(text) - cells(text)) for text in texts]


def wrapped(text: str, width: int) -> list[str]:
    """A paragraph in lines of at most `width` columns; a line after the first is indented."""
    lines = []
    for line in textwrap.wrap(text, width, subsequent_indent="  ", break_on_hyphens=False):
        while cells(line) > width:
            kept = _head(line, width)
            lines.append(kept)
            line = "  " + line[len(kept) :]
        lines.append(line)
    return lines
