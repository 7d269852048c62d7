"""Read the heading "Example:" as "Examples:", the only one of the two that the Google parser draws as code."""

from typing import Any

from griffe import Extension, Object


class Docstrings(Extension):
    """An extension of griffe, named in mkdocs.yml."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Rewrite the docstring of everything that is read."""
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
