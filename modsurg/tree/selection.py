"""Selection: which modules a `where` means, resolved before anything changes."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import UnionType
from typing import Any, TypeAlias

from torch import nn

from modsurg.errors import CountError, NoMatchError, WhereError, counted
from modsurg.tree.patterns import is_exact, matcher
from modsurg.tree.suggestions import nearest, nearest_parameters
from modsurg.tree.walk import Tree, join, named_parameters, split, walk
from modsurg.tree.wrappers import unwrap


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """One module object and all its paths.

    Attributes:
        module: The module itself.
        paths: All its paths, the first in module order first: a tied module has several.
        matched: Those of the paths that are selected.
    """

    module: nn.Module
    paths: tuple[str, ...]
    matched: tuple[str, ...]

    @property
    def path(self) -> str:
        """The first path that is selected."""
        return self.matched[0]

    def __repr__(self) -> str:
        others = [path for path in self.paths if path not in self.matched]
        tied = f" (also {', '.join(map(repr, others))})" if others else ""
        return f"<{type(self.module).__name__} at {', '.join(map(repr, self.matched))}{tied}>"


class Selection:
    """Selected paths, grouped by module: a value that `&`, `|` and `-` combine path by path, and that every verb takes.

    The other side of an operator may be anything that `select` takes, and may match nothing.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Sequential(nn.Linear(2, 2)))
        >>> select(model, nn.Linear).paths
        ('0', '2.0')
        >>> (select(model, nn.Linear) - "2.**").paths
        ('0',)
        >>> len(select(model, nn.Linear) | nn.ReLU)
        3
    """

    def __init__(self, model: nn.Module, sites: tuple[Site, ...]) -> None:
        self.model = model
        self.sites = sites

    @property
    def paths(self) -> tuple[str, ...]:
        """The first selected path of each site."""
        return tuple(site.path for site in self.sites)

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The module of each site."""
        return tuple(site.module for site in self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __contains__(self, item: object) -> bool:
        return any(item is site.module or item in site.matched for site in self.sites)

    def __and__(self, other: "Where") -> "Selection":
        theirs = self._paths_of(other)
        return self._keep(lambda path: path in theirs)

    def __sub__(self, other: "Where") -> "Selection":
        theirs = self._paths_of(other)
        return self._keep(lambda path: path not in theirs)

    def __or__(self, other: "Where") -> "Selection":
        self._check_model(other)
        tree = walk(self.model)
        matched = _match(tree, self)
        _merge(matched, _match(tree, other, required=False))
        return _selection(tree, matched)

    def __repr__(self) -> str:
        lines = [f"Selection of {len(self)} in {type(self.model).__name__}"]
        lines += [f"  {' = '.join(site.paths)}  {type(site.module).__name__}" for site in self.sites[:20]]
        if len(self) > 20:
            lines.append(f"  ... {len(self) - 20} more")
        return "\n".join(lines)

    def _keep(self, test: Callable[[str], bool]) -> "Selection":
        kept = ((site, tuple(filter(test, site.matched))) for site in self)
        return Selection(self.model, tuple(Site(site.module, site.paths, paths) for site, paths in kept if paths))

    def _paths_of(self, other: "Where") -> set[str]:
        self._check_model(other)
        matched = _match(walk(self.model), other, required=False)
        return {path for paths in matched.values() for path in paths}

    def _check_model(self, other: "Where") -> None:
        if isinstance(other, Selection) and other.model is not self.model:
            raise WhereError("these selections are of two different models; select both in the same one.")


Where: TypeAlias = (
    str
    | type[nn.Module]
    | tuple[type[nn.Module], ...]
    | UnionType
    | Callable[[str, nn.Module], bool]
    | nn.Module
    | Selection
    | list[Any]
)


def select(model: nn.Module, where: Where, *, count: int | None = None) -> Selection:
    r"""Find modules; nothing is changed.

    Args:
        model: A torch.compile wrapper is unwrapped.
        where: `"layer4.0.conv1"` (exact; a negative number counts from the end of a Sequential or ModuleList),
            `"layer?.*.bn1"` or `"**.relu"` (glob), `"re:layer[34]\\..*"` (regular expression, full match),
            a module class, a tuple or a union of them (isinstance), `lambda path, module: ...`, a module object of
            the model, a `Selection`, or a list of any of these: all of them, in that order; each must match.
        count: Expected number of matches. With `count=0`, nothing may match.

    Returns:
        The sites in module order; of a list, in its order. A module with several paths is one site with all of them.

    Raises:
        NoMatchError: Nothing matches; the message names the nearest paths.
        CountError: Another number of matches than `count`.
        PatternError: A glob or regular expression does not parse.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
        >>> select(model, nn.Linear).paths
        ('0', '2')
        >>> select(model, "-1").paths
        ('2',)
        >>> select(model, "7")
        Traceback (most recent call last):
        modsurg.errors.NoMatchError: nothing at "7" in Sequential: it has 3 children, 0 to 2.
    """
    return resolve(walk(unwrap(model)), where, count, ordered=isinstance(where, list | Selection))


def resolve(tree: Tree, where: Where, count: int | None = None, *, ordered: bool = False) -> Selection:
    """Resolve `where` in a tree that was walked already; see `select`.

    An edit takes the sites in module order, outer ones first; `ordered` keeps the order of a list.
    """
    matched = _match(tree, where, required=count != 0)
    if not matched and count != 0:
        raise NoMatchError(nearest(tree, where))
    _check_count(tree, count, [paths[0] for paths in matched.values()])
    return _selection(tree, matched, ordered)


def select_parameters(model: nn.Module, where: Where, *, count: int | None = None) -> dict[str, nn.Parameter]:
    """Find parameters; nothing is changed.

    Args:
        model: A torch.compile wrapper is unwrapped.
        where: A parameter's own path, `"layer4.0.conv1.bias"` or `"class_token"`; a pattern over such paths,
            `"**.bias"`; a parameter object; or anything that `select` takes, which means all parameters inside.
        count: Expected number of matches: modules, and parameters named themselves.

    Returns:
        Each parameter once, by the first of its names that matches.

    Raises:
        NoMatchError: Nothing matches; the message names the nearest paths.
        CountError: Another number of matches.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
        >>> list(select_parameters(model, "**.bias"))
        ['0.bias', '2.bias']
        >>> list(select_parameters(model, ["2", "0.weight"]))
        ['2.weight', '2.bias', '0.weight']
    """
    tree = walk(unwrap(model))
    names: dict[nn.Parameter, str] = {}
    for form in where if isinstance(where, list) else [where]:
        selection, named = resolve_parameters(tree, form, 0 if count == 0 else None)
        for site in selection:
            named |= {join(site.path, name): each for name, each in site.module.named_parameters()}
        found = {parameter: name for name, parameter in named.items() if parameter not in names}
        names |= {each: found[each] for each in tree.root.parameters() if each in found}
    _check_count(tree, count, list(names.values()))
    return {name: parameter for parameter, name in names.items()}


def resolve_parameters(
    tree: Tree, where: Where | nn.Parameter, count: int | None = None, *, modules_first: bool = False
) -> tuple[Selection, dict[str, nn.Parameter]]:
    """Resolve a `where` that may name modules, parameters or both, such as `"**"` or a list.

    Args:
        tree: Where to look.
        where: What to find.
        count: How many matches there must be.
        modules_first: Whether a form that matches modules names no parameters.

    Returns:
        The modules, and the parameters that are named themselves, without those inside the modules.
    """
    modules: dict[int, list[str]] = {}
    named: dict[str, nn.Parameter] = {}
    for form in where if isinstance(where, list) else [where]:
        found = {} if isinstance(form, nn.Parameter) else _match(tree, form, required=False)
        own = {} if found and modules_first else _match_parameters(tree, form)
        if not found and not own and count != 0:
            raise NoMatchError(nearest_parameters(tree, form))
        _merge(modules, found)
        named |= own
    selection = _selection(tree, modules)
    inside = {id(parameter) for module in selection.modules for parameter in module.parameters()}
    named = {name: parameter for name, parameter in named.items() if id(parameter) not in inside}
    _check_count(tree, count, [*selection.paths, *named])
    return selection, named


def _match_parameters(tree: Tree, where: object) -> dict[str, nn.Parameter]:
    """Find parameters by their own names, each once."""
    if isinstance(where, nn.Parameter):
        found = [(name, parameter) for name, parameter in named_parameters(tree) if parameter is where]
    elif not isinstance(where, str):
        return {}
    elif is_exact(where):
        path, name = split(where)
        parent = exact_path(tree, path)
        parameter = None if parent is None else tree.modules[parent]._parameters.get(name)
        found = [] if parent is None or parameter is None else [(join(parent, name), parameter)]
    else:
        test = matcher(where)
        found = [(name, parameter) for name, parameter in named_parameters(tree) if test(name)]
    names = {parameter: name for name, parameter in reversed(found)}
    return {name: parameter for name, parameter in found if names[parameter] == name}


def _check_count(tree: Tree, count: int | None, paths: list[str]) -> None:
    if count is not None and len(paths) != count:
        found = ", ".join(f'"{path}"' for path in paths[:5])
        more = ", ..." if len(paths) > 5 else ""
        number = counted(len(paths), "site matches", "sites match")
        raise CountError(f"count={count!r}, but {number} in {type(tree.root).__name__}: {found}{more}.")


def _selection(tree: Tree, matched: dict[int, list[str]], ordered: bool = False) -> Selection:
    keys = list(matched)
    if not ordered and len(keys) > 1:
        keys = [key for key in tree.paths if key in matched]
    sites = (Site(tree.modules[tree.paths[key][0]], tuple(tree.paths[key]), tuple(matched[key])) for key in keys)
    return Selection(tree.root, tuple(sites))


def _match(tree: Tree, where: Where, required: bool = True) -> dict[int, list[str]]:
    """Find the matched paths of each module by `id(module)`; in a list, each form must match if `required`."""
    if isinstance(where, str):
        return _match_name(tree, where)
    if isinstance(where, list):
        together: dict[int, list[str]] = {}
        for form in where:
            found = _match(tree, form, required)
            if not found and required:
                raise NoMatchError(nearest(tree, form))
            _merge(together, found)
        return together
    if isinstance(where, Selection):
        return _match_selection(tree, where)
    if isinstance(where, nn.Module):
        paths = tree.paths.get(id(unwrap(where)))
        return {id(unwrap(where)): paths} if paths else {}
    if isinstance(where, type | tuple | UnionType):
        _check_classes(where)
        return {key: paths for key, paths in tree.paths.items() if isinstance(tree.modules[paths[0]], where)}
    if callable(where):
        _check_predicate(where)
        return _collect((path, module) for path, module in tree.modules.items() if where(path, module))
    raise WhereError(
        f"where={where!r} is a {type(where).__name__}; give a path, a glob, a module class, "
        "a predicate (path, module), a module, a Selection, or a list of these."
    )


def _match_selection(tree: Tree, where: Selection) -> dict[int, list[str]]:
    """Find the selected modules again; one that moved is matched at all its paths."""
    found = {}
    for site in where:
        now = tree.paths.get(id(site.module))
        if now:
            found[id(site.module)] = [path for path in now if path in site.matched] or now
    return found


def _merge(matched: dict[int, list[str]], more: dict[int, list[str]]) -> None:
    for key, paths in more.items():
        known = matched.get(key, [])
        matched[key] = [*known, *(path for path in paths if path not in known)]


def _check_classes(where: type | tuple[Any, ...] | UnionType) -> None:
    try:
        isinstance(None, where)
    except TypeError:
        raise WhereError(f"where={where!r} does not hold classes only; give classes: (nn.Conv1d, nn.Conv2d).") from None


def _check_predicate(where: Callable[..., object]) -> None:
    try:
        inspect.signature(where).bind("", nn.Module())
    except TypeError as error:
        raise WhereError(f"where={where!r} can't be called with a path and a module: {error}.") from None
    except ValueError:  # a function of C that does not say what it takes
        pass


def _match_name(tree: Tree, where: str) -> dict[int, list[str]]:
    if not is_exact(where) and where not in tree.modules:
        test = matcher(where)
        return _collect((path, module) for path, module in tree.modules.items() if test(path))
    path = exact_path(tree, where)
    return {} if path is None else {id(tree.modules[path]): [path]}


def _collect(places: Iterable[tuple[str, nn.Module]]) -> dict[int, list[str]]:
    matched: dict[int, list[str]] = {}
    for path, module in places:
        matched.setdefault(id(module), []).append(path)
    return matched


def exact_path(tree: Tree, where: str) -> str | None:
    """Find the path that an exact name means, with negative numbers counted from the end of their container."""
    if where in tree.modules:
        return where
    path = ""
    for segment in where.split("."):
        while "_orig_mod" in tree.modules[path]._modules and segment != "_orig_mod":  # of torch.compile
            path = join(path, "_orig_mod")
        children = tree.modules[path]._modules
        name = segment
        if segment not in children and isinstance(tree.modules[path], nn.Sequential | nn.ModuleList):
            names = list(children)
            if segment[:1] == "-" and segment[1:].isdecimal() and 0 < int(segment[1:]) <= len(names):
                name = names[int(segment)]
        path = join(path, name)
        if not name or path not in tree.modules:
            return None
    return path
