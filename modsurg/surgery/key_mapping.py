"""Old names to new names: where each module of the tree before an edit is after it.

What it needs is recorded when the edit is committed, and worked out when it is first asked for: later edits do not
change the answer, and an edit of 20,000 modules does not wait for it.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from modsurg.errors import OptimizerError
from modsurg.surgery.changes import Change
from modsurg.surgery.journal import Journal
from modsurg.surgery.resize.axes import factor, fixed, old_shape
from modsurg.surgery.resize.values import Resized
from modsurg.tree.walk import Tree, walk

Value = TypeVar("Value")
Children = list[tuple[str, nn.Module | None]]


class HeldParameters:
    """The parameters of one optimizer before and after an edit, and what tells its state_dict from another's.

    Args:
        optimizer: The optimizer, after the edit.
        before: The parameters of each group before it.
        after: The same after it.
        names: The names of the model's parameters by `id`, before and after.
        changes: What the edit did.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        before: Sequence[Sequence[nn.Parameter]],
        after: Sequence[Sequence[nn.Parameter]],
        names: tuple[Mapping[int, str], Mapping[int, str]],
        changes: Sequence[Change],
    ) -> None:
        self.kind = type(optimizer).__name__
        self._options = [set(group) - {"params", "param_names", "initial_lr"} for group in optimizer.param_groups]
        self._groups = {
            False: [list(map(id, group)) for group in before],
            True: [list(map(id, group)) for group in after],
        }
        self._alive = [p for groups in (before, after) for group in groups for p in group]
        now = {id(p): (None if is_lazy(p) else tuple(p.shape)) for p in self._alive}
        old = dict(now)
        for resized in (change.detail for change in reversed(changes) if isinstance(change.detail, Resized)):
            old |= {id(each.tensor): old_shape(each.axes) for each in resized.tensors if id(each.tensor) in old}
        self._shapes = {False: old, True: now}
        self._names = {False: names[0], True: names[1]}

    def matches(self, state: Mapping[str, Any], *, inverse: bool) -> bool:
        """Whether a state_dict can be this optimizer's, by its groups, options, names and shapes."""
        groups, shapes, names = self._groups[inverse], self._shapes[inverse], self._names[inverse]
        theirs = state["param_groups"]
        if [len(group["params"]) for group in theirs] != [len(group) for group in groups]:
            return False
        for mine, options, group in zip(groups, self._options, theirs, strict=True):
            if set(group) - {"params", "param_names", "initial_lr"} != options:
                return False
            for key, name in zip(mine, group.get("param_names", ()), strict=False):
                if key in names and not name.endswith(names[key]):
                    return False
        numbers = dict(zip(_flat(group["params"] for group in theirs), _flat(groups), strict=True))
        return all(
            _fits_shape(value, shapes[numbers[number]], key)
            for number, entry in state["state"].items()
            if number in numbers and isinstance(entry, Mapping)
            for key, value in entry.items()
        )

    def renumber(self, state: Mapping[str, Any], *, inverse: bool) -> dict[str, Any]:
        """Put what is remembered under the numbers that the parameters have on the other side of the edit."""
        old, new = self._groups[inverse], self._groups[not inverse]
        numbers = {key: number for number, key in enumerate(_flat(new))}
        table = dict(zip(_flat(g["params"] for g in state["param_groups"]), map(numbers.get, _flat(old)), strict=True))
        groups = []
        for group, theirs, mine in zip(state["param_groups"], old, new, strict=True):
            changed = group | {"params": [numbers[key] for key in mine]}
            if "param_names" in group:
                changed["param_names"] = self._rename_group(group["param_names"], theirs, mine, inverse)
            groups.append(changed)
        entries = {table[key]: value for key, value in state["state"].items() if table.get(key) is not None}
        return {**state, "state": entries, "param_groups": groups}

    def _rename_group(self, known: Sequence[str], old: Sequence[int], new: Sequence[int], inverse: bool) -> list[str]:
        """The names of one group on the other side, with the prefix that they have here."""
        here, there, table = self._names[inverse], self._names[not inverse], dict(zip(old, known, strict=True))
        prefix = next((name.removesuffix(here[key]) for key, name in table.items() if key in here), "")
        return [prefix + there[key] if key in there else table[key] for key in new]


