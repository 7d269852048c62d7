"""What an edit touched, kept so that it can be taken back bit for bit.

Every mutation is announced before it happens: `keep_dict(module._modules)`, then the change. Keeping costs one shallow
copy for each object, however often it is touched; the bytes of tensors are never copied, so whoever changes a tensor
gives it new memory (`t.data = ...`) and leaves the old memory as it was.
"""

from collections.abc import Callable, Iterable, MutableMapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

Mapping = MutableMapping[Any, Any]

_ABSENT = object()


class Journal:
    """Snapshots in the order in which they were taken.

    Attributes:
        dicts: Each dict that was kept, with its items then, by its `id`; a rollback fills in what is there.
        tensors: The tensors that were kept.
        memory: `id` of those whose memory was kept, not only their flags.
        lists: The lists that were kept.
        attributes: The owner and name of each attribute that was kept.

    Example:
        >>> journal, names = Journal(), ["a", "b"]
        >>> journal.keep_list(names)
        >>> names.clear()
        >>> journal.rollback()
        >>> names
        ['a', 'b']
    """

    def __init__(self) -> None:
        self.dicts: dict[int, tuple[Mapping, list[tuple[Any, Any]]]] = {}
        self.tensors: dict[int, torch.Tensor] = {}
        self.memory: set[int] = set()
        self.lists: dict[int, list[Any]] = {}
        self.attributes: dict[tuple[int, str], tuple[object, str]] = {}
        self._undo: list[Callable[[], None]] = []

    def keep_dict(self, mapping: Mapping) -> None:
        """Keep the items and their order; they come back into this same object."""
        if id(mapping) not in self.dicts:
            items = list(mapping.items())
            self.dicts[id(mapping)] = (mapping, items)
            self._undo.append(lambda: _refill(mapping, items))

    def keep_list(self, values: list[Any]) -> None:
        """Keep the elements and their order; they come back into this same object."""
        if id(values) not in self.lists:
            self.lists[id(values)] = values
            elements = list(values)
            self._undo.append(lambda: values.__setitem__(slice(None), elements))

    def keep_tensor(self, tensor: torch.Tensor, *, moving: bool = False) -> None:
        """Keep which memory the tensor has (not a copy of it), its gradient and requires_grad.

        Args:
            tensor: About to get other memory.
            moving: It also gets another dtype or device. Else it stays where the user has moved it since.
        """
        if id(tensor) not in self.tensors:
            self.tensors[id(tensor)] = tensor
            self.memory.add(id(tensor))
            data, grad, requires_grad = None if is_lazy(tensor) else tensor.data, tensor.grad, tensor.requires_grad
            self._undo.append(lambda: _restore_tensor(tensor, data, grad, requires_grad, moving))

    def keep_flags(self, tensor: torch.Tensor) -> None:
        """Keep the gradient and requires_grad of a tensor that does not get other memory."""
        if id(tensor) not in self.tensors:
            self.tensors[id(tensor)] = tensor
            grad, requires_grad = tensor.grad, tensor.requires_grad
            self._undo.append(lambda: _restore_tensor(tensor, None, grad, requires_grad, moving=False))

    def keep_attr(self, owner: object, name: str) -> None:
        """Keep one attribute of the object's own `__dict__`, or that it was not there."""
        if (id(owner), name) not in self.attributes:
            self.attributes[id(owner), name] = (owner, name)
            attributes = owner.__dict__
            value = attributes.get(name, _ABSENT)
            self._undo.append(lambda: _restore_attribute(attributes, name, value))

    def set_child(self, parent: nn.Module, name: str, child: nn.Module) -> None:
        """Put a module into the place of a child."""
        self.keep_dict(parent._modules)
        parent._modules[name] = child

    def set_children(self, parent: nn.Module, children: Iterable[tuple[str, nn.Module | None]]) -> None:
        """Give a parent these children in this order."""
        self.keep_dict(parent._modules)
        parent._modules.clear()
        parent._modules.update(children)

    def on_undo(self, function: Callable[[], None]) -> None:
        """Call `function` when it is this moment's turn in a rollback."""
        self._undo.append(function)

    def open(self, later: "Journal") -> None:
        """Let a rollback of this journal roll back `later` too, which has no snapshots yet."""
        self._undo.append(later.rollback)

    def absorb(self, later: "Journal") -> None:
        """Take over the objects that a journal opened within this one has kept."""
        for key, kept in later.dicts.items():
            self.dicts.setdefault(key, kept)
        self.tensors |= later.tensors
        self.memory |= later.memory
        self.lists |= later.lists
        self.attributes |= later.attributes

    def rollback(self) -> None:
        """Bring everything back, the latest first."""
        while self._undo:
            self._undo.pop()()


def set_data(tensor: torch.Tensor, data: torch.Tensor) -> None:
    """Give `tensor` other memory, also of another shape.

    Autograd remembers the old shape for as long as a graph of an earlier forward is alive, and then refuses the next
    backward. It forgets when the dtype changes, so the tensor goes through another one.
    """
    tensor.data = data.new_empty(0, dtype=torch.float32 if data.dtype == torch.float64 else torch.float64)
    tensor.data = data


def _refill(mapping: Mapping, items: list[tuple[Any, Any]]) -> None:
    mapping.clear()
    mapping.update(items)


def _restore_tensor(
    tensor: torch.Tensor, data: torch.Tensor | None, grad: torch.Tensor | None, requires_grad: bool, moving: bool
) -> None:
    if not moving:
        data, grad = (each if each is None else each.to(tensor.device, tensor.dtype) for each in (data, grad))
    tensor.grad = None
    if data is not None and tensor.shape == data.shape:
        tensor.data = data
    elif data is not None:
        set_data(tensor, data)
    if tensor.requires_grad != requires_grad:
        tensor.requires_grad = requires_grad
    tensor.grad = grad


def _restore_attribute(attributes: dict[str, Any], name: str, value: object) -> None:
    if value is _ABSENT:
        attributes.pop(name, None)
    else:
        attributes[name] = value
