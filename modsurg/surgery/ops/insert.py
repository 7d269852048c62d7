"""Insert and add: a new child beside another, or under a new name."""

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from modsurg.errors import ContainerError, EditError, NoMatchError
from modsurg.surgery.changes import Beside, Change
from modsurg.surgery.journal import Journal
from modsurg.surgery.ops.adopt import Homes
from modsurg.surgery.ops.bytecode import ForwardCode
from modsurg.surgery.ops.checks import refuse_cycle, refuse_fixed, refuse_wrapped
from modsurg.surgery.ops.children import Entry, in_order, is_container, numbered, refuse_name, set_numbered
from modsurg.surgery.ops.factory import Maker
from modsurg.surgery.ops.targets import make_targets
from modsurg.tree.eval_lock import mode
from modsurg.tree.selection import Selection, exact_path
from modsurg.tree.suggestions import nearest
from modsurg.tree.walk import Tree, last, walk
from modsurg.tree.wrappers import unwrap


def plan_insert(
    tree: Tree, selection: Selection, make: Maker, after: bool, untie: bool
) -> tuple[list[Change], list[str]]:
    """Plan to put what `make(neighbour, path)` returns before or after each site.

    Returns:
        The changes, without their paths, which are known when they are made; and warnings.

    Raises:
        ContainerError: The parent calls its children by attribute, so that a neighbour would never run.
    """
    targets, warnings = make_targets(tree, selection, make, untie)
    homes = Homes(tree)
    for target in targets:
        refuse_fixed(tree, target.paths)
        for path in target.paths:
            refuse_cycle(tree, path, target.new)
            if not in_order(tree, path):
                raise ContainerError(_no_container(path, tree.parent(path), target.new, after))
        homes.refuse_unmovable(target.new, target.old, target.paths[0])
    changes = [
        Change("insert", (), anchor=target.old, new=target.new, detail=Beside(target.paths, after))
        for target in targets
    ]
    return changes, warnings


def apply_insert(tree: Tree, changes: Sequence[Change], journal: Journal) -> tuple[list[Change], list[str]]:
    """Insert the new modules; each container is rebuilt once.

    Returns:
        The changes with the paths where the new modules are now, and warnings.
    """
    by_parent: dict[int, dict[str, Change]] = {}
    for change in changes:
        assert isinstance(change.detail, Beside)
        for path in change.detail.paths:
            by_parent.setdefault(id(tree.parent(path)), {})[last(path)] = change
    code, homes, warnings = ForwardCode(), Homes(tree), list[str]()
    for key, news in by_parent.items():
        parent = tree.modules[tree.paths[key][0]]
        entries: list[Entry] = []
        for name, child in parent._modules.items():
            around: list[Entry] = [(name, child)]
            if name in news:
                detail = news[name].detail
                assert isinstance(detail, Beside)
                around.insert(1 if detail.after else 0, (None, news[name].new))
            entries += around
        warnings += set_numbered(tree, code, parent, entries, journal)
    paths = walk(tree.root).paths
    placed = []
    for change in changes:
        assert change.new is not None
        assert change.anchor is not None
        homes.settle(change.new, change.anchor, tree.paths[id(change.anchor)][0], mode(change.anchor), journal)
        placed.append(replace(change, paths=tuple(paths[id(change.new)])))
    return placed, warnings


def plan_add(tree: Tree, path: str, child: nn.Module, before: str | None, after: str | None) -> list[Change]:
    """Plan to add a child under a free name, last or beside a sibling.

    Raises:
        NoMatchError: There is no such parent or sibling; the message names the nearest paths.
        NameTakenError: The name is not free.
        EditError: The path is empty, or it is not a module.
    """
    owner, name = _parent_of(tree, path)
    parent = unwrap(tree.modules[owner])
    refuse_wrapped(tree, [path])
    if not isinstance(child, nn.Module):
        raise EditError(f'add needs a module for "{path}", not {child!r}; a class is called first: nn.ReLU().')
    refuse_name(parent, owner, name)
    _refuse_sibling(parent, owner, before, after)
    refuse_cycle(tree, path, child)
    Homes(tree).refuse_unmovable(child, parent, path)
    paths = tuple(f"{each}.{name}" if each else name for each in tree.paths[id(parent)])
    return [Change("add", paths, anchor=parent, new=child)]


def apply_add(tree: Tree, changes: Sequence[Change], journal: Journal, before: str | None, after: str | None) -> None:
    """Add the child of the plan."""
    (change,) = changes
    parent, name = change.anchor, last(change.paths[0])
    assert parent is not None
    assert change.new is not None
    entries = [(n, c) for n, c in parent._modules.items() if n != name]
    names = [n for n, _ in entries]
    if before is not None or after is not None:
        place = names.index(before) if before is not None else names.index(str(after)) + 1
    elif name in parent._modules:  # an empty slot
        place = list(parent._modules).index(name)
    else:
        place = len(entries)
    entries.insert(place, (name, change.new))
    if name in parent.__dict__:
        journal.keep_attr(parent, name)
        del parent.__dict__[name]
    journal.set_children(parent, entries)
    Homes(tree).settle(change.new, parent, change.paths[0], mode(parent), journal)


def _no_container(path: str, parent: nn.Module, new: nn.Module, after: bool) -> str:
    order = "old, new" if after else "new, old"
    return (
        f'"{path}" is a child of a {type(parent).__name__}, which calls its children by attribute: a neighbour would '
        f'never run. Put both into its place: wrap(model, "{path}", lambda old: nn.Sequential({order})) '
        f"with new = {type(new).__name__}(...)."
    )


def _parent_of(tree: Tree, path: str) -> tuple[str, str]:
    """The path of the parent, which must exist, and the new name."""
    owner, _, name = path.rpartition(".") if isinstance(path, str) else ("", "", "")
    if not name:
        raise EditError(
            f'"{path}" can\'t be the path of a child; write "parent.name", or "name" for a child of the root.'
        )
    parent = exact_path(tree, owner) if owner or path == name else None
    if parent is None:
        raise NoMatchError(f'the parent must exist before "{name}" can be added: {nearest(tree, owner)}')
    return parent, name


def _refuse_sibling(parent: nn.Module, path: str, before: str | None, after: str | None) -> None:
    if before is not None and after is not None:
        raise EditError("give before= or after=, not both.")
    name = before if before is not None else after
    if name is not None and name not in parent._modules:
        children = ", ".join(parent._modules) or "none"
        owner = f'"{path}" ({type(parent).__name__})' if path else type(parent).__name__
        raise NoMatchError(f'no child "{name}" in {owner}; its children: {children}.')
    if name is not None and is_container(parent) and numbered(parent):
        raise EditError("a numbered container keeps its order by number: use insert_before or insert_after.")
