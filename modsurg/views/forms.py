"""What nodes look like, as numbers: equal numbers, equal subtrees."""

from collections.abc import Hashable, Iterable

from modsurg.views.nodes import Node


class Forms:
    """Numbers the forms and the contents of the nodes of two trees.

    The form of a node is its class, its arguments, the shape of its tensor, and the names and forms of its children,
    for modules in order. Its content is the same with a sample of the values. Numbers are given out as forms are met,
    so that equal numbers mean equal forms, not equal hashes.
    """

    def __init__(self, roots: Iterable[Node]) -> None:
        self._numbers: dict[Hashable, int] = {}
        self._form: dict[Node, int] = {}
        self._content: dict[Node, tuple[int, bool]] = {}
        for root in roots:
            self._number(root)

    def form(self, node: Node) -> int:
        """Equal for nodes that look alike but for their values."""
        return self._form[node]

    def content(self, node: Node) -> int:
        """Equal for nodes that look alike and probably hold the same values."""
        return self._sampled(node)[0]

    def is_telling(self, node: Node) -> bool:
        """Whether the values under the node tell it apart: all zeros look like many others."""
        return self._sampled(node)[1]

    def _number(self, root: Node) -> None:
        for node in reversed(list(root.below())):
            shape = node.leaf.shape if node.leaf is not None else None
            below = [(name, self._form[child]) for name, child in node.children.items()]
            if not node.is_module:  # the order of keys means nothing
                below.sort()
            key = (node.kind, node.origin, tuple(node.details.items()), node.leaf is None, shape, *below)
            self._form[node] = self._numbers.setdefault(key, len(self._numbers))

    def _sampled(self, root: Node) -> tuple[int, bool]:
        if root in self._content:
            return self._content[root]
        for node in reversed(list(root.below())):
            if node in self._content:
                continue
            sample = node.leaf.sample() if node.leaf is not None else ()
            below = [self._content[child] for _, child in sorted(node.children.items())]
            key = (self._form[node], sample, *(number for number, _ in below))
            telling = len(set(sample)) > 1 or any(tells for _, tells in below)
            self._content[node] = (self._numbers.setdefault(key, len(self._numbers)), telling)
        return self._content[root]
