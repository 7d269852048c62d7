"""The same change in every tensor of a module: said once, of the module."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from modsurg.views.diff.nodes import Leaf, Node
from modsurg.views.diff.result import Difference, Kind

FACTS: tuple[Kind, ...] = ("dtype", "role", "requires_grad")


def fact(leaf: Leaf, kind: Kind) -> str:
    """One of the `FACTS` of a tensor as text, "" where it is not known."""
    value = getattr(leaf, kind)
    return "" if value is None else str(value).removeprefix("torch.")


class Spans:
    """What the tensors were, to tell whether all of a module's changed alike."""

    def __init__(self) -> None:
        self._pairs: list[tuple[Leaf, Node]] = []

    def note(self, old: Leaf, new: Node) -> None:
        """Note what a tensor was, whatever it is now."""
        self._pairs.append((old, new))

    def marked(self, changes: list[Difference]) -> Iterator[Difference]:
        """The changes, each with the highest module below which every tensor changed like this."""
        alike: dict[tuple[Kind, str, str], set[str]] = {}
        for change in changes:
            if change.kind in FACTS:
                alike.setdefault((change.kind, change.old, change.new), set()).add(change.path)
        found: dict[tuple[Kind, str], str] = {}
        for (kind, was, _), paths in alike.items():
            nodes = [node for old, node in self._pairs if fact(old, kind) == was]
            there = Counter(above for node in nodes for above in node.upward())
            gone = Counter(above for node in nodes if node.path in paths for above in node.upward())
            for node in nodes:
                full = [above for above in node.upward() if gone[above] == there[above] > 1]
                if full:
                    found[kind, node.path] = full[-1].path
        return (replace(change, under=found.get((change.kind, change.path))) for change in changes)
