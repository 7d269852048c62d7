"""Old names to new names: where each module of the tree before an edit stands after it.

What it needs is recorded when the edit is committed, and worked out when it is first asked for: later edits do not
change the answer, and an edit of 20,000 modules does not wait for it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from modsurg.surgery.journal import Journal
from modsurg.surgery.ops.checks import above
from modsurg.tree.walk import Tree, walk

Value = TypeVar("Value")
Children = list[tuple[str, nn.Module | None]]


@dataclass(frozen=True, slots=True)
class Positions:
    """The numbers by which an optimizer's state_dict knows its parameters.

    Attributes:
        before: For each group, the `id` of its parameters before the edit.
        after: The same after it.
    """

    before: list[list[int]]
    after: list[list[int]]


class Remapping:
    """The names of one edit, before and after.

    Args:
        before: The tree before the edit.
        journal: What the edit touched; only dicts of children matter.
        positions: The parameters of each optimizer that followed.
    """

    def __init__(self, before: Tree, journal: Journal, positions: Sequence[Positions]) -> None:
        self._before = before
        self._touched = {key: (items, list(mapping.items())) for key, (mapping, items) in journal.dicts.items()}
        self._tensors = {key: _form(tensor) for key, tensor in journal.tensors.items()}
        _latest.update(dict.fromkeys(self._tensors, self))
        self._positions = positions
        self._inside = self._new_holders()
        self._names: dict[str, str | None] | None = None
        self._witness = next(((p, p.device, p.dtype) for p in self._staying()), None)

    def moved_since(self) -> dict[str, Any]:
        """The device and dtype that the user has given to the model since the edit, as `Module.to` takes them."""
        if self._witness is None:
            return {}
        weight, device, dtype = self._witness
        now = {"device": (device, weight.device), "dtype": (dtype, weight.dtype)}
        return {name: new for name, (old, new) in now.items() if new != old}

    def apply(self, state: Mapping[str, Value], *, inverse: bool) -> dict[str, Value]:
        """Rename the keys of a model's state_dict, or the positions of an optimizer's."""
        if set(state) == {"state", "param_groups"}:
            return self._optimizer(dict(state), inverse)
        if self._names is None:
            self._names = self._forward()
        if not inverse:
            return _rename(state, self._names)
        known: dict[str, str | None] = {new: old for old, new in self._names.items() if new is not None}
        return _rename(state, known | self._new_paths())

    def changed_since(self, journal: Journal) -> str | None:
        """What the edit left somewhere, if it is not as the edit left it: children, a shape, what trains.

        What trains may be set by the user too, which no undo takes back: it only counts where a later edit was.
        """
        for key, (mapping, _) in journal.dicts.items():
            left = self._touched[key][1]
            if not all(isinstance(child, nn.Module | None) for _, child in left):
                continue
            if [(name, id(child)) for name, child in mapping.items()] != [(name, id(child)) for name, child in left]:
                return f"the part with the children {', '.join(name for name, _ in left[:5])}"
        for path, module in self._before.modules.items() if self._tensors else ():
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None and id(tensor) in self._tensors and self._differs(tensor):
                    return f'"{path}.{name}"' if path else f'"{name}"'
        return None

    def _differs(self, tensor: torch.Tensor) -> bool:
        (shape, trains), (left, trained) = _form(tensor), self._tensors[id(tensor)]
        return shape != left or (trains != trained and _latest.get(id(tensor)) not in (None, self))

    def _staying(self) -> Iterator[nn.Parameter]:
        """Floating parameters of modules that the edit left where they were."""
        left = {id(child) for before, _ in self._touched.values() for _, child in before}
        left -= {id(child) for _, after in self._touched.values() for _, child in after}
        modules = self._before.modules
        for path, module in modules.items():
            if module._parameters and id(module) not in left and left.isdisjoint(id(modules[p]) for p in above(path)):
                own = (p for p in module._parameters.values() if p is not None and not is_lazy(p))
                yield from (p for p in own if p.is_floating_point())

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

    def _optimizer(self, state: dict[str, Any], inverse: bool) -> dict[str, Any]:
        shape = [len(group["params"]) for group in state["param_groups"]]
        for positions in self._positions:
            old, new = (positions.after, positions.before) if inverse else (positions.before, positions.after)
            if [len(group) for group in old] == shape:
                numbers = {key: number for number, key in enumerate(key for group in new for key in group)}
                keys = [key for group in state["param_groups"] for key in group["params"]]
                table = dict(zip(keys, (numbers.get(key) for group in old for key in group), strict=True))
                return {
                    "state": {table[key]: value for key, value in state["state"].items() if table[key] is not None},
                    "param_groups": [
                        group | {"params": [numbers[key] for key in mine]}
                        for group, mine in zip(state["param_groups"], new, strict=True)
                    ],
                }
        return state


_latest: WeakValueDictionary[int, Remapping] = WeakValueDictionary()  # the last edit of a tensor, by its `id`


def _form(tensor: torch.Tensor) -> tuple[torch.Size | None, bool]:
    return (None if is_lazy(tensor) else tensor.shape, tensor.requires_grad)


def _rename(state: Mapping[str, Value], names: Mapping[str, str | None]) -> dict[str, Value]:
    renamed: dict[str, Value] = {}
    for key, value in state.items():
        head = key.rpartition(".")[0]
        while head and head not in names:
            head = head.rpartition(".")[0]
        new, tail = names[head], key[len(head) + 1 :] if head else key
        if new is not None:
            renamed[f"{new}.{tail}" if new else tail] = value
    return renamed
