"""Blocks that look alike and changed places: found once it is known which values differ."""

from collections import Counter

from modsurg.views.diff.match import Matching
from modsurg.views.diff.nodes import Node


def repair(matching: Matching, changed: list[Node]) -> bool:
    """Find new partners for blocks whose partner, by name or place, holds other values, if elsewhere are theirs.

    Args:
        matching: Changed in place.
        changed: The old tensors whose values differ from their partner's.

    Returns:
        Whether any partner changed.
    """
    foreign = _foreign(matching, changed)
    olds = foreign + [node for node in matching.old.below() if node not in matching.new_of]
    news = [matching.new_of[node] for node in foreign]
    news += [node for node in matching.new.below() if node not in matching.old_of]
    content = matching.forms.content
    matching.forms.sample([*olds, *news])
    places: dict[int, list[Node]] = {}
    for new in news:
        places.setdefault(content(new), []).append(new)
    rivals = Counter(map(content, olds))
    moves: dict[Node, Node] = {}
    taken: set[Node] = set()
    for old in sorted(olds, key=lambda node: node.path.count(".")):
        found = places.get(content(old), [])
        is_sure = len(found) == 1 and rivals[content(old)] == 1 and matching.forms.is_telling(old)
        if is_sure and taken.isdisjoint((*old.upward(), *found[0].upward())):
            moves[old] = found[0]
            taken |= {old, found[0]}
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
    matching.forms.sample([*changed, *(matching.new_of[node] for node in changed)])
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
