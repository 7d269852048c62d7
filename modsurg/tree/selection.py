"""Selection: which modules a `where` means, resolved before anything changes."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from types import UnionType
from typing import Any, TypeAlias

from torch import nn

from modsurg.errors import CountError, NoMatchError, WhereError, counted
from modsurg.tree.garbage import uncollected
from modsurg.tree.patterns import is_exact, matcher
from modsurg.tree.suggestions import nearest
from modsurg.tree.walk import Tree, walk
from modsurg.tree.wrappers import unwrap


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """One module object and every path at which it stands.

    Attributes:
        module: The module itself.
        paths: All its paths, the first in module order first: a tied module has several.
        matched: Those of the paths that the `where` meant.
        order: Its place in module order, the root being 0.
    """

    module: nn.Module
    paths: tuple[str, ...]
    matched: tuple[str, ...]
    order: int = field(repr=False)

    @property
    def path(self) -> str:
        """The first path that was meant."""
        return self.matched[0]


class Selection:
    """Sites in module order: a value that can be combined with `&`, `|` and `-`, and given to every verb.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Sequential(nn.Linear(2, 2)))
        >>> select(model, nn.Linear).paths
        ('0', '2.0')
        >>> (select(model, nn.Linear) - select(model, "2.**")).paths
        ('0',)
        >>> len(select(model, nn.Linear) | select(model, nn.ReLU))
        3
    """

    def __init__(self, model: nn.Module, sites: tuple[Site, ...]) -> None:
        self.model = model
        self.sites = sites

    @property
    def paths(self) -> tuple[str, ...]:
        """The first matched path of each site."""
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
        return any(item is site.module or item in site.paths for site in self.sites)

    def __and__(self, other: "Selection") -> "Selection":
        theirs = self._indexed(other)
        return Selection(self.model, tuple(_joint(site, theirs) for site in self if id(site.module) in theirs))

    def __or__(self, other: "Selection") -> "Selection":
        sites = self._indexed(other) | {id(site.module): site for site in self}
        return Selection(self.model, tuple(sorted(sites.values(), key=lambda site: site.order)))

    def __sub__(self, other: "Selection") -> "Selection":
        theirs = self._indexed(other)
        return Selection(self.model, tuple(site for site in self if id(site.module) not in theirs))

    def __repr__(self) -> str:
        lines = [f"Selection of {len(self)} in {type(self.model).__name__}"]
        lines += [f"  {' = '.join(site.paths)}  {type(site.module).__name__}" for site in self.sites[:20]]
        if len(self) > 20:
            lines.append(f"  ... {len(self) - 20} more")
        return "\n".join(lines)

    def _indexed(self, other: "Selection") -> dict[int, Site]:
        if other.model is not self.model:
            raise WhereError("these selections are of two different models; select both in the same one.")
        return {id(site.module): site for site in other}


def _joint(site: Site, others: dict[int, Site]) -> Site:
    matched = tuple(path for path in site.matched if path in others[id(site.module)].matched)
    return replace(site, matched=matched or site.matched)


Where: TypeAlias = (
    str
    | type[nn.Module]
    | tuple[type[nn.Module], ...]
    | UnionType
    | Callable[[str, nn.Module], bool]
    | nn.Module
    | Selection
)


def select(model: nn.Module, where: Where, *, count: int | None = None) -> Selection:
    r"""Find modules; nothing is changed.

    Args:
        model: Looked through when it is a torch.compile wrapper.
        where: `"layer4.0.conv1"` (exact; a negative number counts from the end of a Sequential or ModuleList),
            `"layer?.*.bn1"` or `"**.relu"` (glob), `"re:layer[34]\\..*"` (regular expression, full match),
            a module class, a tuple or a union of them (isinstance), `lambda path, module: ...`, a module object of
            the model, or a `Selection`.
        count: How many sites there must be.

    Returns:
        The sites in module order. A module that stands at several paths is one site with all of them.

    Raises:
        NoMatchError: Nothing matches; the message names the nearest paths.
        CountError: There are not `count` sites.
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
    with uncollected():
        return resolve(walk(unwrap(model)), where, count)


def resolve(tree: Tree, where: Where, count: int | None = None) -> Selection:
    """Resolve `where` in a tree that was walked already; see `select`."""
    matched = _match(tree, where)
    if not matched:
        raise NoMatchError(nearest(tree, where))
    if count is not None and len(matched) != count:
        found = ", ".join(f'"{paths[0]}"' for paths in list(matched.values())[:5])
        more = ", ..." if len(matched) > 5 else ""
        number = counted(len(matched), "site matches", "sites match")
        raise CountError(f"count={count!r}, but {number} in {type(tree.root).__name__}: {found}{more}.")
    order = {key: number for number, key in enumerate(tree.paths)} if len(matched) > 1 else {}
    sites = (
        Site(tree.modules[paths[0]], tuple(tree.paths[key]), tuple(paths), order.get(key, 0))
        for key, paths in matched.items()
    )
    return Selection(tree.root, tuple(sorted(sites, key=lambda site: site.order)))


def _match(tree: Tree, where: Where) -> dict[int, list[str]]:
    if isinstance(where, str):
        return _match_name(tree, where)
    if isinstance(where, Selection):
        known = ((id(site.module), set(site.matched)) for site in where)
        return {
            key: [path for path in tree.paths[key] if path in paths] or tree.paths[key]
            for key, paths in known
            if key in tree.paths
        }
    if isinstance(where, nn.Module):
        found = tree.paths.get(id(unwrap(where)))
        return {id(unwrap(where)): found} if found else {}
    if isinstance(where, type | tuple | UnionType):
        _check_classes(where)
        return {key: paths for key, paths in tree.paths.items() if isinstance(tree.modules[paths[0]], where)}
    if callable(where):
        _check_predicate(where)
        return _collect((path, module) for path, module in tree.modules.items() if where(path, module))
    raise WhereError(
        f"where={where!r} is a {type(where).__name__}; give a path, a glob, a module class, "
        "a predicate (path, module), a module or a Selection; several are select(model, a) | select(model, b)."
    )


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
    """The path that an exact name means, with negative numbers counted from the end of their container."""
    if where in tree.modules:
        return where
    path = ""
    for segment in where.split("."):
        while "_orig_mod" in tree.modules[path]._modules and segment != "_orig_mod":  # of torch.compile
            path = f"{path}._orig_mod" if path else "_orig_mod"
        children = tree.modules[path]._modules
        name = segment
        if segment not in children and isinstance(tree.modules[path], nn.Sequential | nn.ModuleList):
            names = list(children)
            if segment[:1] == "-" and segment[1:].isdecimal() and 0 < int(segment[1:]) <= len(names):
                name = names[int(segment)]
        path = f"{path}.{name}" if path else name
        if not name or path not in tree.modules:
            return None
    return path
