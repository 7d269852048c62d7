"""What nn.Module itself keeps in every module, and the hooks among it."""

import types
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from modsurg.structure import encode as values
from modsurg.structure.decode import Unpacker
from modsurg.structure.encode import Packer

_EMPTY = vars(nn.Module())
SLOTS = frozenset(_EMPTY)
_CONTAINERS = [(name, type(value)) for name, value in _EMPTY.items() if isinstance(value, dict | set)]
HOOKS = tuple(name for name, value in _EMPTY.items() if isinstance(value, OrderedDict))
# Of nn.Module's own, these are plain values like any attribute.
_VALUES = frozenset({"training", "_is_full_backward_hook"})
# What torch.compile leaves on a module; it would be called instead of forward.
COMPILED = "_compiled_call_impl"
# transformers hooks a model when it is first asked for hidden states, and again where its mark is missing.
_CAPTURING = "install_output_capuring_hook.<locals>.output_capturing_hook"
_CAPTURED = "_output_capturing_hooks_installed"


def is_attribute(name: str) -> bool:
    """Whether this entry of a module's `__dict__` is kept as a plain value."""
    return (name not in SLOTS or name in _VALUES) and name != COMPILED


def attributes(module: nn.Module) -> dict[str, Any]:
    """What a module holds as plain values, but for what every module holds alike."""
    return {
        name: value
        for name, value in values.attributes(module).items()
        if is_attribute(name) and (value is not None or name not in SLOTS) and name != _CAPTURED
    }


def fresh_slots() -> dict[str, Any]:
    """The `__dict__` of a module without parameters, buffers, children and hooks."""
    slots = dict(_EMPTY)
    slots.update([(name, kind()) for name, kind in _CONTAINERS])
    return slots


def methods(kind: type) -> set[str]:
    """The names of everything that an object of this class runs; no attribute of a file may stand before one."""
    runs = (types.FunctionType, classmethod, staticmethod)
    return {name for base in kind.__mro__ for name, value in vars(base).items() if isinstance(value, runs)}


def pack_hooks(module: nn.Module, packer: Packer, path: str) -> dict[str, Any]:
    """The hooks of a module as data: those that a class or a module's method stands behind."""
    kept = {}
    for slot in HOOKS:
        found = module.__dict__.get(slot) or {}
        hooks = {number: hook for number, hook in found.items() if getattr(hook, "__qualname__", "") != _CAPTURING}
        if hooks:
            place = f"{path} ({slot.strip('_').removesuffix('s').replace('_', ' ')})"
            kept[slot] = [[number, packer.pack(hook, place)] for number, hook in hooks.items()]
    return kept


def unpack_hooks(module: nn.Module, data: dict[str, Any], unpacker: Unpacker) -> None:
    """Put hooks back under their numbers, so that a handle of later days gets another one."""
    for slot in HOOKS:
        for number, hook in data.get(slot, ()):
            module.__dict__[slot][int(number)] = unpacker.unpack(hook)
            RemovableHandle.next_id = max(RemovableHandle.next_id, int(number) + 1)


def reparametrize(module: nn.Module, names: Iterable[str]) -> None:
    """Give a module whose parametrizations are in place the class and the properties that use them.

    torch has no public way that leaves the parametrizations as they are: registering one computes it anew.
    """
    for number, name in enumerate(names):
        if name not in module._modules["parametrizations"]._modules:  # type: ignore[union-attr]  # it is there
            raise LookupError(f"no parametrization of {name}")
        if not number:
            parametrize._inject_new_class(module)
        parametrize._inject_property(module, name)
