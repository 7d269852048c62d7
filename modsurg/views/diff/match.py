"""Which node of one tree is which of another: by name where it looks the same, by content where it does not."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from difflib import SequenceMatcher
from itertools import pairwise
from operator import attrgetter

from modsurg.views.diff.forms import Forms
from modsurg.views.diff.nodes import Node

Pair = tuple[Node, Node]
Group = tuple[list[Node], list[Node]]

SMALL = 40_000


class Matching:
    """Partners between the nodes of two trees; a node without one was removed or added.

    Attributes:
        old: Root of the one tree.
        new: Root of the other.
        new_of: Partner of an old node.
        old_of: Partner of a new node.
    """

    def __init__(self, old: Node, new: Node) -> None:
        self.old, self.new = old, new
        self.forms = Forms((old, new))
        self._old_forms = {self.forms.form(node) for node in old.below()}
        self._new_forms = {self.forms.form(node) for node in new.below()}
        self.new_of: dict[Node, Node] = {}
        self.old_of: dict[Node, Node] = {}
        left: list[Group] = []
        groups = self._descend(*self._looked_through(old, new))
        while groups:
            left += groups
            groups = self._settle(left, groups)

    def link(self, old: Node, new: Node) -> None:
        """Make two subtrees of one form partners, node by node, where they have none yet."""
        stack = [(old, new)]
        while stack:
            old, new = stack.pop()
            if old not in self.new_of and new not in self.old_of:
                self._link(old, new)
            stack += [(child, new.children[name]) for name, child in old.children.items()]

    def unlink(self, old: Node) -> None:
        """Take the partners from a subtree."""
        for node in old.below():
            new = self.new_of.pop(node, None)
            if new is not None:
                del self.old_of[new]

    def alike(self, old: Node, new: Node) -> bool:
        """Whether two nodes are equal in class, arguments, shapes and everything below but the values."""
        return self.forms.form(old) == self.forms.form(new)

    def _link(self, old: Node, new: Node) -> None:
        self.new_of[old] = new
        self.old_of[new] = old

    def _descend(self, old: Node, new: Node) -> list[Group]:
        """Make two nodes partners and find partners below them; returns what is left, one group for each place."""
        groups = []
        stack = [(old, new)]
        while stack:
            old, new = stack.pop()
            if self.alike(old, new):
                self.link(old, new)
                continue
            self._link(old, new)
            pairs, left = self._sequence(old, new) if _is_numbered(old) and _is_numbered(new) else self._names(old, new)
            stack += [self._looked_through(*pair) for pair in pairs]
            groups += left
        return groups

    def _looked_through(self, old: Node, new: Node) -> Pair:
        """The pair itself, or what one holds if that is the other as it was: something was wrapped or unwrapped."""
        if self.alike(old, new):
            return old, new
        if self.forms.form(old) in self._new_forms:
            return old, self._inside(new, old) or new
        if self.forms.form(new) in self._old_forms:
            return self._inside(old, new) or old, new
        return old, new

    def _inside(self, holder: Node, node: Node) -> Node | None:
        """The one node in the holder that looks like this, or the one of them that holds the same values too."""
        found = [below for below in holder.below() if self.alike(below, node)]
        if len(found) > 1:
            found = [below for below in found if self.forms.content(below) == self.forms.content(node)]
        return found[0] if len(found) == 1 else None

    def _names(self, old: Node, new: Node) -> tuple[list[Pair], list[Group]]:
        """Partners among the children of two nodes whose children have names."""
        pairs = [
            (child, twin)
            for name, child in old.children.items()
            if (twin := new.children.get(name)) is not None and self.alike(child, twin)
        ]
        olds, news = _without(old.children.values(), new.children.values(), pairs)
        known = {self.forms.form(node) for node in olds} & {self.forms.form(node) for node in news}
        moved = [node for node in olds if self.forms.form(node) in known]
        found = [node for node in news if self.forms.form(node) in known]
        self.forms.sample([*moved, *found])
        pairs += [
            (child, twin)
            for child, twin in _unique_pairs(moved, found, self.forms.content)
            if self.forms.is_telling(child)
        ]
        olds, news = _without(olds, news, pairs)
        free = {node.name: node for node in news}
        pairs += [(node, twin) for node in olds if (twin := free.get(node.name)) and _is_same_kind(node, twin)]
        olds, news = _without(olds, news, pairs)
        return pairs, [(olds, news)] if olds or news else []

    def _sequence(self, old: Node, new: Node) -> tuple[list[Pair], list[Group]]:
        """Partners among the children of two nodes that number theirs: what stands between the same neighbours."""
        olds, news = _by_number(old), _by_number(new)
        kept = [(i, i) for i, pair in enumerate(zip(olds, news, strict=False)) if self.alike(*pair)]
        if len(olds) != len(news):
            kept = []
        pairs, gaps = _split(olds, news, kept)
        self.forms.sample(node for gap in gaps for side in gap for node in side)
        keys: list[Callable[[Node], Hashable]] = [self.forms.content, self.forms.form, _kind]
        for key in keys:
            closer: list[Group] = []
            for olds, news in gaps:
                found, between = _split(olds, news, _aligned(list(map(key, olds)), list(map(key, news))))
                pairs += found
                closer += between
            gaps = closer
        return pairs, gaps

    def _settle(self, left: list[Group], groups: list[Group]) -> list[Group]:
        """Find partners for what has none among the children of its parent's partner.

        Args:
            left: All groups so far, for what moved from one place to another.
            groups: Those not yet looked at.

        Returns:
            New groups, from below the partners that were found.
        """
        self._move(left, self.forms.content, lambda old: self.forms.is_telling(old))
        for olds, news in map(self._open, groups):
            for old, new in _unique_pairs(olds, news, self.forms.form, in_order=True):
                self.link(old, new)
        named = [group for group in left if not _are_numbers(group)]
        self._move(named, lambda node: (node.name, self.forms.form(node)), lambda old: bool(old.children))
        closer = []
        for olds, news in map(self._open, groups):
            for old, new in _placed(olds, news):
                closer += self._descend(*self._looked_through(old, new))
        return closer

    def _open(self, group: Group) -> Group:
        olds, news = group
        return [node for node in olds if node not in self.new_of], [node for node in news if node not in self.old_of]

    def _move(self, left: list[Group], key: Callable[[Node], Hashable], counts: Callable[[Node], bool]) -> None:
        """Partners anywhere, the largest subtrees first, where only one comes into question."""
        olds = [node for group in left for top in group[0] for node in top.below() if node not in self.new_of]
        news = [node for group in left for top in group[1] for node in top.below() if node not in self.old_of]
        known = {self.forms.form(node) for node in olds} & {self.forms.form(node) for node in news}
        places: dict[Hashable, list[Node]] = {}
        for new in news:
            if self.forms.form(new) in known:
                places.setdefault(key(new), []).append(new)
        rivals = Counter(key(old) for old in olds if self.forms.form(old) in known)
        for old in olds:
            if old in self.new_of or self.forms.form(old) not in known or not counts(old):
                continue
            free = [new for new in places.get(key(old), ()) if new not in self.old_of]
            free = _nearest(old, free, rivals[key(old)])
            if len(free) == 1:
                self.link(old, free[0])


def _nearest(old: Node, news: list[Node], rivals: int) -> list[Node]:
    """The new nodes that an old one can be, narrowed by path and name where there are several."""
    for part in (attrgetter("path"), attrgetter("name")):
        if len(news) > 1 or rivals > 1:
            news = [new for new in news if part(new) == part(old)] or news
    return news


def _is_numbered(node: Node) -> bool:
    return bool(node.children) and all(map(str.isdecimal, node.children))


def _are_numbers(group: Group) -> bool:
    return all(node.name.isdecimal() for side in group for node in side)


def _by_number(node: Node) -> list[Node]:
    return sorted(node.children.values(), key=lambda child: int(child.name))


def _kind(node: Node) -> Hashable:
    return (node.kind, node.origin) if node.kind else (node.leaf is None, tuple(sorted(node.children)))


def _is_same_kind(old: Node, new: Node) -> bool:
    if old.children and new.children and not (old.is_module or new.is_module):
        return True  # keys that lie in them; a tensor beside those may come and go
    return (old.leaf is None, old.is_value) == (new.leaf is None, new.is_value) and (
        old.is_value or (old.kind, old.origin) == (new.kind, new.origin)
    )


def _without(olds: Iterable[Node], news: Iterable[Node], pairs: list[Pair]) -> Group:
    taken = {node for pair in pairs for node in pair}
    return [node for node in olds if node not in taken], [node for node in news if node not in taken]


def _unique_pairs(
    olds: Sequence[Node], news: Sequence[Node], key: Callable[[Node], Hashable], *, in_order: bool = False
) -> list[Pair]:
    """Nodes with a key that one on each side has; with `in_order`, as many on each side, paired in order."""
    places: dict[Hashable, Group] = {}
    for side, nodes in enumerate((olds, news)):
        for node in nodes:
            places.setdefault(key(node), ([], []))[side].append(node)
    return [
        pair
        for first, second in places.values()
        if len(first) == len(second) and (in_order or len(first) == 1)
        for pair in zip(first, second, strict=True)
    ]


def _placed(olds: list[Node], news: list[Node]) -> list[Pair]:
    """What stands where something else stood: under the same name, or in the same gap of a numbered container."""
    if _are_numbers((olds, news)):
        pairs = list(zip(olds, news, strict=False))
    else:
        names = {node.name: node for node in news}
        pairs = [(node, names[node.name]) for node in olds if node.name in names]
    return [(old, new) for old, new in pairs if (old.leaf is None) == (new.leaf is None) or _is_same_kind(old, new)]


def _split(olds: list[Node], news: list[Node], found: list[tuple[int, int]]) -> tuple[list[Pair], list[Group]]:
    """The pairs at some positions, and what stands between them."""
    edges = [(-1, -1), *found, (len(olds), len(news))]
    gaps = [(olds[i + 1 : k], news[j + 1 : m]) for (i, j), (k, m) in pairwise(edges)]
    return [(olds[i], news[j]) for i, j in found], [gap for gap in gaps if gap[0] or gap[1]]


def _aligned(olds: Sequence[Hashable], news: Sequence[Hashable]) -> list[tuple[int, int]]:
    """Positions of equal keys that keep their order: a common start and end, keys that are there once, the rest."""
    first = 0
    while first < min(len(olds), len(news)) and olds[first] == news[first]:
        first += 1
    last = 0
    while last < min(len(olds), len(news)) - first and olds[-1 - last] == news[-1 - last]:
        last += 1
    end_old, end_new = len(olds) - last, len(news) - last
    anchors = _anchors(olds[first:end_old], news[first:end_new])
    edges = [(first - 1, first - 1), *((i + first, j + first) for i, j in anchors), (end_old, end_new)]
    found = [(i, i) for i in range(first)]
    for (i, j), (k, m) in pairwise(edges):
        if i >= first:
            found.append((i, j))
        if (k - i) * (m - j) <= SMALL:
            matcher = SequenceMatcher(None, olds[i + 1 : k], news[j + 1 : m], autojunk=False)
            for block in matcher.get_matching_blocks():
                found += [(i + 1 + block.a + step, j + 1 + block.b + step) for step in range(block.size)]
    return [*found, *((end_old + step, end_new + step) for step in range(last))]


def _anchors(olds: Sequence[Hashable], news: Sequence[Hashable]) -> list[tuple[int, int]]:
    """The longest run, in order on both sides, of keys that are there exactly once on each."""
    old_counts, new_counts = Counter(olds), Counter(news)
    places = {key: j for j, key in enumerate(news) if new_counts[key] == 1}
    common = [(i, places[key]) for i, key in enumerate(olds) if old_counts[key] == 1 and key in places]
    ends: list[int] = []
    ranks: list[int] = []
    for _, j in common:
        rank = bisect_left(ends, j)
        ends[rank : rank + 1] = [j]
        ranks.append(rank)
    rank, run = len(ends) - 1, []
    for place in range(len(common) - 1, -1, -1):
        if ranks[place] == rank:
            run.append(common[place])
            rank -= 1
    return run[::-1]
