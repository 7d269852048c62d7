"""Remove and rename: a child less, or under another name."""

from collections.abc import Sequence

from torch import nn

from modsurg.errors import EditError
from modsurg.surgery.changes import Change
from modsurg.surgery.journal import Journal
from modsurg.surgery.ops.adopt import Homes
from modsurg.surgery.ops.bytecode import ForwardCode
from modsurg.surgery.ops.checks import (
    called_in_graph,
    refuse_fixed,
    refuse_offloaded,
    turn_off_fast_paths,
    warn_if_bypassed,
)
from modsurg.surgery.ops.children import Entry, called_by_name, in_order, listed_in, refuse_name, set_numbered
from modsurg.surgery.ops.factory import accepts
from modsurg.surgery.ops.hints import warn_of_lost_parts
from modsurg.surgery.ops.references import rewire, warn_of_untied
from modsurg.surgery.ops.targets import keep_usable, make_targets, sites_with_parent
from modsurg.tree.eval_lock import mode
from modsurg.tree.selection import Selection
from modsurg.tree.walk import Tree, last


def plan_remove(tree: Tree, selection: Selection, delete: bool, untie: bool) -> tuple[list[Change], list[str]]:
    """Plan to take sites out of their containers; elsewhere to put an Identity, or to delete them.

    Returns:
        The changes, and warnings.

    Raises:
        EditError: An Identity can't be there, or the parent can't do without the child.
    """
    code = ForwardCode()
    targets, warnings = make_targets(tree, selection, lambda old, path: nn.Identity(), untie)
    targets, unusable = keep_usable(tree, code, targets, removing=True)
    warnings += unusable
    changes: list[Change] = []
    for target in targets:
        refuse_offloaded(target.paths[0], target.old)
        deleted = tuple(path for path in target.paths if delete or in_order(tree, path))
        for path in deleted:
            if not in_order(tree, path):
                warnings += _warn_if_named(tree, path, "any more")
        rest = tuple(path for path in target.paths if path not in deleted)
        for path in rest:
            _refuse_identity(tree, path)
        if deleted:
            changes.append(Change("remove", deleted, old=target.old))
        if rest:
            changes.append(Change("remove", rest, old=target.old, new=target.new))
    warnings += warn_if_bypassed(tree, code, changes)
    return changes, warnings + warn_of_untied(tree, changes) + warn_of_lost_parts(tree, changes)


def apply_remove(tree: Tree, changes: Sequence[Change], journal: Journal) -> list[str]:
    """Take out what the plan says; each container is rebuilt once.

    Returns:
        Warnings about what still refers to the removed modules.
    """
    homes, code, warnings = Homes(tree), ForwardCode(), list[str]()
    deleted: dict[int, set[str]] = {}
    for change in changes:
        assert change.old is not None
        for path in change.paths:
            if change.new is None:
                deleted.setdefault(id(tree.parent(path)), set()).add(last(path))
            else:
                journal.set_child(tree.parent(path), last(path), change.new)
        if change.new is not None:
            homes.settle(change.new, change.old, change.paths[0], mode(change.old), journal)
    warnings += turn_off_fast_paths(tree, changes, journal)
    for key, names in deleted.items():
        parent = tree.modules[tree.paths[key][0]]
        entries: list[Entry] = [(name, child) for name, child in parent._modules.items() if name not in names]
        warnings += set_numbered(tree, code, parent, entries, journal)
    return warnings + rewire(tree, changes, journal)


def plan_rename(tree: Tree, selection: Selection, name: str) -> tuple[list[Change], list[str]]:
    """Plan to give one child another name in the same place.

    Raises:
        EditError: Several children match, or the parent can't do without the name.
        NameTakenError: The parent already has an attribute of that name.
    """
    sites = sites_with_parent(tree, selection, untie=True)
    if len(sites) > 1:
        raise EditError(f"rename gives one child a name, and {len(sites)} match; give one exact path.")
    old, path = sites[0].module, sites[0].path
    owner = path.rpartition(".")[0]
    parent = tree.modules[owner]
    refuse_name(parent, owner, name, keep=last(path))
    if name == last(path):
        return [], []
    refuse_fixed(tree, [path])
    paths = tuple(f"{each}.{last(path)}" if each else last(path) for each in tree.paths[id(parent)])
    return [Change("rename", paths, old=old, new=old, detail=name)], _warn_if_named(tree, path, f'under "{name}"')


def apply_rename(tree: Tree, changes: Sequence[Change], journal: Journal) -> None:
    """Rename the child of the plan."""
    for change in changes:
        parent, old = tree.parent(change.paths[0]), last(change.paths[0])
        journal.set_children(
            parent, [(str(change.detail) if name == old else name, child) for name, child in parent._modules.items()]
        )


def _warn_if_named(tree: Tree, path: str, how: str) -> list[str]:
    parent, name = tree.parent(path), last(path)
    kind = type(parent).__name__
    if called_by_name(parent, name):
        return [f'"{path}": the code of {kind} references self.{name}, which it will not find {how}.']
    if called_in_graph(tree, path):
        return [f'"{path}": the graph that torch.fx traced calls it by name, and will not find it {how}.']
    attribute = listed_in(parent, name)
    return (
        [f'"{path}": {kind} has the name "{name}" in its {attribute}, and will not find it {how}.'] if attribute else []
    )


def _refuse_identity(tree: Tree, path: str) -> None:
    module, owner = tree.modules[path], tree.parent(path)
    kind, parent = type(module).__name__, type(owner).__name__
    if getattr(type(module), "forward", None) is nn.Module.forward and "forward" not in vars(module):
        if not called_by_name(owner, last(path)):
            way = f'To delete it: remove(model, "{path}", delete=True).'
        elif isinstance(module, nn.ModuleList) and module._modules:
            way = f'To empty it: remove(model, "{path}.*").'
        else:
            way = f"{parent}.forward references self.{last(path)}: change that code first."
        raise EditError(f'"{path}" is a {kind}, which has no forward, so an Identity can\'t replace it. {way}')
    if isinstance(module, nn.RNNBase) or not accepts(module.forward, 1):
        raise EditError(
            f'"{path}" is a {kind}, which takes or returns more than one tensor, so an Identity can\'t replace it. '
            f'Put what {parent} can call there: replace(model, "{path}", new).'
        )
