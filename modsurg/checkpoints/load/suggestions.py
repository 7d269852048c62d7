"""Which `rename=` would make two sets of keys fit, guessed from names and shapes."""

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import SequenceMatcher, get_close_matches
from functools import cache
from heapq import nlargest
from operator import itemgetter

from modsurg.checkpoints.load.key_mapping import as_rule
from modsurg.checkpoints.rules import Concat, Split, TensorRule, Transpose

Shape = tuple[int, ...] | None
Shapes = Mapping[str, Shape]
Renaming = tuple[str, str]
Likeness = Callable[[str, str], float]

_LOOKED_AT = 300
_BESIDE = 5
_LIKE = 0.6
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
    rules: list[Renaming] = []
    left, wanted = dict(unexpected), dict(missing)
    likeness = cache(_likeness)
    while left and wanted and len(rules) < _RULES_FOR_ALL:
        best = _best_rule(left, wanted, fitting, likeness)
        if best is None:
            break
        hits = _hits(*best, left, wanted)
        rules.append(best)
        for key, name in hits.items():
            del left[key], wanted[name]
    if rules and (pairs := _pair_by_shape(left, wanted)):
        rules += pairs
        left.clear()
        wanted.clear()
    for name in list(wanted)[:_RULES] if not rules else ():
        near = nearest_key(name, [key for key in left if left[key] == wanted[name]])
        if near is not None:
            rules.append((near, name))
            del left[near]
    return dict(rules[: _RULES if left else _RULES_FOR_ALL])


def _pair_by_shape(left: Shapes, wanted: Shapes) -> list[Renaming]:
    """The last keys and names, if each has a shape that no other has."""
    names = {shape: name for name, shape in wanted.items() if shape}
    proven = len(names) == len(wanted) == len(left) and set(left.values()) == set(names)
    return [(key, names[shape]) for key, shape in left.items() if shape] if proven else []


def suggest_tensor_rules(
    unexpected: Shapes, missing: Shapes, misfits: Mapping[str, tuple[Shape, Shape]]
) -> list[TensorRule]:
    """Rules that shapes prove: parts that add up to a whole beside them, and matrices that are transposed.

    Args:
        unexpected: Keys that only the file has, and their shapes.
        missing: Names that only the model has, and their shapes.
        misfits: Key of the file -> its shape and the model's.

    Example:
        >>> suggest_tensor_rules({"a.0.q.w": (2, 3), "a.0.k.w": (2, 3)}, {"a.0.qk.w": (4, 3)}, {})
        [Concat(sources=('a.*.q', 'a.*.k'), target='a.*.qk', dim=0, sizes=None)]
    """
    found: dict[TensorRule, None] = {}
    for whole, parts in _find_parts(unexpected, missing):
        starred = _module if _last(whole) == _last(parts[0]) else _starred
        found[Concat(tuple(map(starred, parts)), starred(whole), sizes=_unequal(parts, unexpected))] = None
    for whole, parts in _find_parts(missing, unexpected):
        starred = _module if _last(whole) == _last(parts[0]) else _starred
        found[Split(starred(whole), tuple(map(starred, parts)), sizes=_unequal(parts, missing))] = None
    transposed = [
        _starred(key)
        for key, (theirs, ours) in misfits.items()
        if theirs and ours and len(theirs) == 2 and theirs[::-1] == ours
    ]
    return [*found, Transpose(tuple(dict.fromkeys(transposed)))] if transposed else list(found)


