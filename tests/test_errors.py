"""The tree drawn at the top of errors.py is the tree of its classes."""

import inspect
import re
from pathlib import Path

import pytest

from modsurg import errors


def classes():
    return {
        name: value
        for name, value in vars(errors).items()
        if inspect.isclass(value) and value.__module__ == errors.__name__
    }


def drawn():
    """Pairs (name, parent) in the order in which they are drawn."""
    path: list[str] = []
    pairs = []
    for line in errors.__doc__.splitlines():
        if match := re.match(r"((?:[│ ]   )*(?:[├└]── )?)(Modsurg\w+|\w+Error)\b", line):
            depth = len(match[1]) // 4
            path[depth:] = [match[2]]
            pairs.append((match[2], path[-2] if depth else None))
    return pairs


def test_the_drawing_matches_the_classes():
    assert [name for name, _ in drawn()] == list(classes())
    for name, parent in drawn():
        bases = [base.__name__ for base in classes()[name].__bases__]
        assert bases[0] == (parent or {"ModsurgError": "ValueError", "ModsurgWarning": "UserWarning"}[name])


def test_every_class_says_what_it_means():
    for name, value in classes().items():
        assert value.__doc__, name
        assert value.__doc__.endswith("."), name


def test_a_missing_path_is_also_a_lookup_error():
    with pytest.raises(LookupError, match="nothing"):
        raise errors.NoMatchError("nothing there")


def test_every_error_is_used():
    """A class that nothing raises is dead; a base is used through its children."""
    package = Path(errors.__file__).parent
    text = "".join(path.read_text() for path in package.rglob("*.py") if path.name != "errors.py")
    unused = [name for name, value in classes().items() if not value.__subclasses__() and name not in text]
    assert not unused
