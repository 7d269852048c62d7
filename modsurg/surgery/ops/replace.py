"""Replace and wrap: another module in the place of each site."""

from collections.abc import Sequence
from typing import Literal

from modsurg.errors import EditError
from modsurg.surgery.changes import Change
from modsurg.surgery.journal import Journal
from modsurg.surgery.ops.adopt import Homes, take_place, warn_of_parameter_hooks
from modsurg.surgery.ops.bytecode import ForwardCode
from modsurg.surgery.ops.checks import (
    refuse_cycle,
    refuse_offloaded,
    turn_off_fast_paths,
    warn_if_bypassed,
)
from modsurg.surgery.ops.factory import Maker
from modsurg.surgery.ops.hints import warn_of_lost_parts
from modsurg.surgery.ops.references import rewire, warn_of_untied
from modsurg.surgery.ops.targets import Target, keep_usable, make_targets
from modsurg.tree.selection import Selection
from modsurg.tree.walk import Tree, last


def plan_replace(
    tree: Tree, selection: Selection, make: Maker, untie: bool, kind: Literal["replace", "wrap"] = "replace"
) -> tuple[list[Change], list[str]]:
    """Plan to put what `make(old, path)` returns into the place of each site.

    Returns:
        The changes, and warnings.

    Raises:
        EditError: The new module can't be there; the message says why.
    """
    code = ForwardCode()
    targets, inner = make_targets(tree, selection, make, untie)
    targets, unusable = keep_usable(tree, code, targets)
    homes = Homes(tree)
    for target in targets:
        for path in target.paths:
            refuse_cycle(tree, path, target.new)
        if kind == "wrap":
            _refuse_without(target)
        else:
            refuse_offloaded(target.paths[0], target.old)
        homes.refuse_unmovable(target.new, target.old, target.paths[0])
    changes = [Change(kind, target.paths, old=target.old, new=target.new) for target in targets]
    bypassed = warn_if_bypassed(tree, code, changes)
    return changes, [
        *inner,
        *unusable,
        *bypassed,
        *warn_of_untied(tree, changes),
        *warn_of_parameter_hooks(tree, changes),
        *warn_of_lost_parts(tree, changes),
    ]


def apply_replace(tree: Tree, changes: Sequence[Change], journal: Journal) -> list[str]:
    """Put the new modules where the plan says; they take over what the old ones had.

    Returns:
        Warnings about what was not taken over.
    """
    homes = Homes(tree)
    warnings: list[str] = []
    for change in changes:
        assert change.old is not None
        assert change.new is not None
        warnings += take_place(homes, change.old, change.new, change.paths[0], journal)
        for path in change.paths:
            journal.set_child(tree.parent(path), last(path), change.new)
    warnings += turn_off_fast_paths(tree, changes, journal)
    return warnings + rewire(tree, changes, journal)


def _refuse_without(target: Target) -> None:
    if not any(module is target.old for module in target.new.modules()):
        raise EditError(
            f'the wrapper of "{target.paths[0]}" does not hold it: {type(target.new).__name__} has no such child. '
            "Keep it in the wrapper's __init__ (self.base = old), or use replace."
        )
