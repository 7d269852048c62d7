"""Docstrings as the Google parser and Markdown want them."""

import re
from typing import Any

from griffe import Extension, Object

TREE = re.compile(r"^\w.*\n(?:[│├└].*\n)+", re.MULTILINE)


class Docstrings(Extension):
    """An extension of griffe, named in mkdocs.yml."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Read the heading "Example:" as "Examples:", the only one drawn as code; fence what is drawn as a tree."""
        if obj.docstring:
            text = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
            obj.docstring.value = TREE.sub(r"```text\n\g<0>```\n", text)
