"""The structural verbs at work: replace, wrap, insert, remove, add, rename."""

from collections.abc import Iterable
from typing import Literal

from torch import nn

from modsurg.errors import EditError, counted, listed
from modsurg.surgery.changes import Beside, Change, Step, last
from modsurg.surgery.ops.adopt import settle, take_place
from modsurg.surgery.ops.aliases import rewire, tell_untied
from modsurg.surgery.ops.checks import (
    above,
    compiled,
    parametrizing,
    refuse_cycle,
    refuse_offloaded,
    refuse_wrapped,
    tell_if_bypassed,
    tell_what_went,
    unreadable,
)
from modsurg.surgery.ops.children import in_order, neighbours, without
from modsurg.surgery.ops.factory import Maker, accepts
from modsurg.surgery.ops.naming import called_by_name, free_name, listed_in, parent_of, sibling
from modsurg.tree.selection import Selection, Site
from modsurg.tree.walk import Tree
from modsurg.tree.wrappers import unwrap


def targets(step: Step, selection: Selection, untie: bool) -> list[tuple[Site, tuple[str, ...]]]:
    """The sites that have a place, and which of their paths are edited.

    Raises:
        EditError: Only the root matches.
        WrapperError: A place inside DDP, FSDP or TorchScript.
    """
    sites = [site for site in selection if "" not in site.matched]
    if not sites and len(selection):
        root = type(step.tree.root).__name__
        raise EditError(f"the root {root} has no place in a tree; assign your variable instead: model = new.")
    chosen = [(site, site.matched if untie else site.paths) for site in sites]
    refuse_wrapped(step.tree, (path for _, paths in chosen for path in paths))
    return chosen


def outermost(
    step: Step, chosen: list[tuple[Site, tuple[str, ...]]], make: Maker
) -> list[tuple[Site, tuple[str, ...], nn.Module]]:
    """Make the new modules, outer sites first; what lies inside an edited one is left alone and reported.

    Raises:
        EditError: A path that can't be untied from another.
    """
    done: set[str] = set()
    inner: list[str] = []
    made: list[tuple[Site, tuple[str, ...], nn.Module]] = []
    nested = len(chosen) > 1
    for site, paths in chosen:
        if done:
            paths = tuple(path for path in paths if done.isdisjoint(above(path)))
            if not paths:
                inner.append(site.path)
                continue
        new = make(site.module, site.path)
        if new is None or new is site.module:
            continue
        if site.module._modules and nested:
            done.update(paths)
        made.append((site, paths, new))
    for site, paths, _ in made:
        _refuse_half(step.tree, site, paths, done)
    if inner:
        matches = counted(
            len(inner), "match lies inside an edited one and was", "matches lie inside an edited one and were"
        )
        quoted = [f'"{path}"' for path in inner]
        step.warnings.append(f"{matches} left alone: {listed(quoted, 5)}.")
    return made


def _refuse_half(tree: Tree, site: Site, paths: tuple[str, ...], done: set[str]) -> None:
    """Refuse to edit a place without another that is the same one, unless that lies inside an edited one."""
    others = [path for path in site.paths if path not in paths and done.isdisjoint(above(path))]
    edges = {(id(tree.parent(path)), last(path)) for path in paths} if others else set()
    for other in others:
        if (id(tree.parent(other)), last(other)) in edges:
            parent = other.rpartition(".")[0]
            raise EditError(
                f'untie=True: "{paths[0]}" and "{other}" are one place, because their parent is shared. '
                f'Untie the parent first: replace(model, "{parent}", copy.deepcopy, untie=True).'
            )


def callable_ones(
    step: Step, made: list[tuple[Site, tuple[str, ...], nn.Module]], *, gone: bool = False
) -> list[tuple[Site, tuple[str, ...], nn.Module]]:
    """Leave out the sites of several where torch could not use the new module, or do without the old one (`gone`).

    Raises:
        EditError: It is the only site.
    """
    kept, left = [], []
    for each in made:
        site, paths, new = each
        wrong = (
            compiled(step.tree, path)
            or parametrizing(step.tree, path, None if gone else new)
            or (None if gone and in_order(step.tree.parent(path)) else unreadable(step, path, site.module, new))
            for path in paths
        )
        if why := next(filter(None, wrong), None):
            left.append(why)
        else:
            kept.append(each)
    if left and not kept:
        raise EditError(f"{left[0]}.")
    step.warnings += [f"{why.partition('; ')[0]}: left as it was." for why in left]
    return kept


