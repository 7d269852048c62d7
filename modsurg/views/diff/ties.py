"""Tensors that stand under several names, and whether they do so on both sides."""

from collections.abc import Hashable, Iterator, Mapping

from modsurg.views.diff.build import Side
from modsurg.views.diff.match import Matching
from modsurg.views.diff.nodes import Node
from modsurg.views.diff.result import Difference

OWN = "its own tensor"


class Ties:
    """The tied tensors of two matched trees."""

    def __init__(self, old: Side, new: Side, matching: Matching) -> None:
        self._old, self._new = _Half(old, matching.new_of), _Half(new, matching.old_of)
        self._are_models = old.is_model and new.is_model

    def change(self, old: Node, new: Node) -> Iterator[Difference]:
        """What the two partners are tied to, if that is not the same."""
        was, now = self._old.tied_elsewhere(old, new), self._new.tied_elsewhere(new, old)
        if was or now:
            yield Difference("tied", new.path, old.path, was or OWN, now or OWN)

    def covers(self, node: Node, *, is_new: bool) -> bool:
        """Whether the other side, a state, lacks this only because it keeps a tied tensor under one of its names."""
        return not self._are_models and (self._new if is_new else self._old).is_there_otherwise(node)


class _Half:
    """One side: its tensors by identity, and the partners of its nodes."""

    def __init__(self, side: Side, partners: Mapping[Node, Node]) -> None:
        self._partners = partners
        self._places: dict[Hashable, list[Node]] = {}
        for node in side.root.below():
            if node.leaf is not None:
                self._places.setdefault(node.leaf.identity, []).append(node)

    def tied_elsewhere(self, node: Node, partner: Node) -> str:
        """What the node is tied to and its partner is not; "" if there is nothing."""
        assert node.leaf is not None
        assert partner.leaf is not None
        first = self._places[node.leaf.identity][0]
        twin = self._partners.get(first)
        if first is node or twin is None or (twin.leaf is not None and twin.leaf.identity == partner.leaf.identity):
            return ""
        return f"tied to {first.path}"

    def is_there_otherwise(self, node: Node) -> bool:
        leaves = [below.leaf for below in node.below() if below.leaf is not None]
        return bool(leaves) and all(
            any(place in self._partners for place in self._places[leaf.identity]) for leaf in leaves
        )
