"""Optimizers follow an edit: parameters that left leave them, new ones enter the group that they belong to."""

from collections.abc import Mapping, MutableMapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from modsurg.errors import OptimizerError, listed
from modsurg.surgery.changes import Change, Frozen
from modsurg.surgery.journal import Journal
from modsurg.surgery.key_mapping import HeldParameters
from modsurg.surgery.optimizers.groups import (
    Ancestry,
    GroupIndex,
    Membership,
    Named,
    NamedParameter,
    NamedParameters,
    admits,
    find_places,
    first_entries,
    rewrite_group,
)
from modsurg.surgery.optimizers.state import OptimizerJournal, find_wrapped
from modsurg.surgery.resize.axes import Reshaped
from modsurg.surgery.resize.values import Resized
from modsurg.tree.walk import Tree, walk
from modsurg.tree.wrappers import unwrap


@dataclass(frozen=True, slots=True)
class _Moves:
    """What one optimizer has to do.

    Attributes:
        entering: What enters each group, by its number.
        gone: `id` of parameters that left the model.
        thawed: `id` of those that train from now on.
        shapes: What was resized, in that order.
        restart: Whether a history over all parameters is reset.
        before: The model's parameters before the edit.
        after: The same after it.
    """

    entering: Mapping[int, Sequence[NamedParameter]]
    gone: Set[int]
    thawed: Set[int]
    shapes: Sequence[Reshaped]
    restart: bool
    before: NamedParameters
    after: NamedParameters


@dataclass(frozen=True, slots=True)
class Synced:
    """What `sync` or an edit changed in one optimizer.

    Attributes:
        optimizer: The optimizer.
        entered: New parameters by their names, and the number of the group that they entered.
        left: How many parameters left it.
        notes: What else the user should know.
    """

    optimizer: Optimizer
    entered: Mapping[str, int]
    left: int
    notes: tuple[str, ...]

    @property
    def changed(self) -> bool:
        """Whether there is anything to say."""
        return bool(self.entered or self.left or self.notes)

    def __str__(self) -> str:
        said = [f"{self.left} parameter{'s' * (self.left != 1)} left it"] if self.left else []
        for group in sorted(set(self.entered.values())):
            names = [name for name, number in self.entered.items() if number == group]
            said.append(f"{listed(names, 3)} entered group {group}")
        return f"{type(self.optimizer).__name__}: " + "; ".join([*said, *self.notes] or ["nothing to do"])


class OptimizerSync:
    """The optimizers of one transaction; they follow when it is committed.

    Args:
        root: The model.
        optimizer: Those given.
        scheduler: Theirs.

    Raises:
        OptimizerError: An optimizer or scheduler can't follow.
    """

    def __init__(
        self,
        root: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] | None,
        scheduler: LRScheduler | Sequence[LRScheduler] | None,
    ) -> None:
        self._root = root
        self._optimizers = gather_optimizers(optimizer, scheduler)
        self._journals: list[OptimizerJournal] = []
        self.held: list[HeldParameters] = []

    def watch(self, journal: Journal) -> None:
        """Take everything back when `journal` is rolled back, after what is kept in it from now on."""
        if self._optimizers:
            journal.on_undo(self._undo)

    def follow(self, before: Tree, after: Tree, changes: Sequence[Change]) -> list[str]:
        """Let every optimizer follow the changes; see `follow_changes`.

        Returns:
            Notes for the report.
        """
        if not self._optimizers:
            return []
        named = named_parameters(before), named_parameters(after)
        self._journals = [OptimizerJournal(each) for each in self._optimizers]
        old = [_groups_of(each) for each in self._optimizers]
        done = follow_changes(self._journals, *named, changes)
        names = tuple({id(p): name for name, p in reversed(each)} for each in named)
        self.held = [
            HeldParameters(each, groups, _groups_of(each), (names[0], names[1]), changes)
            for each, groups in zip(self._optimizers, old, strict=True)
        ]
        return [str(each) for each in done if each.changed]

    def find_conflict(self) -> str | None:
        """What was changed since in a way that can't be undone."""
        return next(filter(None, (each.find_conflict() for each in self._journals)), None)

    def _undo(self) -> None:
        now = first_entries(named_parameters(walk(self._root)))
        while self._journals:
            self._journals.pop().undo(now)