def replace_sites(
    step: Step, selection: Selection, make: Maker, untie: bool, kind: Literal["replace", "wrap"] = "replace"
) -> None:
    """Put what `make(old, path)` returns into the place of each site."""
    made = callable_ones(step, outermost(step, targets(step, selection, untie), make))
    for site, paths, new in made:
        _refuse(step, site, paths, new, kind)
    layers = _has_fast_path(step.tree)
    for site, paths, new in made:
        take_place(step, site.module, new, paths[0])
        for path in paths:
            parent = step.tree.parent(path)
            step.child(parent, last(path), new)
        tell_if_bypassed(step, paths, layers)
        step.changes.append(Change(kind, paths, old=site.module, new=new))
    rewire(
        step, {id(site.module): new for site, paths, new in made if len(paths) == len(site.paths)}, _gone(step, made)
    )
    tell_untied(step, made)
    tell_what_went(step, made)


def _has_fast_path(tree: Tree) -> bool:
    return any(isinstance(module, nn.TransformerEncoderLayer) for module in tree.modules.values())


def _refuse_fixed(tree: Tree, paths: Iterable[str]) -> None:
    for path in paths:
        if why := compiled(tree, path) or parametrizing(tree, path, None):
            raise EditError(f"{why}.")


def _refuse(step: Step, site: Site, paths: tuple[str, ...], new: nn.Module, kind: str) -> None:
    for path in paths:
        refuse_cycle(step.tree, path, new)
    if kind == "wrap":
        if not any(module is site.module for module in new.modules()):
            raise EditError(
                f'the wrapper of "{paths[0]}" does not hold it: {type(new).__name__} has no such child. '
                "Keep it in the wrapper's __init__ (self.base = old), or use replace."
            )
    else:
        refuse_offloaded(paths[0], site.module)


def _gone(step: Step, made: Iterable[tuple[Site, tuple[str, ...], nn.Module]]) -> dict[int, str]:
    """Modules and parameters that left without a successor: `id` -> the path where they were."""
    gone: dict[int, str] = {}
    stayed: set[int] = set()
    edited: set[str] = set()
    for site, paths, new in made:
        if len(paths) < len(site.paths):
            continue
        if site.module._modules or len(paths) > 1:
            edited.update(paths)
        if site.module._modules:
            for name, module in site.module.named_modules(prefix=paths[0]):
                _note(gone, name, module)
        else:
            _note(gone, paths[0], site.module)
        for module in new.modules() if new._modules else (new,):
            stayed.add(id(module))
            stayed.update(map(id, module._parameters.values()))
    for key in [key for key in gone if key in stayed or _stands_elsewhere(step.tree, key, edited)]:
        del gone[key]
    return gone


def _note(gone: dict[int, str], path: str, module: nn.Module) -> None:
    gone[id(module)] = path
    for name, parameter in module._parameters.items():
        if parameter is not None:
            gone[id(parameter)] = f"{path}.{name}"


def _stands_elsewhere(tree: Tree, key: int, edited: set[str]) -> bool:
    paths = tree.paths.get(key, ())
    return len(paths) > 1 and any(path not in edited and edited.isdisjoint(above(path)) for path in paths)


def insert_sites(step: Step, selection: Selection, make: Maker, after: bool, untie: bool) -> None:
    """Put what `make(anchor, path)` returns before or after each site."""
    made = outermost(step, targets(step, selection, untie), make)
    for _, paths, new in made:
        _refuse_fixed(step.tree, paths)
        for path in paths:
            refuse_cycle(step.tree, path, new)
    placed = neighbours(step, [(path, new) for _, paths, new in made for path in paths], after)
    for site, paths, new in made:
        settle(step, new, site.module, site.paths[0], site.module.training)
        step.changes.append(
            Change("insert", tuple(placed[id(new)]), anchor=site.module, new=new, detail=Beside(paths, after))
        )


