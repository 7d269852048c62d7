"""From partners to changes: what was added, removed, replaced or moved, and what differs between two partners."""

from collections.abc import Hashable, Iterator, Mapping

from modsurg.views.diff.build import Side
from modsurg.views.diff.match import Matching
from modsurg.views.diff.nodes import Leaf, Node, shape_text
from modsurg.views.diff.result import Difference, Kind
from modsurg.views.diff.spans import FACTS, Spans, fact
from modsurg.views.diff.ties import Ties
from modsurg.views.diff.values import Values

Results = Mapping[tuple[Hashable, Hashable], Values | None]


class Changes:
    """The changes between two matched trees, in the order of the new one.

    Args:
        old: One side.
        new: The other.
        matching: Partners.
        values: How the values of two tensors differ, by their identities; None if they do not.
    """

    def __init__(self, old: Side, new: Side, matching: Matching, values: Results) -> None:
        self._old, self._new = old, new
        self._new_of, self._old_of = matching.new_of, matching.old_of
        self._values = values
        self._ties = Ties(old, new, matching)
        self._spans = Spans()
        self._reported: set[tuple[Hashable, Hashable]] = set()
        self._wrappers = {
            holder: (old_node, new_node)
            for old_node, new_node in matching.new_of.items()
            if (holder := _holder(old_node, new_node, matching)) is not None
        }
        self._around = {
            above
            for holder, pair in self._wrappers.items()
            for node in pair
            for above in node.upward()
            if above is not node and len(above.path) >= len(holder.path)
        }

    def __iter__(self) -> Iterator[Difference]:
        places = {node: place for place, node in enumerate(self._new.root.below())}
        found: list[tuple[int, int, Difference]] = []
        for new, place in places.items():
            changes = self._between(self._old_of[new], new) if new in self._old_of else self._one_sided(new, "added")
            found += [(place, 1, change) for change in changes]
        last = -1
        for old in self._old.root.below():
            if old in self._new_of:
                last = places[self._new_of[old]]
            else:
                found += [(last, 2, change) for change in self._one_sided(old, "removed")]
        found.sort(key=lambda item: item[:2])
        return self._spans.marked([change for _, _, change in found])

    def _between(self, old: Node, new: Node) -> Iterator[Difference]:
        """What differs between two partners themselves."""
        together = old.parent is None is new.parent or (
            old.parent is not None and self._new_of.get(old.parent) is new.parent is not None
        )
        if together and old.name != new.name:
            yield Difference("renamed", new.path, old.path, "", new.described)
        elif not together and old.path != new.path and not self._is_wrapped(old, new):
            yield Difference("moved", new.path, old.path, "", new.described)
        if old.is_value:
            if old.details != new.details:
                yield Difference("value", new.path, old.path, old.details[""], new.details[""])
        elif old.leaf is not None and new.leaf is None:
            yield Difference("removed", old.path, old.path, old.described, "")
        elif old.leaf is None and new.leaf is not None:
            yield Difference("added", new.path, None, "", new.described)
        elif old.leaf is not None and new.leaf is not None:
            yield from self._ties.change(old, new)
            yield from self._tensor(old, new, old.leaf, new.leaf)
        elif not old.is_like(new) and self._is_first(old.identity, new.identity):
            yield Difference("replaced", new.path, old.path, *_told_apart(old, new))

    def _is_wrapped(self, old: Node, new: Node) -> bool:
        return any(self._wrappers.get(node) == (old, new) for node in (*old.upward(), *new.upward()))

    def _is_first(self, old: Hashable, new: Hashable) -> bool:
        """Whether this pair, which may stand at several paths, was not yet reported."""
        if (old, new) in self._reported:
            return False
        self._reported.add((old, new))
        return True

    def _tensor(self, old: Node, new: Node, before: Leaf, after: Leaf) -> Iterator[Difference]:
        if not self._is_first(before.identity, after.identity):
            return
        if before.shape != after.shape and not self._is_of_another_class(old):
            yield Difference("shape", new.path, old.path, shape_text(before.shape), shape_text(after.shape))
        self._spans.note(before, new)
        for kind in FACTS:
            if getattr(before, kind) != getattr(after, kind):
                was, now = fact(before, kind), fact(after, kind)
                if was and now:
                    yield Difference(kind, new.path, old.path, was, now)
        values = self._values.get((before.identity, after.identity))
        if values is not None:
            yield Difference("values", new.path, old.path, "", "", values)

    def _one_sided(self, node: Node, kind: Kind) -> Iterator[Difference]:
        """An added or removed node, unless the line of another one says it."""
        partners: Mapping[Node, Node] = self._old_of if kind == "added" else self._new_of
        if node in self._wrappers:
            inner, outer = self._wrappers[node]
            if kind == "added":
                yield Difference("wrapped", outer.path, inner.path, inner.kind, f"{node.kind}({outer.kind})")
            else:
                yield Difference("unwrapped", outer.path, inner.path, f"{node.kind}({inner.kind})", outer.described)
        elif (
            (_is_top(node, partners) or self._is_beside_wrapped(node))
            and not self._ties.covers(node, is_new=kind == "added")
            and not self._is_obvious(node, partners)
        ):
            text = node.described
            yield (
                Difference(kind, node.path, None, "", text)
                if kind == "added"
                else Difference(kind, node.path, node.path, text, "")
            )

    def _is_beside_wrapped(self, node: Node) -> bool:
        """Whether it has weights and stands in a Sequential beside what that wraps: the line of it does not say so."""
        parent = node.parent
        if parent not in self._around or node in self._around or parent.kind != "Sequential":
            return False
        return any(below.leaf is not None for below in node.below())

    def _is_of_another_class(self, old: Node) -> bool:
        """Whether the parent became one of another class, so that other tensors in it are no news."""
        parent = old.parent
        return parent is not None and parent in self._new_of and parent.kind != self._new_of[parent].kind

    def _is_obvious(self, node: Node, partners: Mapping[Node, Node]) -> bool:
        """Whether the parent became one of another class that shares nothing of the kind with it."""
        parent = node.parent
        if parent is None or parent not in partners or parent.kind == partners[parent].kind:
            return False
        return node.leaf is not None or not any(
            child in partners for child in parent.children.values() if child.leaf is None
        )