def _find_parts(parts: Shapes, wholes: Shapes) -> Iterator[tuple[str, list[str]]]:
    """Each whole with its parts, if they have its size along the first dimension together.

    They are all that is beside it; or query, key and value elsewhere in the layer of the same number, where nothing has
    the shape of the whole.
    """
    beside: dict[object, list[str]] = {}
    in_layer: dict[object, list[str]] = {}
    for key, shape in parts.items():
        if shape:
            beside.setdefault((*_home(key), shape[1:]), []).append(key)
            if (number := _only_number(key)) and _module_name(key)[:1] in "qkv":
                in_layer.setdefault((number, _home(key)[1], shape[1:]), []).append(key)
    shapes = {(_home(key)[1], shape) for key, shape in parts.items()}
    for whole, shape in wholes.items():
        if not shape:
            continue
        module, name = _home(whole)
        elsewhere = in_layer.get((_only_number(whole), name, shape[1:]), [])
        if (name, shape) in shapes or len({_home(key) for key in elsewhere}) > 1:
            elsewhere = []
        for found in (beside.get((module, name, shape[1:]), []), elsewhere):
            if len(found) > 1 and sum(size[0] for key in found if (size := parts[key])) == shape[0]:
                yield whole, _in_order(found, whole)
                break


def _only_number(key: str) -> str:
    """The one number in a key; empty if there is none, or several."""
    numbers = [part for part in key.split(".") if part.isdecimal()]
    return numbers[0] if len(numbers) == 1 else ""


def _in_order(parts: Sequence[str], whole: str) -> list[str]:
    """The parts in the order in which the name of the whole has them, or as query, key, value; otherwise as given."""
    words = [_module_name(part).split("_") for part in parts]
    common = set(words[0]).intersection(*words)
    stems = ["_".join(word for word in each if word not in common) or each[0] for each in words]
    for short in (stems, [stem[:1] for stem in stems]):
        for text in (_module_name(whole), "qkv"):
            places = [text.find(each) for each in short]
            if min(places) >= 0 and len(set(places)) == len(places):
                return [part for _, part in sorted(zip(places, parts, strict=True))]
    return list(parts)


def _module_name(key: str) -> str:
    return key.split(".")[-2] if "." in key else key


def _home(key: str) -> tuple[str, str]:
    """What holds the module of a tensor, and the tensor's own name; `in_proj_weight` counts as a module's weight."""
    module, _, name = key.rpartition(".")
    if name.startswith("in_proj_"):
        return module, name.removeprefix("in_proj_")
    return module.rpartition(".")[0], name


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _unequal(keys: Sequence[str], shapes: Shapes) -> tuple[int, ...] | None:
    sizes = tuple(shape[0] for key in keys if (shape := shapes[key]))
    return sizes if len(set(sizes)) > 1 else None


def _module(key: str) -> str:
    """What holds a tensor, so that the rule is for its weight and its bias, with a `*` for its first number."""
    return _starred(key.rpartition(".")[0] or key)


def _starred(key: str) -> str:
    """The key with a `*` for its number, or with a `**` from the first to the last of several."""
    parts = key.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdecimal()]
    star = ["*" if len(numbers) == 1 else "**"]
    return ".".join(parts[: numbers[0]] + star + parts[numbers[-1] + 1 :]) if numbers else key


def nearest_key(name: str, keys: Sequence[str]) -> str | None:
    """The key most like `name`, if any is like it."""
    found = get_close_matches(name, keys[: 10 * _LOOKED_AT], 1, _LIKE)
    return found[0] if found else None


def _best_rule(left: Shapes, wanted: Shapes, fitting: Sequence[str], likeness: Likeness) -> Renaming | None:
    """The rule that serves most keys; among equals, the one that keeps the order, if it does not join unlike names."""
    counts, moved = _candidates(left, wanted, likeness)
    first = nlargest(50, counts.items(), key=itemgetter(1))
    rivals: dict[tuple[str, int], list[str]] = {(old, count): [] for (old, _), count in first}
    for (old, new), count in counts.items():
        if (old, count) in rivals:
            rivals[old, count].append(new)
    for (old, new), count in sorted(first, key=lambda item: (-item[1], item[0][0].startswith("re:"), moved[item[0]])):
        if any(likeness(old, rival) > likeness(old, new) for rival in rivals[old, count]):
            continue
        served = len(_hits(old, new, left, wanted))
        rule = as_rule(old, new)
        if 0 < sum(rule(key) is not None for key in left) <= 2 * served and not any(map(rule, fitting)):
            return old, new
    return None