def sync(optimizer: Optimizer | Sequence[Optimizer], model: nn.Module) -> list[Synced]:
    """Let optimizers follow edits that were made by hand.

    Parameters that the model does not have leave their group and state (also those of another model: give
    `nn.ModuleList([generator, critic])` where one optimizer is for several). Trainable parameters that are in no group
    enter that of their nearest neighbour in the tree: of the same kind (weights; biases and norms), closest by path. No
    group is added, so that schedulers go on.

    Args:
        optimizer: One or several; given together, a parameter that one of them has does not enter another.
        model: The model as it is now.

    Returns:
        For each optimizer what changed.

    Raises:
        OptimizerError: An optimizer that is not of torch's kind or has nothing of this model. Nothing was changed.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> from torch.optim import Adam
        >>> optimizer = Adam(model.parameters())
        >>> model[1] = nn.Linear(2, 5, bias=False)
        >>> print(*sync(optimizer, model))
        Adam: 2 parameters left it; 1.weight entered group 0
    """
    journals = [OptimizerJournal(each) for each in gather_optimizers(optimizer, None)]
    groups = [group for journal in journals for group in journal.optimizer.param_groups]
    before = [
        named for g in groups for named in zip(g.get("param_names", [""] * len(g["params"])), g["params"], strict=True)
    ]
    after = named_parameters(walk(unwrap(model)))
    try:
        return follow_changes(journals, before, after)
    except BaseException:
        for journal in journals:
            journal.undo(first_entries(after))
        raise


def follow_changes(
    journals: Sequence[OptimizerJournal], before: Named, after: Named, changes: Sequence[Change] = ()
) -> list[Synced]:
    """Let optimizers follow an edit.

    Parameters that left the model leave their group and their state. New ones enter the group of what they replace: of
    the same name in the replaced module, else of the same kind (weights; biases and norms), else of the nearest
    neighbour in the tree. Groups keep the model's order where they had it; none is added or removed, so that schedulers
    go on. The state of resized parameters is resized.

    Args:
        journals: Those of the optimizers.
        before: Every name and parameter of the model before the edit.
        after: The same after it.
        changes: What the edit did.

    Returns:
        One entry for each optimizer.

    Raises:
        OptimizerError: No optimizer has anything of this model, or can take a new parameter.
    """
    optimizers = [journal.optimizer for journal in journals]
    held, old, new = find_places(optimizers), first_entries(before), first_entries(after)
    if held and not any(identity in held for each in (old, new) for identity in each):
        kinds = ", ".join(type(each).__name__ for each in optimizers)
        raise OptimizerError(f"no parameter of this model is in {kinds}; give the optimizer that trains this model.")
    gone = old.keys() - new.keys()
    frozen = [change.detail for change in changes if isinstance(change.detail, Frozen) and change.detail.parameters]
    thawed = {id(parameter) for each in frozen if each.trainable for parameter in each.parameters}
    pairs = [(c.old, c.new) for c in changes if c.kind in ("replace", "wrap") and c.old and c.new]
    membership = Membership(optimizers, held, old, new, Ancestry(pairs, before, gone))
    entering: dict[GroupIndex, list[NamedParameter]] = {}
    for identity, entry in new.items():
        if identity not in held and (identity not in old or identity in thawed):
            place = membership.find_place(entry)
            if place is not None:
                entering.setdefault(place, []).append(entry)
            elif entry.parameter.requires_grad:
                raise _no_optimizer_error(optimizers, entry)
    shapes = [r for c in changes if isinstance(c.detail, Resized) for r in c.detail.tensors]
    done = []
    for number, journal in enumerate(journals):
        mine = {place.group: entries for place, entries in entering.items() if place.optimizer == number}
        with torch.inference_mode(False):
            done.append(_apply(journal, _Moves(mine, gone, thawed, shapes, bool(frozen), old, new)))
    return done


