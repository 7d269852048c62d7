"""Optimizers follow an edit: parameters that left leave them, new ones enter the group that they belong to."""

from collections.abc import Collection, Mapping, MutableMapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from modsurg.errors import OptimizerError, listed
from modsurg.surgery.journal import Journal
from modsurg.surgery.optimizers.groups import Ancestry, Membership, Named, Place, admits, first_names, places
from modsurg.surgery.optimizers.rosters import Entry, rewrite
from modsurg.surgery.optimizers.state import begin, forget, keep, resize_state, restart, wrapped
from modsurg.surgery.resize.axes import Reshaped
from modsurg.tree.walk import walk
from modsurg.tree.wrappers import unwrap


class HasTensors(Protocol):
    """What a resize leaves behind; see `resizing.Resized`."""

    @property
    def tensors(self) -> tuple[Reshaped, ...]:
        """The parameters and buffers that got another shape."""


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


@dataclass(frozen=True, slots=True)
class Moved:
    """What optimizers have to know of an edit.

    Attributes:
        before: Every name and parameter of the model before the edit.
        after: The same after it.
        replaced: Old module, new module and path of each replacement, in the order in which they were made.
        resized: What was resized, in that order.
        thawed: `id` of parameters that train from now on; they enter a group if they are in none.
        restart: Whether parameters were frozen or thawed, so that a history over all of them begins anew.
    """

    before: Named
    after: Named
    replaced: Sequence[tuple[nn.Module, nn.Module, str]] = ()
    resized: Sequence[HasTensors] = ()
    thawed: Collection[int] = ()
    restart: bool = False


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
    optimizers = gather(optimizer, None)
    groups = [group for each in optimizers for group in each.param_groups]
    held = [
        named for g in groups for named in zip(g.get("param_names", [""] * len(g["params"])), g["params"], strict=True)
    ]
    journal = Journal()
    try:
        return follow(optimizers, Moved(held, named_parameters(unwrap(model))), journal)
    except BaseException:
        journal.rollback()
        raise


def follow(optimizers: Sequence[Optimizer], moved: Moved, journal: Journal) -> list[Synced]:
    """Let optimizers follow an edit; each change is noted in `journal` before it is made.

    Parameters that left the model leave their group and their state. New ones enter the group of what they replace: of
    the same name in the replaced module, else of the same kind (weights; biases and norms), else of the nearest
    neighbour in the tree. Groups keep the model's order where they had it; none is added or removed, so that schedulers
    go on. The state of resized parameters is resized.

    Returns:
        One entry for each optimizer.

    Raises:
        OptimizerError: No optimizer has anything of this model, or can take a new parameter.
    """
    held, names = places(optimizers), (first_names(moved.before), first_names(moved.after))
    if held and not any(identity in held for each in names for identity in each):
        kinds = ", ".join(type(each).__name__ for each in optimizers)
        raise OptimizerError(f"no parameter of this model is in {kinds}; give the optimizer that trains this model.")
    gone = names[0].keys() - names[1].keys()
    membership = Membership(optimizers, held, *names, Ancestry(moved.replaced, moved.before, gone))
    entering: dict[Place, list[Entry]] = {}
    for identity, entry in names[1].items():
        if identity not in held and (identity not in names[0] or identity in moved.thawed):
            place = membership.place(*entry)
            if place is not None:
                entering.setdefault(place, []).append(entry)
            elif entry[2].requires_grad:
                raise _homeless(optimizers, entry)
    done = []
    for number, optimizer in enumerate(optimizers):
        mine = {place.group: entries for place, entries in entering.items() if place.optimizer == number}
        with torch.inference_mode(False):
            done.append(_apply(optimizer, mine, gone, moved, names, journal))
    return done


def gather(
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


def named_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Every name and parameter, shared ones under each of their names."""
    return [
        (f"{path}.{name}" if path else name, parameter)
        for path, module in walk(model).modules.items()
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
            "edit without it and build it anew from model.parameters()."
        )
    for inner in wrapped(optimizer):
        if inner.param_groups is not groups:
            raise OptimizerError(
                f"{kind} holds a {type(inner).__name__} with groups of its own, which would not follow; "
                "edit first and build it afterwards."
            )


def _apply(
    optimizer: Optimizer,
    entering: dict[int, list[Entry]],
    gone: Set[int],
    moved: Moved,
    names: tuple[dict[int, Entry], dict[int, Entry]],
    journal: Journal,
) -> Synced:
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    staying = groups.keys() - gone
    leaving = [p for group in optimizer.param_groups for p in group["params"] if id(p) in gone]
    shapes = [r for each in moved.resized for r in each.tensors if id(r.tensor) in staying]
    notes: list[str | None] = []
    if entering or leaving or shapes or moved.restart:
        changed = {id(shape.tensor) for shape in shapes}
        keep(optimizer, changed.union(id(p) for entries in entering.values() for *_, p in entries), journal)
        notes.append(restart(optimizer, journal))
    for parameter in leaving:
        forget(optimizer, parameter)
    for shape in shapes:
        note = resize_state(optimizer, groups[id(shape.tensor)], shape, journal)
        notes.append(note and f"{names[1][id(shape.tensor)][1]}: {note}")
    for number, group in enumerate(optimizer.param_groups):
        rewrite(group, entering.get(number, ()), gone, names, journal)
        for *_, parameter in entering.get(number, ()):
            begin(optimizer, group, parameter)
        for parameter in group["params"]:
            if id(parameter) in moved.thawed and parameter not in optimizer.state:
                begin(optimizer, group, parameter)
    entered = {name: number for number, entries in entering.items() for _, name, _ in entries}
    return Synced(optimizer, entered, len(leaving), tuple(note for note in notes if note))


def _homeless(optimizers: Sequence[Optimizer], entry: Entry) -> OptimizerError:
    _, name, parameter = entry
    shape = tuple(parameter.shape)
    if any(admits(each, parameter) for each in optimizers):
        return OptimizerError(
            f"can't tell which optimizer is for {name}, since none has a parameter yet; give the one: optimizer=..."
        )
    kinds = ", ".join(type(each).__name__ for each in optimizers)
    return OptimizerError(
        f"{kinds} takes matrices only, and {name} is {shape}; give the optimizer of the other parameters too: "
        "optimizer=[muon, adamw]."
    )