class Remapping:
    """The names of one edit, before and after.

    Args:
        before: The tree before the edit.
        journal: What the edit touched; only dicts of children matter.
        held: The parameters of each optimizer that followed.
    """

    def __init__(self, before: Tree, journal: Journal, held: Sequence[HeldParameters]) -> None:
        self._before = before
        self._touched = {key: (items, list(mapping.items())) for key, (mapping, items) in journal.dicts.items()}
        self._held = held
        self._inside = self._new_holders()
        self._names: dict[str, str | None] | None = None

    def apply(self, state: Mapping[str, Value], *, inverse: bool) -> dict[str, Value]:
        """Rename the keys of a model's state_dict, or the positions of an optimizer's."""
        if set(state) == {"state", "param_groups"}:
            return self._optimizer(dict(state), inverse)
        if self._names is None:
            self._names = self._forward()
        names = self._names
        if inverse:
            names = {new: old for old, new in names.items() if new is not None} | self._new_paths()
        renamed: dict[str, Value] = OrderedDict(_rename(state, names))
        metadata = getattr(state, "_metadata", None)
        if metadata is not None:
            paths = ((_rename_path(path, names), value) for path, value in metadata.items())
            renamed._metadata = OrderedDict((p, value) for p, value in paths if p is not None)  # type: ignore[attr-defined]  # as torch sets it
        return renamed

    def _new_holders(self) -> dict[int, list[tuple[str, nn.Module]]]:
        """New modules with children of their own, and what of the old tree stands inside them."""
        return {
            id(child): [(path, m) for path, m in walk(child).modules.items() if id(m) in self._before.paths]
            for _, after in self._touched.values()
            for _, child in after
            if isinstance(child, nn.Module) and child._modules and id(child) not in self._before.paths
        }

    def _forward(self) -> dict[str, str | None]:
        moves = {key: self._moves(before, after) for key, (before, after) in self._touched.items()}
        names: dict[str, str | None] = {"": ""}
        for path in self._before.modules:
            if path:
                above, _, name = path.rpartition(".")
                parent, here = self._before.modules[above], names[above]
                new = moves.get(id(parent._modules), {}).get(name, name)
                names[path] = None if here is None or new is None else f"{here}.{new}" if here and new else here or new
        return names

    def _moves(self, before: Children, after: Children) -> dict[str, str | None]:
        """Old name -> new name among one parent's children; a child that stands twice keeps its order."""
        places: dict[int, list[str]] = {}
        for name, child in after:
            places.setdefault(id(child), []).append(name)
            for inner, held in self._inside.get(id(child), ()):
                places.setdefault(id(held), []).append(f"{name}.{inner}" if inner else name)
        seen: dict[int, int] = {}
        moves: dict[str, str | None] = {}
        for name, child in before:
            found, turn = places.get(id(child), []), seen.get(id(child), 0)
            seen[id(child)] = turn + 1
            moves[name] = found[min(turn, len(found) - 1)] if found else None
        return moves

    def _new_paths(self) -> dict[str, None]:
        """Where the edit put modules that were not there before: their keys have no old name."""
        assert self._names is not None
        fresh: dict[str, None] = {}
        for path, module in self._before.modules.items():
            here = self._names[path]
            for name, child in self._touched.get(id(module._modules), ((), ()))[1]:
                if here is not None and child is not None and id(child) not in self._before.paths:
                    fresh[f"{here}.{name}" if here else name] = None
        return fresh

    def _optimizer(self, state: Mapping[str, Any], inverse: bool) -> dict[str, Any]:
        """Find the optimizer whose state this is, and renumber it.

        Raises:
            OptimizerError: No optimizer that followed the edit has such a state, or several have.
        """
        if not self._held:
            raise OptimizerError(
                "this edit had no optimizer, so the state of one can't be remapped. Give it to the edit: optimizer=..."
            )
        fitting = [held for held in self._held if held.matches(state, inverse=inverse)]
        results = [held.renumber(state, inverse=inverse) for held in fitting]
        if not results:
            kinds = ", ".join(held.kind for held in self._held)
            when = "after" if inverse else "before"
            raise OptimizerError(f"this is not the state of {kinds} from {when} the edit: its parameters are others.")
        tables = [(list(each["state"]), [group["params"] for group in each["param_groups"]]) for each in results]
        if any(table != tables[0] for table in tables):
            kinds = " or ".join(held.kind for held in fitting)
            raise OptimizerError(
                f"can't tell whether this is the state of {kinds}: both had parameters of these shapes. "
                "Optimizers of model.named_parameters() have names by which they are told apart."
            )
        return results[0]


def _rename(state: Mapping[str, Value], names: Mapping[str, str | None]) -> Iterator[tuple[str, Value]]:
    for key, value in state.items():
        owner, _, name = key.rpartition(".")
        while owner and owner not in names:
            owner, _, above = owner.rpartition(".")
            name = f"{above}.{name}"
        new = names[owner]
        if new is not None:
            yield f"{new}.{name}" if new else name, value


def _rename_path(path: str, names: Mapping[str, str | None]) -> str | None:
    """The new path of a module; of one that is not known, below the nearest parent that is."""
    if path in names:
        return names[path]
    return next((key for key, _ in _rename({path: None}, names)), None)


def _flat(groups: Iterable[Iterable[Any]]) -> list[Any]:
    return [each for group in groups for each in group]


def _fits_shape(value: object, shape: tuple[int, ...] | None, key: str) -> bool:
    """Whether a remembered value can belong to a parameter of that shape; factored ones may lack a dimension."""
    if shape is None or not isinstance(value, torch.Tensor) or value.ndim == 0 or key == "step":
        return True
    return factor(fixed(*shape), tuple(value.shape), str(key)) is not None