def _holder(old: Node, new: Node, matching: Matching) -> Node | None:
    """The module that now stands where `old` stood and holds it, or that stood where `new` now stands."""
    if len(new.path) > len(old.path):
        held, path, partners = new, old.path, matching.old_of
    elif len(old.path) > len(new.path):
        held, path, partners = old, new.path, matching.new_of
    else:
        return None
    if held.parent is None or held.parent in partners:
        return None
    return next((node for node in held.upward() if node.path == path and node.kind and node not in partners), None)


def _told_apart(old: Node, new: Node) -> tuple[str, str]:
    """Two modules with what differs between them."""
    if old.kind != new.kind:
        return old.described, new.described
    if old.origin != new.origin:
        return f"{old.origin}.{old.kind}", f"{new.origin}.{new.kind}"
    names = [name for name in {**old.details, **new.details} if old.details.get(name) != new.details.get(name)]
    texts = [", ".join(f"{name}={node.details[name]}" for name in names if name in node.details) for node in (old, new)]
    return f"{old.kind}({texts[0]})", f"{new.kind}({texts[1]})"


def _is_top(node: Node, partners: Mapping[Node, Node]) -> bool:
    """Whether nothing above it says already that it is there on one side only."""
    parent = node.parent
    if node.is_module:
        return parent is None or parent in partners
    if parent is None or not _is_whole(node, partners):
        return False
    return parent in partners or not (parent.is_module or _is_whole(parent, partners))


def _is_whole(node: Node, partners: Mapping[Node, Node]) -> bool:
    return not any(below in partners for below in node.below())
