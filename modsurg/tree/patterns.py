"""The string forms of `where`: exact dotted names, globs over segments, regular expressions."""

import re
from collections.abc import Callable

from modsurg.errors import PatternError

_WILDCARDS = frozenset("*?[")


def is_exact(where: str) -> bool:
    """Whether the string is one dotted name, neither a glob nor a regular expression."""
    return not where.startswith("re:") and _WILDCARDS.isdisjoint(where)


def matcher(where: str) -> Callable[[str], bool]:
    r"""A test for dotted names: of modules, and of the keys of a state_dict.

    In a glob `*`, `?` and `[...]` stay inside one segment and `**` stands for any number of segments, none included.

    Args:
        where: `"layer4.0.conv1"`, `"layer?.*.bn1"`, `"**.relu"` or `"re:layer[34]\\..*"` (full match).

    Raises:
        PatternError: The glob or the regular expression does not parse; the message says where.

    Example:
        >>> matches = matcher("layer[34].**.weight")
        >>> matches("layer3.0.conv1.weight"), matches("layer1.weight")
        (True, False)
    """
    if is_exact(where):
        return where.__eq__
    if where.startswith("re:"):
        pattern = _compile(where, where[3:])
        return lambda name: pattern.fullmatch(name) is not None
    glob = _compile(where, _glob(where))
    return lambda name: glob.fullmatch(f".{name}" if name else "") is not None


def _compile(where: str, expression: str) -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except re.error as error:
        raise PatternError(
            f'"{where}" does not parse: {error}. A glob has *, ?, [...] inside a segment and ** over segments; '
            'a regular expression begins with "re:".'
        ) from None


def _glob(where: str) -> str:
    expression, previous = "", ""
    for segment in where.split("."):
        if segment == "**":
            expression += r"(?:\.[^.]++)*" if previous != "**" else ""
        else:
            expression += r"\." + _segment(where, segment)
        previous = segment
    return expression


def _segment(where: str, segment: str) -> str:
    expression, position = "", 0
    while position < len(segment):
        character = segment[position]
        if character == "[":
            end = segment.find("]", position + 2)
            if end < 0:
                raise PatternError(f'"{where}" does not parse: "[" in "{segment}" has no "]".')
            members = segment[position + 1 : end].replace("\\", r"\\").replace("^", r"\^").replace("[", r"\[")
            expression += f"[{'^.' + members[1:] if members[0] == '!' else members}]"
            position = end
        else:
            expression += {"*": "[^.]*", "?": "[^.]"}.get(character, re.escape(character))
        position += 1
    return expression
