"""Equal blocks that changed places: found once it is known which values differ."""

from collections import Counter

from modsurg.views.matching_trees import Matching
from modsurg.views.nodes import Node


def repair(matching: Matching, changed: list[Node]) -> bool:
    """Find new partners for blocks that look alike, are partners by name, and hold what another of them held.

    Args:
        matching: Changed in place.
        changed: The old tensors whose values differ from their partner's.

    Returns:
        Whether any partner changed.
    """
    candidates = _foreign(matching, changed)
    content = matching.forms.content
    places: dict[int, list[Node]] = {}
    for old in candidates:
        places.setdefault(content(matching.new_of[old]), []).append(matching.new_of[old])
    rivals = Counter(map(content, candidates))
    moves: dict[Node, Node] = {}
    for old in sorted(candidates, key=lambda node: node.path.count(".")):
        found = places.get(content(old), [])
        is_sure = len(found) == 1 and rivals[content(old)] == 1 and matching.forms.is_telling(old)
        if is_sure and not any(above in moves for above in old.upward()):
            moves[old] = found[0]
    for old, new in moves.items():
        matching.unlink(old)
        if new in matching.old_of:
            matching.unlink(matching.old_of[new])
    for old, new in moves.items():
        matching.link(old, new)
    return bool(moves)


def _foreign(matching: Matching, changed: list[Node]) -> list[Node]:
    """The old blocks most of which holds quite other values than that of their partners, which look alike."""
    weights = Counter[Node]()
    for node in changed:
        if matching.forms.content(node) != matching.forms.content(matching.new_of[node]):
            for above in node.upward():
                weights[above] += _nbytes(node)
    return [
        node
        for node, weight in weights.items()
        if node in matching.new_of
        and matching.alike(node, matching.new_of[node])
        and 2 * weight >= sum(map(_nbytes, node.below()))
    ]


def _nbytes(node: Node) -> int:
    return node.leaf.nbytes if node.leaf is not None else 0
