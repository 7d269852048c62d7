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
    forms = matching.forms
    foreign = [node for node in changed if forms.content(node) != forms.content(matching.new_of[node])]
    counts = Counter(above for node in foreign for above in node.upward())
    candidates = {
        node: matching.new_of[node]
        for node, count in counts.items()
        if node in matching.new_of and matching.alike(node, matching.new_of[node]) and 2 * count >= _tensors(node)
    }
    places: dict[int, list[Node]] = {}
    for new in candidates.values():
        places.setdefault(forms.content(new), []).append(new)
    rivals = Counter(forms.content(old) for old in candidates)
    moves: dict[Node, Node] = {}
    for old in sorted(candidates, key=lambda node: node.path.count(".")):
        found = places.get(forms.content(old), [])
        is_sure = len(found) == 1 and rivals[forms.content(old)] == 1 and forms.is_telling(old)
        if is_sure and not any(above in moves for above in old.upward()):
            moves[old] = found[0]
    for old, new in moves.items():
        matching.unlink(old)
        if new in matching.old_of:
            matching.unlink(matching.old_of[new])
    for old, new in moves.items():
        matching.link(old, new)
    return bool(moves)


def _tensors(node: Node) -> int:
    return sum(below.leaf is not None for below in node.below())
