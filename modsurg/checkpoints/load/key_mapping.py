"""Which key of a state means which key of a model: `rename=`, `only=`, and the prefixes that wrappers leave."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import nn

from modsurg.errors import LoadError, PatternError
from modsurg.tree.patterns import matcher

Rename = Mapping[str, str | None] | Callable[[str], str | None] | None
Rule = Callable[[str], tuple[str | None] | None]
Only = str | Iterable[str] | Callable[[str], bool] | None

_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def renamer(rename: Rename, keys: Iterable[str]) -> Callable[[str], str | None]:
    r"""A function from a state's key to the model's; None leaves the key out.

    Args:
        rename: A function; or rules, the longest that matches wins: `{"old": "new"}` for a key or everything below it,
            `{"": "backbone."}` to add a prefix, `{r"re:blocks\.(\d+)\.(.*)": r"layer\1.\2"}` for a whole key, None as
            the new name to leave out. A rule that matches no key as it is sees them without `module.` and `_orig_mod.`.
        keys: The state's keys: a rule that matches none of them is an error.

    Raises:
        LoadError: A rule that matches no key.
        PatternError: A regular expression that does not parse.

    Example:
        >>> new = renamer({"backbone.": "", "head": "fc"}, ["backbone.conv.weight", "head.bias", "head2.bias"])
        >>> new("backbone.conv.weight"), new("head.bias"), new("head2.bias")
        ('conv.weight', 'fc.bias', 'head2.bias')
    """
    if rename is None:
        return lambda key: key
    if callable(rename):
        return _checked(rename)
    if not isinstance(rename, Mapping) or not all(
        isinstance(text, str | None) for pair in rename.items() for text in pair
    ):
        raise LoadError(f'rename={rename!r:.80} must be a dict such as {{"old": "new", "head": None}}, or a function')
    keys = list(keys)
    rules = [_fitting(old, rename[old], keys) for old in sorted(rename, key=len, reverse=True)]

    def new_name(key: str) -> str | None:
        for rule in rules:
            found = rule(key)
            if found:
                return found[0]
        return key

    return new_name


def chooser(only: Only) -> Callable[[str], bool]:
    """A test for keys: a name, glob or `re:` for a key or for anything that holds it.

    Raises:
        LoadError: Something of another type.
        PatternError: A regular expression that does not parse.

    Example:
        >>> chosen = chooser(["layer4", "fc.*"])
        >>> chosen("layer4.0.conv1.weight"), chosen("fc.bias"), chosen("layer40.weight")
        (True, True, False)
    """
    if only is None:
        return lambda key: True
    if callable(only) and not isinstance(only, type | nn.Module):
        return only
    given: list[object] = [only]
    if isinstance(only, Iterable) and not isinstance(only, str | nn.Module):
        given = list(only)
    names = [name for name in given if isinstance(name, str)]
    if len(names) < len(given):
        raise LoadError(
            f"{only!r:.80} chooses no keys: give a name, a glob or 're:...', several of them, or a function"
        )
    tests = [matcher(name) for name in names]
    return lambda key: any(test(part) for part in _with_parents(key) for test in tests)


def unwrapped(key: str) -> str:
    """The key without the segments that DataParallel, DDP, FSDP, torch.compile and checkpointing wrappers put in.

    Example:
        >>> unwrapped("module._orig_mod.layer1._orig_mod.weight")
        'layer1.weight'
    """
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def pair(keys: Iterable[str], names: Iterable[str]) -> dict[str, str]:
    """Key -> name, for each key that is a name of the model, exactly or but for wrappers on either side.

    Raises:
        LoadError: Two keys that differ only by wrappers mean the same name.
    """
    known = set(names)
    keys = list(keys)
    pairs = {key: key for key in keys if key in known}
    if len(pairs) == len(keys):
        return pairs
    plain: dict[str, str | None] = {}
    for name in names:
        bare = unwrapped(name)
        plain[bare] = None if bare in plain else name
    taken = {name: key for key, name in pairs.items()}
    for key in keys:
        short = plain.get(unwrapped(key)) if key not in pairs else None
        if short is None:
            continue
        if short in taken:
            raise LoadError(
                f"{taken[short]!r} and {key!r} both mean {short!r}; nothing was loaded. "
                f"Leave one out: load_state(..., rename={{{key!r}: None}})"
            )
        pairs[key] = short
        taken[short] = key
    return pairs


def _checked(rename: Callable[[str], str | None]) -> Callable[[str], str | None]:
    def new_name(key: str) -> str | None:
        name = rename(key)
        if name is not None and not isinstance(name, str):
            raise LoadError(
                f"rename gives {key!r} the name {name!r}, which is not a string; nothing was loaded. "
                "None leaves a key out"
            )
        return name

    return new_name


def _fitting(old: str, new: str | None, keys: Sequence[str]) -> Rule:
    """The rule for the keys as they are, or, where it matches none, for the keys without what wrappers put in."""
    rule = as_rule(old, new)

    def within(key: str) -> tuple[str | None] | None:
        bare = unwrapped(key)
        before = key.removesuffix(bare) if key.endswith(bare) else ""
        found = rule(bare)
        return found and (None if found[0] is None else before + found[0],)

    for each in (rule, within):
        if any(map(each, keys)):
            return each
    raise LoadError(f"rename: {old!r} matches no key; nothing was loaded. The keys are like {', '.join(keys[:3])}")


def as_rule(old: str, new: str | None) -> Rule:
    """A function that gives the new name in a tuple, or None where the rule does not match."""
    if old.startswith("re:"):
        try:
            pattern = re.compile(old[3:])
            pattern.sub(new or "", "")
        except (re.error, IndexError) as error:
            raise PatternError(f"rename: {old!r}: {new!r} does not parse: {error}") from None

        def by_pattern(key: str) -> tuple[str | None] | None:
            match = pattern.fullmatch(key)
            return match and (match.expand(new) if new is not None else None,)

        return by_pattern
    stem = old.removesuffix(".")

    def by_prefix(key: str) -> tuple[str | None] | None:
        if stem and key != stem and not key.startswith(stem + "."):
            return None
        rest = key[len(stem) :].removeprefix(".") if stem else key
        return (None if new is None else ".".join(part for part in (new.removesuffix("."), rest) if part),)

    return by_prefix


def _with_parents(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
