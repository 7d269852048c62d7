"""Suggest paths when nothing matches: those that are nearest to what was asked for."""

import re
from collections import Counter
from collections.abc import Iterable
from difflib import get_close_matches
from itertools import islice
from types import UnionType

from torch import nn

from modsurg.errors import counted
from modsurg.tree.patterns import is_exact, matcher
from modsurg.tree.walk import Tree, join, last, named_parameters, split


def nearest(tree: Tree, where: object) -> str:
    """Write the message of a `NoMatchError`: what was asked for, in which model, and what is nearest."""
    root = type(tree.root).__name__
    if isinstance(where, str):
        return f'nothing {"at" if is_exact(where) else "matches"} "{where}" in {root}{_hint(tree, where)}'
    if isinstance(where, nn.Module):
        return (
            f"this {type(where).__name__} object is not in {root}; select by path or class, or pass the module itself."
        )
    if isinstance(where, type | tuple | UnionType):
        names = ", ".join(
            getattr(kind, "__name__", str(kind)) for kind in (where if isinstance(where, tuple) else (where,))
        )
        classes = Counter(type(tree.modules[paths[0]]).__name__ for paths in tree.paths.values())
        return f"no {names} in {root}. It has {', '.join(f'{name} ({n})' for name, n in classes.most_common(6))}."
    if callable(where):
        return f"the predicate holds for none of the {counted(len(tree.paths), 'module', 'modules')} of {root}."
    if not where:
        return f"the {'list' if isinstance(where, list) else 'selection'} is empty: it selects nothing in {root}."
    return f"none of the selected modules is in {root} any more; select again."


def nearest_parameters(tree: Tree, where: object) -> str:
    """Write the message of a `NoMatchError` where parameters can be selected as well."""
    if isinstance(where, nn.Parameter):
        return f"this {type(where).__name__} is not in {type(tree.root).__name__}; select it by its path."
    if not isinstance(where, str):
        return nearest(tree, where)
    parent = tree.modules.get(split(where)[0])
    if is_exact(where) and (parent is None or not parent._parameters):
        return nearest(tree, where)
    names = list(dict.fromkeys(name for name, _ in named_parameters(tree)))
    ends = {last(name): name for name in reversed(names)}
    close = get_close_matches(where, names[:2000], 3, 0.6)
    close += [ends[end] for end in get_close_matches(last(where).strip("*?"), list(ends)[:2000], 3, 0.6)]
    found = list(dict.fromkeys(close))[:3]
    hint = f" Nearest: {_quoted(found)}." if found else ""
    at = "at" if is_exact(where) else "matches"
    return f'no module and no parameter {at} "{where}" in {type(tree.root).__name__}.{hint}'


def _hint(tree: Tree, where: str) -> str:
    if where.startswith("re:"):
        return f"; it must match a whole path, such as {_quoted(islice(tree.modules, 1, 4))}."
    segments = where.split(".")
    explained = _explain_path(tree, segments)
    if explained:
        return explained
    if is_exact(where) or "[" in where:
        segments = [segment for segment in re.split(r"[./\[\]]", where) if segment]  # as in layers[0].conv, layers/0
    descended = [*_descend(tree, "", segments), *_shifted(tree, segments)]
    found = list(dict.fromkeys([*descended, *_same_end(tree, segments[-1:], close=not descended)]))[:3]
    name = "".join(segments[-1:])
    if not any(last(path) == name for path in found):
        alike = sum(type(tree.modules[paths[0]]).__name__ == name for paths in tree.paths.values())
        if alike:
            return f": {name} is the class of {counted(alike, 'module', 'modules')}; give the class, not its name."
    if not found:
        return ": print(select(model, '**')) lists its paths."
    return f". Nearest: {_quoted(found)}."


def _shifted(tree: Tree, segments: list[str]) -> list[str]:
    """Find paths that lack some of the first segments, or have others before them."""
    for start in range(len(segments) - 1):
        end = f".{'.'.join(segments[start:])}"
        found = [path for path in tree.modules if path.endswith(end) or (start and path == end[1:])]
        if found:
            return found[:3]
    return []


def _explain_path(tree: Tree, segments: list[str]) -> str | None:
    """Explain a child that is None, a tensor, or a number past the end of its container."""
    parent = tree.modules.get(".".join(segments[:-1]))
    if parent is None:
        return _explain_path(tree, segments[:-1]) if len(segments) > 1 else None
    path, name = ".".join(segments), segments[-1]
    if parent._modules.get(name, parent) is None or (name in parent.__dict__ and parent.__dict__[name] is None):
        return f': it is None. Try: add(model, "{path}", module).'
    if name in parent._parameters or name in parent._buffers:
        named = f'; name the module: "{".".join(segments[:-1])}"' if len(segments) > 1 else ""
        return f": {name} is a tensor of {type(parent).__name__}, not a module{named}."
    if isinstance(parent, nn.Sequential | nn.ModuleList) and name.lstrip("-").isdecimal():
        names = list(parent._modules)
        it = f'"{".".join(segments[:-1])}"' if len(segments) > 1 else "it"
        if len(names) < 2:
            return f": {it} has {f'one child, {names[0]}' if names else 'no children'}."
        return f": {it} has {len(names)} children, {names[0]} to {names[-1]}."
    return None


def _descend(tree: Tree, path: str, segments: list[str]) -> list[str]:
    """Find paths that follow the segments, each segment exactly or else by its closest names."""
    if not segments:
        return [path] if path else []
    names = [name for name, child in tree.modules[path]._modules.items() if child is not None]
    head, rest = segments[0], segments[1:]
    if head in names:
        candidates = [head]
    elif not is_exact(head) and head != "**":
        candidates = list(islice(filter(matcher(head), names), 3))
    else:
        candidates = get_close_matches(head.strip(), names[:2000], 3, 0.6)
        if head[:1] == "-" and head[1:].isdecimal() and 0 < int(head[1:]) <= len(names):
            candidates = [names[int(head)]]
        elif head.isdecimal() and names and names[-1].isdecimal():
            candidates = names[: -3 if len(names) > 2 else -len(names) - 1 : -1]
    found: list[str] = []
    for name in candidates:
        child = join(path, name)
        found += _descend(tree, child, rest) if child in tree.modules else []
    return found


def _same_end(tree: Tree, segments: list[str], close: bool) -> list[str]:
    """Find paths anywhere that end with this segment, or else with a name that is close to it."""
    ends: dict[str, str] = {}
    for path in tree.modules:
        ends.setdefault(last(path), path)
    ends.pop("", None)
    name = "".join(segments).strip()
    if name in ends:
        return [ends[name]]
    return [ends[name] for name in get_close_matches(name.strip("*?"), list(ends)[:2000], 3, 0.6)] if close else []


def _quoted(paths: Iterable[str]) -> str:
    return ", ".join(f'"{path}"' for path in paths)