def remove_sites(step: Step, selection: Selection, delete: bool, untie: bool) -> None:
    """Take sites out of their containers; elsewhere put an Identity, or delete."""
    chosen = targets(step, selection, untie)
    made = callable_ones(step, outermost(step, chosen, lambda old, path: nn.Identity()), gone=True)
    cut: list[str] = []
    layers = _has_fast_path(step.tree)
    for site, paths, identity in made:
        refuse_offloaded(paths[0], site.module)
        out = [path for path in paths if delete or in_order(step.tree.parent(path))]
        rest = tuple(path for path in paths if path not in out)
        cut += out
        for path in (each for each in out if not in_order(step.tree.parent(each))):
            _tell_if_spoken_of(step, path, "any more")
        if out:
            step.changes.append(Change("remove", tuple(out), old=site.module))
        for path in rest:
            _refuse_identity(step.tree, path)
            step.child(step.tree.parent(path), last(path), identity)
        if rest:
            if not isinstance(site.module, nn.Dropout):  # which does nothing where the fast path is taken
                tell_if_bypassed(step, rest, layers)
            settle(step, identity, site.module, rest[0], site.module.training)
            step.changes.append(Change("remove", rest, old=site.module, new=identity))
    moved = without(step, cut)
    if moved:
        names = [f'"{path or type(step.tree.root).__name__}"' for path in moved]
        step.notes.append(f"renumbered: {listed(names, 5)}")
    stays = {id(site.module): new for site, paths, new in made if not cut or not set(paths) & set(cut)}
    rewire(step, stays, _gone(step, made), ties=False)
    tell_untied(step, made)
    tell_what_went(step, made)


def _tell_if_spoken_of(step: Step, path: str, how: str) -> None:
    parent, name = step.tree.parent(path), last(path)
    if called_by_name(parent, name):
        step.warnings.append(
            f'"{path}": {type(parent).__name__} speaks of self.{name} in its own code, which will not find it {how}.'
        )
    elif attribute := listed_in(parent, name):
        step.warnings.append(
            f'"{path}": {type(parent).__name__} has the name "{name}" in its {attribute}, and will not find it {how}.'
        )


def _refuse_identity(tree: Tree, path: str) -> None:
    module = tree.modules[path]
    kind, parent = type(module).__name__, type(tree.parent(path)).__name__
    if getattr(type(module), "forward", None) is nn.Module.forward and "forward" not in vars(module):
        raise EditError(
            f'"{path}" is a {kind}, which has no forward: {parent} does not call it, and no Identity can stand for it. '
            f'To delete it: remove(model, "{path}", delete=True).'
        )
    if isinstance(module, nn.RNNBase) or not accepts(module.forward, 1):
        raise EditError(
            f'"{path}" is a {kind}, which takes or returns more than one tensor, so no Identity can stand for it. '
            f'Put what {parent} can call there: replace(model, "{path}", new), or delete it: delete=True.'
        )


def add_child(step: Step, path: str, child: nn.Module, before: str | None, after: str | None) -> None:
    """Add a child under a free name, last or beside a sibling."""
    above_path, name = parent_of(step.tree, path)
    parent = unwrap(step.tree.modules[above_path])
    refuse_wrapped(step.tree, [path])
    if not isinstance(child, nn.Module):
        raise EditError(f'add needs a module for "{path}", not {child!r}; a class is called first: nn.ReLU().')
    free_name(parent, above_path, name)
    beside = sibling(parent, above_path, before, after)
    refuse_cycle(step.tree, path, child)
    entries: list[tuple[str, nn.Module | None]] = [(n, c) for n, c in parent._modules.items() if n != name]
    place = len(entries) if beside is None else [n for n, _ in entries].index(beside[0]) + beside[1]
    if parent._modules.get(name, parent) is None and beside is None:
        place = list(parent._modules).index(name)
    entries.insert(place, (name, child))
    if name in parent.__dict__:
        step.journal.keep_dict(parent.__dict__)
        del parent.__dict__[name]
    step.children(parent, entries)
    settle(step, child, parent, path, parent.training)
    paths = tuple(f"{owner}.{name}" if owner else name for owner in step.tree.paths[id(parent)])
    step.changes.append(Change("add", paths, anchor=parent, new=child))


def rename_child(step: Step, selection: Selection, name: str) -> None:
    """Give one child another name in the same place."""
    (site, paths), *more = targets(step, selection, untie=True)
    if more:
        raise EditError(f"rename gives one child a name, and {len(more) + 1} match; give one exact path.")
    above_path, _, old = paths[0].rpartition(".")
    parent = step.tree.modules[above_path]
    free_name(parent, above_path, name, keep=old)
    if name == old:
        return
    _refuse_fixed(step.tree, paths)
    step.children(parent, [(name if n == old else n, child) for n, child in parent._modules.items()])
    _tell_if_spoken_of(step, paths[0], f'under "{name}"')
    at = tuple(f"{owner}.{old}" if owner else old for owner in step.tree.paths[id(parent)])
    step.changes.append(Change("rename", at, old=site.module, new=site.module, detail=name))
