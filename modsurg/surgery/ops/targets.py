"""What a structural verb edits: the sites that have a parent, which of their paths, and the new module for each."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from modsurg.errors import EditError, counted, listed
from modsurg.surgery.ops.bytecode import ForwardCode
from modsurg.surgery.ops.checks import CALLERS, refuse_wrapped, why_fixed
from modsurg.surgery.ops.children import in_order
from modsurg.surgery.ops.factory import Maker
from modsurg.tree.selection import Selection, Site
from modsurg.tree.walk import Tree, last, parents


@dataclass(frozen=True, slots=True)
class Target:
    """A site of a structural verb.

    Attributes:
        old: The module there.
        paths: Those of its paths that are edited.
        new: The module that was made for it.
    """

    old: nn.Module
    paths: tuple[str, ...]
    new: nn.Module


def sites_with_parent(tree: Tree, selection: Selection, untie: bool) -> list[Site]:
    """Return the sites that can be edited: all but the root.

    Raises:
        EditError: Only the root matches.
        WrapperError: A place inside DDP, FSDP or TorchScript.
    """
    sites = [site for site in selection if "" not in site.matched]
    if not sites and len(selection):
        root = type(tree.root).__name__
        raise EditError(
            f"the root {root} has no parent in which it could be edited; assign your variable: model = new."
        )
    refuse_wrapped(tree, (path for site in sites for path in (site.matched if untie else site.paths)))
    return sites


def make_targets(tree: Tree, selection: Selection, make: Maker, untie: bool) -> tuple[list[Target], list[str]]:
    """Make the new modules, outer sites first; a site inside an edited one is left alone.

    Returns:
        The targets, and a warning that names the sites that were left alone.

    Raises:
        EditError: Only the root matches, or a path can't be untied from another.
        WrapperError: A place inside DDP, FSDP or TorchScript.
    """
    sites = sites_with_parent(tree, selection, untie)
    edited: set[str] = set()
    inner: list[str] = []
    targets: list[Target] = []
    for site in sites:
        paths = site.matched if untie else site.paths
        if edited:
            paths = tuple(path for path in paths if edited.isdisjoint(parents(path)))
            if not paths:
                inner.append(f'"{site.path}"')
                continue
        new = make(site.module, site.path)
        if new is None or new is site.module:
            continue
        if site.module._modules and len(sites) > 1:
            edited.update(paths)
        targets.append(Target(site.module, paths, new))
    for target in targets:
        _refuse_half(tree, target, edited)
    if not inner:
        return targets, []
    matches = counted(
        len(inner), "match lies inside an edited one and was", "matches lie inside an edited one and were"
    )
    return targets, [f"{matches} left alone: {listed(inner, 5)}."]


def keep_usable(
    tree: Tree, code: ForwardCode, targets: Sequence[Target], *, removing: bool = False
) -> tuple[list[Target], list[str]]:
    """Leave out those of several targets where torch could not use the new module, or do without the old one.

    Returns:
        The other targets, and a warning for each that was left out.

    Raises:
        EditError: No target is usable.
    """
    usable, warnings = [], []
    for target in targets:
        why = next(filter(None, (_unusable(tree, code, path, target, removing) for path in target.paths)), None)
        if why is None:
            usable.append(target)
        else:
            warnings.append(why)
    if warnings and not usable:
        raise EditError(f"{warnings[0]}.")
    return usable, [f"{why.partition('; ')[0]}: left as it was." for why in warnings]


def _unusable(tree: Tree, code: ForwardCode, path: str, target: Target, removing: bool) -> str | None:
    why = why_fixed(tree, path)
    if why is None and not (removing and in_order(tree, path)):
        why = _unreadable(tree, code, path, target)
    return why


def _unreadable(tree: Tree, code: ForwardCode, path: str, target: Target) -> str | None:
    """Why a module can't be at `path`: its parent reads what the old module has and the new one does not have."""
    parent = tree.parent(path)
    grandparent = tree.parent(path.rpartition(".")[0])
    first = isinstance(grandparent, nn.TransformerEncoder) and last(path) == next(iter(parent._modules))
    if first and parent is grandparent.layers:
        parent, attributes = grandparent, {"self_attn"}
    elif isinstance(parent, (*CALLERS, nn.TransformerEncoderLayer)):
        return None
    else:
        attributes, _ = code.reads(parent, last(path))
    missing = sorted(name for name in attributes if hasattr(target.old, name) and not hasattr(target.new, name))
    if not missing:
        return None
    return (
        f'"{path}": {type(parent).__name__} reads {", ".join(missing)} of it, which {type(target.new).__name__} does '
        "not have; replace the parent, or give the new module these attributes"
    )


def _refuse_half(tree: Tree, target: Target, edited: set[str]) -> None:
    """Refuse to edit one of two paths that lead through a shared parent, unless the other lies in an edited site."""
    every = tree.paths[id(target.old)]
    if len(every) == len(target.paths):
        return
    others = [path for path in every if path not in target.paths and edited.isdisjoint(parents(path))]
    slots = {(id(tree.parent(path)), last(path)) for path in target.paths}
    for other in others:
        if (id(tree.parent(other)), last(other)) in slots:
            parent = other.rpartition(".")[0]
            raise EditError(
                f'untie=True: "{target.paths[0]}" and "{other}" refer to the same child, because their parent is '
                f'shared. Untie the parent first: replace(model, "{parent}", copy.deepcopy, untie=True).'
            )
