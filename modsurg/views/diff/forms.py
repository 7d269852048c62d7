"""What nodes look like, as numbers: equal numbers, equal subtrees."""

from collections.abc import Hashable, Iterable

from modsurg.views.diff.nodes import Node
from modsurg.views.diff.values import sketches


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

    def sample(self, roots: Iterable[Node]) -> None:
        """Look at the values below many nodes at once, before `content` is asked of each."""
        new = [root for root in roots if root not in self._content]
        nodes = {node: None for root in new for node in reversed(list(root.below())) if node not in self._content}
        samples = {node: found for node in nodes if node.leaf and (found := node.leaf.sample()) is not None}
        known = dict(zip(samples, sketches(list(samples.values())), strict=True))
        for node in nodes:
            sample = known.get(node, ())
            below = [self._content[child] for _, child in sorted(node.children.items())]
            key = (self._form[node], sample, *(number for number, _ in below))
            telling = len(set(sample)) > 1 or any(tells for _, tells in below)
            self._content[node] = (self._numbers.setdefault(key, len(self._numbers)), telling)

    def _sampled(self, node: Node) -> tuple[int, bool]:
        if node not in self._content:
            self.sample([node])
        return self._content[node]
