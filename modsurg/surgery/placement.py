"""The structural verbs at work: replace, wrap, insert, remove, add, rename."""

from collections.abc import Iterable

from torch import nn

from modsurg.errors import EditError, counted
from modsurg.surgery.aliases import rewire, tell_untied
from modsurg.surgery.containers import in_order, neighbours, without
from modsurg.surgery.guards import (
    above,
    parametrizing,
    refuse_cycle,
    refuse_offloaded,
    refuse_wrapped,
    tell_if_bypassed,
    unreadable,
)
from modsurg.surgery.inheritance import settle, take_place
from modsurg.surgery.making import Maker
from modsurg.surgery.naming import called_by_name, free_name, parent_of, sibling
from modsurg.surgery.steps import Change, Step, last
from modsurg.tree.selection import Selection, Site
from modsurg.tree.walk import Tree


def targets(step: Step, selection: Selection, untie: bool) -> list[tuple[Site, tuple[str, ...]]]:
    """The sites that have a place, and which of their paths are edited.

    Raises:
        EditError: Only the root matches, or a path that can't be untied from another.
        WrapperError: A place inside DDP, FSDP or TorchScript.
    """
    sites = [site for site in selection if "" not in site.matched]
    if not sites:
        root = type(step.tree.root).__name__
        raise EditError(f"the root {root} has no place in a tree; assign your variable instead: model = new.")
    chosen = [(site, site.matched if untie else site.paths) for site in sites]
    for site, paths in chosen if untie else ():
        _refuse_half(step.tree, site, paths)
    refuse_wrapped(step.tree, (path for _, paths in chosen for path in paths))
    return chosen


def _refuse_half(tree: Tree, site: Site, paths: tuple[str, ...]) -> None:
    edges = {(id(tree.parent(path)), last(path)) for path in paths}
    for other in site.paths:
        if other not in paths and (id(tree.parent(other)), last(other)) in edges:
            parent = other.rpartition(".")[0]
            raise EditError(
                f'untie=True: "{paths[0]}" and "{other}" are one place, because their parent is shared. '
                f'Untie the parent first: replace(model, "{parent}", copy.deepcopy, untie=True).'
            )


def outermost(
    step: Step, chosen: list[tuple[Site, tuple[str, ...]]], make: Maker
) -> list[tuple[Site, tuple[str, ...], nn.Module]]:
    """Make the new modules, outer sites first; what lies inside an edited one is left alone and reported."""
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
    if inner:
        matches = counted(
            len(inner), "match lies inside an edited one and was", "matches lie inside an edited one and were"
        )
        step.warnings.append(f"{matches} left alone: {_some(inner)}.")
    return made


def callable_ones(
    step: Step, made: list[tuple[Site, tuple[str, ...], nn.Module]]
) -> list[tuple[Site, tuple[str, ...], nn.Module]]:
    """Leave out the sites of several where torch could not use the new module.

    Raises:
        EditError: It is the only site.
    """
    kept, left = [], []
    for each in made:
        why = next(filter(None, (unreadable(step, path, each[0].module, each[2]) for path in each[1])), None)
        if why:
            left.append(why)
        else:
            kept.append(each)
    if left and not kept:
        raise EditError(f"{left[0]}.")
    step.warnings += [f"{why.partition('; ')[0]}: left as it was." for why in left]
    return kept


def replace_sites(step: Step, selection: Selection, make: Maker, untie: bool, kind: str = "replace") -> None:
    """Put what `make(old, path)` returns into the place of each site."""
    made = callable_ones(step, outermost(step, targets(step, selection, untie), make))
    for site, paths, new in made:
        _refuse(step, site, paths, new, kind)
    layers = any(isinstance(module, nn.TransformerEncoderLayer) for module in step.tree.modules.values())
    for site, paths, new in made:
        take_place(step, site.module, new, paths[0])
        for path in paths:
            parent = step.tree.parent(path)
            step.child(parent, last(path), new)
        tell_if_bypassed(step, paths, layers)
        _tell_parametrizing(step, paths, gone=False)
        step.changes.append(Change(kind, paths, site.module, new))
        step.replaced.append((site.module, new, paths[0]))
        step.made.append((paths, site.module, new))
        step.fresh.append(new)
    rewire(
        step, {id(site.module): new for site, paths, new in made if len(paths) == len(site.paths)}, _gone(step, made)
    )
    tell_untied(step, made)


