"""The same change in every tensor of a module: said once, of the module."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from modsurg.views.differences import Change, Kind
from modsurg.views.nodes import Node


class Spans:
    """Which tensors were what, to tell whether all of a module's changed alike."""

    def __init__(self) -> None:
        self._nodes: dict[tuple[Kind, str], dict[str, Node]] = {}

    def note(self, kind: Kind, old: str, new: Node) -> None:
        """Note that a tensor, whatever it is now, was `old`."""
        self._nodes.setdefault((kind, old), {})[new.path] = new

    def marked(self, changes: list[Change]) -> Iterator[Change]:
        """The changes, each with the highest module below which every tensor changed like this."""
        alike: dict[tuple[Kind, str, str], list[Change]] = {}
        for change in changes:
            if (change.kind, change.old) in self._nodes:
                alike.setdefault((change.kind, change.old, change.new), []).append(change)
        found: dict[tuple[Kind, str], str] = {}
        for (kind, old, _), group in alike.items():
            nodes = self._nodes[kind, old]
            there = Counter(above for node in nodes.values() for above in node.upward())
            gone = Counter(above for change in group for above in nodes[change.path].upward())
            for change in group:
                full = [above for above in nodes[change.path].upward() if gone[above] == there[above] > 1]
                if full:
                    found[kind, change.path] = full[-1].path
        return (replace(change, under=found.get((change.kind, change.path))) for change in changes)