def _candidates(left: Shapes, wanted: Shapes, likeness: Likeness) -> tuple[dict[Renaming, int], dict[Renaming, int]]:
    """Rules, each with the number of keys that it serves, and by how many places it moves the first of them.

    Places are counted among the tensors of the same kind: of one shape and last segment.
    """
    ends: set[str] = set()
    ending: dict[tuple[str, Shape], _Ending] = {}
    leaves: dict[tuple[str, Shape], list[tuple[int, str]]] = {}
    for place, name in enumerate(list(wanted)[:_LOOKED_AT]):
        leaves.setdefault((name.rpartition(".")[0], wanted[name]), []).append((place, name))
        ends.update(_ends(name))
        for end in _ends(name):
            ending.setdefault((end, wanted[name]), _Ending(end)).add(place, name)
    counts: dict[Renaming, int] = {}
    moved: dict[Renaming, int] = {}
    olds, news = _places_of_kind(left), _places_of_kind(wanted)
    for at, (key, shape) in enumerate(list(left.items())[:_LOOKED_AT]):
        common = next((end for end in _ends(key) if end in ends), "")
        if common:
            rules = ending[common, shape].rules(key) if (common, shape) in ending else iter(())
        else:
            beside = leaves.get((key.rpartition(".")[0], shape), [])
            around = bisect_left(beside, (at, ""))
            rules = _leaf_rules(key, beside[max(around - _BESIDE, 0) : around + _BESIDE], likeness)
        for place, rule in rules:
            if rule not in moved:
                moved[rule] = abs(news[place] - olds[at])
            counts[rule] = counts.get(rule, 0) + 1
    return counts, moved


def _places_of_kind(shapes: Shapes) -> list[int]:
    """For each key, how many of the same shape and last segment come before it."""
    met: Counter[tuple[str, Shape]] = Counter()
    places = []
    for key, shape in list(shapes.items())[:_LOOKED_AT]:
        kind = key.rpartition(".")[2], shape
        places.append(met[kind])
        met[kind] += 1
    return places


def _leaf_rules(key: str, names: list[tuple[int, str]], likeness: Likeness) -> Iterator[tuple[int, Renaming]]:
    """The rules that would bring the key to names beside it, which end otherwise."""
    old = key.rpartition(".")[2]
    for place, name in names:
        new = name.rpartition(".")[2]
        if {old, new} in _SAME or likeness(old, new) >= _LIKE:
            yield place, (key, name)
            yield place, (rf"re:(.*)\.{re.escape(old)}", rf"\1.{_literal(new)}")


class _Ending:
    """Names of one shape that end alike, by what lies before that."""

    def __init__(self, end: str) -> None:
        self._end = end
        self._names: list[tuple[int, str]] = []
        self._by_numbers: dict[tuple[int, tuple[str, ...]], list[tuple[int, str]]] = {}

    def add(self, place: int, name: str) -> None:
        self._names.append((place, name.removesuffix(self._end)))

    def rules(self, key: str) -> Iterator[tuple[int, Renaming]]:
        """The rules that would bring the key to each name: one for what lies before the ending, one for its numbers."""
        old = key.removesuffix(self._end)
        if not self._by_numbers:
            self._index()
        numbered: dict[int, dict[str, str]] = {}
        for way, (number, most) in enumerate(_NUMBERS):
            found = tuple(number.findall(old)[: most or None])
            pattern = r"(\d+)".join(map(re.escape, number.split(old, most)))
            for place, text in self._by_numbers.get((way, found), ()) if found else ():
                numbered.setdefault(place, {})[f"re:{pattern}(.*)"] = text
        bare = old.removesuffix(".")
        for place, new in self._names:
            yield place, (bare, new.removesuffix(".")) if old and new else (old, new)
            for rule in numbered.get(place, {}).items():
                yield place, rule

    def _index(self) -> None:
        """Find the names by their numbers; each with the new name of a rule that keeps them."""
        for place, new in self._names:
            for way, (number, most) in enumerate(_NUMBERS):
                found = tuple(number.findall(new)[: most or None])
                text = "".join(rf"{_literal(part)}\{at}" for at, part in enumerate(number.split(new, most), 1))
                self._by_numbers.setdefault((way, found), []).append((place, text))


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