def gather_optimizers(
    optimizer: Optimizer | Sequence[Optimizer] | None, scheduler: LRScheduler | Sequence[LRScheduler] | None
) -> list[Optimizer]:
    """The optimizers that are to follow: those given, or else those that the schedulers hold.

    Raises:
        OptimizerError: One is not of torch's kind, or a scheduler's optimizer is not among those given.
    """
    given, schedulers = _listed(optimizer), _listed(scheduler)
    scheduled = [each for one in schedulers for each in _scheduled(one)]
    for each in (*given, *scheduled):
        _check(each)
    for each in scheduled:
        if given and not any(each.param_groups is known.param_groups for known in given):
            raise OptimizerError(
                f"the scheduler belongs to another {type(each).__name__} than the optimizer given; "
                "leave optimizer= out, and it is taken from the scheduler."
            )
    return list({id(each.param_groups): each for each in (*scheduled, *given)}.values())


def named_parameters(tree: Tree) -> list[tuple[str, nn.Parameter]]:
    """Every name and parameter, shared ones under each of their names."""
    return [
        (f"{path}.{name}" if path else name, parameter)
        for path, module in tree.modules.items()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]


def _listed(given: object) -> list[Any]:
    return [] if given is None else list(given) if isinstance(given, (list, tuple)) else [given]


def _scheduled(scheduler: object) -> list[Optimizer]:
    inner = getattr(scheduler, "_schedulers", None)
    if inner is not None:
        return [each for one in inner for each in _scheduled(one)]
    found = getattr(scheduler, "optimizer", None) or getattr(scheduler, "optimizers", None)
    if found is None:
        raise OptimizerError(
            f"scheduler= is a {type(scheduler).__name__} without an optimizer; "
            "give one of torch.optim.lr_scheduler: scheduler=StepLR(optimizer, 10)."
        )
    return list(found) if isinstance(found, (list, tuple)) else [found]


def _check(optimizer: Any) -> None:
    kind = type(optimizer).__name__
    groups = getattr(optimizer, "param_groups", None)
    usual = isinstance(groups, list) and all(
        isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups
    )
    if not usual or not isinstance(getattr(optimizer, "state", None), MutableMapping):
        raise OptimizerError(
            f"optimizer= is a {kind} without the param_groups and state of a torch.optim.Optimizer; "
            "edit without it, then build a new one from model.parameters()."
        )
    for inner in find_wrapped(optimizer):
        if inner.param_groups is not groups:
            raise OptimizerError(
                f"{kind} holds a {type(inner).__name__} with groups of its own, which would not follow; "
                "edit first and build it afterwards."
            )


def _apply(journal: OptimizerJournal, moves: _Moves) -> Synced:
    optimizer, groups = journal.optimizer, journal.optimizer.param_groups
    group_of = {id(p): group for group in groups for p in group["params"] if id(p) not in moves.gone}
    leaving = [p for group in groups for p in group["params"] if id(p) in moves.gone]
    shapes = [shape for shape in moves.shapes if id(shape.tensor) in group_of]
    notes = [journal.restart() if moves.entering or leaving or shapes or moves.restart else None]
    for parameter in leaving:
        journal.forget(parameter)
    for shape in shapes:
        note = journal.resize(group_of[id(shape.tensor)], shape)
        notes.append(note and f"{moves.after[id(shape.tensor)].name}: {note}")
    for number, group in enumerate(groups):
        mine = moves.entering.get(number, [])
        rewrite_group(group, mine, moves.gone, moves.before, moves.after)
        fresh = {id(entry.parameter) for entry in mine} | moves.thawed
        for parameter in group["params"]:
            if id(parameter) in fresh and parameter not in optimizer.state:
                journal.start(group, parameter)
    journal.seal(moves.after)
    entered = {entry.name: number for number, entries in moves.entering.items() for entry in entries}
    return Synced(optimizer, entered, len(leaving), tuple(note for note in notes if note))


def _groups_of(optimizer: Optimizer) -> list[list[nn.Parameter]]:
    return [list(group["params"]) for group in optimizer.param_groups]


def _no_optimizer_error(optimizers: Sequence[Optimizer], entry: NamedParameter) -> OptimizerError:
    name, shape = entry.name, tuple(entry.parameter.shape)
    if any(admits(each, entry.parameter) for each in optimizers):
        return OptimizerError(
            f"can't tell which optimizer is for {name}, since none has a parameter yet; give the one: optimizer=..."
        )
    kinds = ", ".join(type(each).__name__ for each in optimizers)
    return OptimizerError(
        f"{kinds} takes matrices only, and {name} is {shape}; give the optimizer of the other parameters too: "
        "optimizer=[muon, adamw]."
    )