def _tell_parametrizing(step: Step, paths: tuple[str, ...], *, gone: bool) -> None:
    found = (parametrizing(step.tree, path, gone=gone) for path in paths if "parametrizations" in path)
    step.warnings += [f"{why}." for why in found if why]


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
    for site, paths, new in made:
        step.made.append((paths, site.module, new))
        for path in paths:
            refuse_cycle(step.tree, path, new)
    placed = neighbours(step, [(path, new) for _, paths, new in made for path in paths], after)
    for new, anchor, now in placed:
        settle(step, new, anchor, step.tree.paths[id(anchor)][0], anchor.training)
        step.changes.append(Change("insert", tuple(now), None, new))
        step.fresh.append(new)


def remove_sites(step: Step, selection: Selection, delete: bool, untie: bool) -> None:
    """Take sites out of their containers; elsewhere put an Identity, or delete."""
    chosen = targets(step, selection, untie)
    made = callable_ones(step, outermost(step, chosen, lambda old, path: nn.Identity()))
    cut: list[str] = []
    for site, paths, identity in made:
        refuse_offloaded(paths[0], site.module)
        _tell_parametrizing(step, paths, gone=True)
        out = [path for path in paths if delete or in_order(step.tree.parent(path))]
        rest = tuple(path for path in paths if path not in out)
        cut += out
        if out:
            step.changes.append(Change("remove", tuple(out), site.module, None))
        for path in rest:
            step.child(step.tree.parent(path), last(path), identity)
        if rest:
            settle(step, identity, site.module, rest[0], site.module.training)
            step.changes.append(Change("remove", rest, site.module, identity))
    moved = without(step, cut)
    if moved:
        step.notes.append(f"renumbered: {_some([path or type(step.tree.root).__name__ for path in moved])}")
    stays = {id(site.module): new for site, paths, new in made if not cut or not set(paths) & set(cut)}
    rewire(step, stays, _gone(step, made), ties=False)
    tell_untied(step, made)


def add_child(step: Step, path: str, child: nn.Module, before: str | None, after: str | None) -> None:
    """Add a child under a free name, last or beside a sibling."""
    above_path, name = parent_of(step.tree, path)
    parent = step.tree.modules[above_path]
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
    step.changes.append(Change("add", paths, None, child))
    step.fresh.append(child)


def rename_child(step: Step, selection: Selection, name: str) -> None:
    """Give one child another name in the same place."""
    (site, paths), *more = targets(step, selection, untie=True)
    if more:
        raise EditError(f"rename gives one child a name, and {len(more) + 1} match; give one exact path.")
    above_path, _, old = paths[0].rpartition(".")
    parent = step.tree.modules[above_path]
    free_name(parent, above_path, name, keep=old)
    _tell_parametrizing(step, paths, gone=False)
    step.children(parent, [(name if n == old else n, child) for n, child in parent._modules.items()])
    if called_by_name(parent, old):
        step.warnings.append(
            f'"{paths[0]}": {type(parent).__name__} speaks of self.{old} in its own code, which will not find it '
            f'under "{name}".'
        )
    at = tuple(f"{owner}.{old}" if owner else old for owner in step.tree.paths[id(parent)])
    step.changes.append(Change("rename", at, site.module, site.module, name))


def _some(paths: list[str]) -> str:
    shown = ", ".join(f'"{path}"' for path in paths[:5])
    return f"{shown} and {len(paths) - 5} more" if len(paths) > 5 else shown
