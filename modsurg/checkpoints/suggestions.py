"""Which `rename=` would make two sets of keys fit, guessed from names and shapes."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from difflib import SequenceMatcher, get_close_matches

from modsurg.checkpoints.renaming import as_rule

Shapes = Mapping[str, tuple[int, ...] | None]

_LOOKED_AT = 300
_RULES = 8
_RULES_FOR_ALL = 16
_NUMBERS = ((re.compile(r"(?<![^.])\d+(?![^.])"), 0), (re.compile(r"\d+"), 0), (re.compile(r"\d+"), 1))
_SAME = ({"gamma", "weight"}, {"beta", "bias"})  # what other libraries call those of a norm


def suggest_rules(unexpected: Shapes, missing: Shapes, fitting: Sequence[str] = ()) -> dict[str, str]:
    r"""Rename rules, each of which brings keys of the file to names of the model of the same shape.

    Args:
        unexpected: Keys that only the file has, and their shapes.
        missing: Names that only the model has, and their shapes.
        fitting: Keys of the file that fit already, which no rule may touch.

    Returns:
        The rules; only a few where they can't bring home all of the keys.

    Example:
        >>> suggest_rules({"backbone.fc.weight": (2, 3), "head.bias": (2,)}, {"fc.weight": (2, 3), "cls.bias": (2,)})
        {'backbone.': '', 'head': 'cls'}
        >>> suggest_rules({"h.0.mlp.w": (2,), "h.1.mlp.w": (2,)}, {"h.0.ffn.w": (2,), "h.1.ffn.w": (2,)})
        {'re:h\\.(\\d+)\\.mlp\\.(.*)': 'h.\\1.ffn.\\2'}
    """
    rules: list[tuple[str, str]] = []
    left, wanted = dict(unexpected), dict(missing)
    while left and wanted and len(rules) < _RULES_FOR_ALL:
        best = _best_rule(left, wanted, fitting)
        if best is None:
            break
        hits = _hits(*best, left, wanted)
        rules.append(best)
        for key, name in hits.items():
            del left[key], wanted[name]
    for name in list(wanted)[:_RULES] if not rules else ():
        near = nearest_key(name, [key for key in left if left[key] == wanted[name]])
        if near is not None:
            rules.append((near, name))
            del left[near]
    return dict(rules[: _RULES if left else _RULES_FOR_ALL])


def nearest_key(name: str, keys: Sequence[str]) -> str | None:
    """The key most like `name`, if any is like it."""
    found = get_close_matches(name, keys[: 10 * _LOOKED_AT], 1, 0.6)
    return found[0] if found else None


def _best_rule(left: Shapes, wanted: Shapes, fitting: Sequence[str]) -> tuple[str, str] | None:
    """The rule that serves most keys; among equals, the one that keeps the order, if it does not join unlike names."""
    counts, moved = _candidates(left, wanted)
    for (old, new), count in sorted(
        counts.most_common(50), key=lambda item: (-item[1], item[0][0].startswith("re:"), moved[item[0]])
    ):
        rivals = [name for (other, name), same in counts.items() if other == old and same == count]
        if any(_likeness(old, rival) > _likeness(old, new) for rival in rivals):
            continue
        served = len(_hits(old, new, left, wanted))
        rule = as_rule(old, new)
        if 0 < sum(rule(key) is not None for key in left) <= 2 * served and not any(map(rule, fitting)):
            return old, new
    return None


def _candidates(left: Shapes, wanted: Shapes) -> tuple[Counter[tuple[str, str]], dict[tuple[str, str], int]]:
    """Rules, each with the number of keys that it serves, and by how many places it moves the first of them."""
    ends: dict[str, list[tuple[int, str]]] = {}
    leaves: dict[str, list[tuple[int, str]]] = {}
    for place, name in enumerate(list(wanted)[:_LOOKED_AT]):
        leaves.setdefault(name.rpartition(".")[0], []).append((place, name))
        for end in _ends(name):
            ends.setdefault(end, []).append((place, name))
    counts: Counter[tuple[str, str]] = Counter()
    moved: dict[tuple[str, str], int] = {}
    for at, (key, shape) in enumerate(list(left.items())[:_LOOKED_AT]):
        common = next((end for end in _ends(key) if end in ends), "")
        for place, name in ends[common] if common else leaves.get(key.rpartition(".")[0], ()):
            for rule in _rules(key, name, common) if wanted[name] == shape else ():
                counts[rule] += 1
                moved.setdefault(rule, abs(place - at))
    return counts, moved


def _rules(key: str, name: str, common: str) -> Iterator[tuple[str, str]]:
    """The rules that would bring the key to the name: one for what lies before the ending, one for all its numbers."""
    if not common:
        old, new = (each.rpartition(".")[2] for each in (key, name))
        if {old, new} in _SAME or nearest_key(new, [old]):
            yield key, name
            yield rf"re:(.*)\.{re.escape(old)}", rf"\1.{_literal(new)}"
        return
    old, new = key.removesuffix(common), name.removesuffix(common)
    yield (old.removesuffix("."), new.removesuffix(".")) if old and new else (old, new)
    patterns = {}
    for number, most in _NUMBERS:
        found = number.findall(old)[: most or None]
        if found and found == number.findall(new)[: most or None]:
            pattern = r"(\d+)".join(map(re.escape, number.split(old, most)))
            patterns[f"re:{pattern}(.*)"] = "".join(
                rf"{_literal(part)}\{place}" for place, part in enumerate(number.split(new, most), 1)
            )
    yield from patterns.items()


def _likeness(old: str, new: str) -> float:
    return SequenceMatcher(None, old, new, autojunk=False).ratio()


def _literal(text: str) -> str:
    return text.replace("\\", r"\\")


def _ends(name: str) -> list[str]:
    """The name and its endings, longest first, cut before each segment."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _hits(old: str, new: str, left: Shapes, wanted: Shapes) -> dict[str, str]:
    """Key -> name, for the keys that the rule brings to a name of the same shape."""
    rule = as_rule(old, new)
    found: dict[str, str] = {}
    for key in left:
        renamed = rule(key)
        name = renamed[0] if renamed else None
        if name is not None and name in wanted and wanted[name] == left[key]:
            found[key] = name
    return found
