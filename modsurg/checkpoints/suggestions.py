"""Which `rename=` would make two sets of keys fit, guessed from names and shapes."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches

Shapes = Mapping[str, tuple[int, ...] | None]

_LOOKED_AT = 300
_RULES = 4


def suggest_rules(unexpected: Shapes, missing: Shapes, fitting: Sequence[str] = ()) -> tuple[dict[str, str], int]:
    """Rename rules, each of which brings keys of the file to names of the model of the same shape.

    Args:
        unexpected: Keys that only the file has, and their shapes.
        missing: Names that only the model has, and their shapes.
        fitting: Keys of the file that fit already, which no rule may touch.

    Returns:
        The rules, and how many keys they bring home.

    Example:
        >>> suggest_rules({"backbone.fc.weight": (2, 3), "head.bias": (2,)}, {"fc.weight": (2, 3), "cls.bias": (2,)})
        ({'backbone.': '', 'head': 'cls'}, 2)
    """
    rules: dict[str, str] = {}
    left, wanted = dict(unexpected), dict(missing)
    while left and wanted and len(rules) < _RULES:
        best = _best_rule(left, wanted, fitting)
        if best is None:
            break
        old, new = best
        hits = _hits(old, new, left, wanted)
        rules[old] = new
        for key, name in hits.items():
            del left[key], wanted[name]
    for name in list(wanted)[:_RULES] if not rules else ():
        near = nearest_key(name, [key for key in left if left[key] == wanted[name]])
        if near is not None:
            rules[near] = name
            del left[near]
    return rules, len(unexpected) - len(left)


def nearest_key(name: str, keys: Sequence[str]) -> str | None:
    """The key most like `name`, if any is like it."""
    found = get_close_matches(name, keys[: 10 * _LOOKED_AT], 1, 0.6)
    return found[0] if found else None


def _best_rule(left: Shapes, wanted: Shapes, fitting: Sequence[str]) -> tuple[str, str] | None:
    """The rule that serves most keys; among equals, the one that changes the shortest prefix."""
    ends: dict[str, list[str]] = {}
    for name in list(wanted)[:_LOOKED_AT]:
        for end in _ends(name):
            ends.setdefault(end, []).append(name)
    counts: Counter[tuple[str, str]] = Counter()
    for key, shape in list(left.items())[:_LOOKED_AT]:
        common = next((end for end in _ends(key) if end in ends), "")
        for name in ends.get(common, ()):
            if wanted[name] == shape:
                counts[key.removesuffix(common), name.removesuffix(common)] += 1
    ranked = sorted(counts, key=lambda rule: (-counts[rule], len(rule[0]) + len(rule[1])))
    for old, new in ranked[:20]:
        rule = _clean(old, new)
        served = len(_hits(*rule, left, wanted))
        if rule[0] != rule[1] and 2 * served >= len(_below(rule[0], left)) and not _below(rule[0], fitting):
            return rule
    return None


def _ends(name: str) -> list[str]:
    """The name and its endings, longest first, cut before each segment."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _clean(old: str, new: str) -> tuple[str, str]:
    if old and new:
        return old.removesuffix("."), new.removesuffix(".")
    return old, new


def _below(old: str, left: Iterable[str]) -> list[str]:
    stem = old.removesuffix(".")
    return [key for key in left if not stem or key == stem or key.startswith(stem + ".")]


def _hits(old: str, new: str, left: Shapes, wanted: Shapes) -> dict[str, str]:
    """Key -> name, for the keys that the rule brings to a name of the same shape."""
    stem = old.removesuffix(".")
    found = {}
    for key in _below(old, left):
        rest = key[len(stem) :].removeprefix(".") if stem else key
        name = ".".join(part for part in (new.removesuffix("."), rest) if part)
        if name in wanted and wanted[name] == left[key]:
            found[key] = name
    return found
