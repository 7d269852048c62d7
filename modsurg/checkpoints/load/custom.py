"""Loading into modules that have loading code of their own: through torch's `load_state_dict`, with a way back.

Such code may do anything with the state, so the whole state is held in memory, and a copy of the model's.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from modsurg.checkpoints.formats.derived import rename_versions
from modsurg.checkpoints.formats.source import Source
from modsurg.checkpoints.load.plan import Plan


def load_through_torch(model: nn.Module, source: Source, plan: Plan) -> None:
    """Give the planned state to `model.load_state_dict`, and note in the plan what torch found missing or too much.

    Raises:
        RuntimeError: Something did not fit. Whatever is raised, the caller has to undo.
    """
    found = model.load_state_dict(_state(model, source, plan), strict=False)
    unexpected = set(found.unexpected_keys)
    asked = {fill.target.name for fill in plan.fills} | plan.reshaped.keys() | plan.covered | set(plan.missing)
    missing = [name for name in found.missing_keys if name in asked]
    leftover = {name: key for name, key in plan.leftover.items() if name in unexpected}
    if len(leftover) < len(plan.leftover):
        plan.translated = [name for name in plan.missing if name not in missing]
    plan.missing, plan.leftover = missing, leftover


def snapshot(model: nn.Module) -> Callable[[], None]:
    """Remember a model's attributes, tensors and extra state; returns what brings them back."""
    modules = [(module, dict(vars(module)), _tables(module)) for module in model.modules()]
    extras = [(module, copy.deepcopy(module.get_extra_state())) for module in model.modules() if has_extra(module)]
    tensors = [
        (tensor, type(tensor), tensor.data if is_lazy(tensor) or tensor.is_meta else tensor.detach().clone())
        for tensor in [*model.parameters(), *model.buffers()]
    ]

    def undo() -> None:
        for module, attributes, tables in modules:
            vars(module).clear()
            vars(module).update(attributes)
            for name, table in tables.items():
                attributes[name].clear()
                attributes[name].update(table)
        for tensor, kind, values in tensors:
            _restore(tensor, kind, values)
        for module, extra in extras:  # which may raise
            module.set_extra_state(extra)

    return undo


def has_extra(module: nn.Module) -> bool:
    """Whether the module keeps extra state."""
    return type(module).get_extra_state is not nn.Module.get_extra_state


def _tables(module: nn.Module) -> dict[str, Any]:
    return {name: dict(value) for name, value in vars(module).items() if isinstance(value, dict)}


def _restore(tensor: torch.Tensor, kind: type, values: torch.Tensor) -> None:
    if type(tensor) is not kind:  # a lazy parameter that got its shape
        tensor.data = values
        tensor.__class__ = kind
    elif not (is_lazy(tensor) or tensor.is_meta):
        with torch.no_grad():
            tensor.copy_(values)


def _state(model: nn.Module, source: Source, plan: Plan) -> OrderedDict[str, Any]:
    state: OrderedDict[str, Any] = OrderedDict()
    for fill in plan.fills:
        state[fill.target.name] = fill.read(source)
    for name, key in [*plan.reshaped.items(), *plan.leftover.items(), *((name, key) for name, _, key in plan.extra)]:
        state[name] = source.read(key) if key in source else source.notes.extra[key]
    if source.notes.versions:
        names = {fill.target.name: fill.key for fill in plan.fills}
        versions = rename_versions(
            source.notes.versions,
            {**names, **plan.reshaped, **plan.leftover, **{name: key for name, _, key in plan.extra}},
        )
        state._metadata = {  # type: ignore[attr-defined]  # where torch's modules look for their version
            path: {"version": versions.get(path, 1)} for path, _ in model.named_modules(remove_duplicate=False)
        }
    return state
