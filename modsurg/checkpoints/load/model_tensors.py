"""The places of a model that a state fills: every parameter, persistent buffer and extra state, by its key."""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from modsurg.checkpoints.formats.documents import EXTRA_STATE
from modsurg.errors import LoadError
from modsurg.tree.walk import walk

_METHODS = ("_load_from_state_dict", "_save_to_state_dict", "load_state_dict", "state_dict")
_HOOKS = ("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "_state_dict_hooks")
_MIGRATING = ("torch.nn.", "torchvision.")


@dataclass(slots=True)
class ModelTensor:
    """One tensor of a model.

    Attributes:
        name: Its key in the state_dict.
        module: The module that holds it.
        attribute: Its name there.
        tensor: The parameter or buffer.
    """

    name: str
    module: nn.Module
    attribute: str
    tensor: torch.Tensor


@dataclass(frozen=True)
class ModelTensors:
    """All the places of a model.

    Attributes:
        tensors: Key -> tensor, in the order of the state_dict.
        extra: Key -> module with a `set_extra_state` of its own.
        custom: Paths of modules that load in their own way.
        migrating: Paths of modules of torch and torchvision that only translate the keys of older versions.
        unfilled: Meta tensors that no state holds: non-persistent buffers, and tensors in plain attributes.
        model: The model.
    """

    tensors: Mapping[str, ModelTensor]
    extra: Mapping[str, nn.Module]
    custom: list[str]
    migrating: list[str]
    unfilled: list[str]
    model: nn.Module

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor; None for extra state, and for a lazy tensor."""
        target = self.tensors.get(name)
        return None if target is None or is_lazy(target.tensor) else tuple(target.tensor.shape)


def find_targets(model: nn.Module) -> ModelTensors:
    """Collect the places of a model.

    Raises:
        LoadError: A tensor whose values are not in one place (DTensor).
    """
    found = ModelTensors({}, {}, [], [], [], model)
    tensors: dict[str, ModelTensor] = {}
    extra: dict[str, nn.Module] = {}
    for path, module in walk(model).modules.items():
        prefix = f"{path}." if path else ""
        for name, tensor in _own_tensors(module):
            if tensor.is_meta and name in module._non_persistent_buffers_set:
                found.unfilled.append(prefix + name)
            if name not in module._non_persistent_buffers_set:
                tensors[prefix + name] = _checked(ModelTensor(prefix + name, module, name, tensor))
        found.unfilled.extend(
            prefix + name for name, value in vars(module).items() if isinstance(value, torch.Tensor) and value.is_meta
        )
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            extra[prefix + EXTRA_STATE] = module
        owners = list(find_loading_code(module))
        if owners:
            ours = all(owner.startswith(_MIGRATING) for owner in owners)
            (found.migrating if ours else found.custom).append(path)
    return ModelTensors(tensors, extra, found.custom, found.migrating, found.unfilled, model)


def fill_meta(targets: Iterable[ModelTensor]) -> Callable[[Container[str] | None], None]:
    """Give memory to those targets that are on meta; what was tied or a view stays so.

    Returns:
        What puts the old ones back: those of some names, or all (None).
    """
    storages: dict[int, torch.UntypedStorage] = {}
    made: dict[int, torch.Tensor] = {}
    before: list[tuple[ModelTensor, torch.Tensor]] = []
    for target in targets:
        old = target.tensor
        if not old.is_meta:
            continue
        before.append((target, old))
        if id(old) not in made:
            storage = old.untyped_storage()
            if storage._cdata not in storages:
                storages[storage._cdata] = torch.empty(
                    storage.nbytes(), dtype=torch.uint8, device="cpu"
                ).untyped_storage()
            made[id(old)] = _on_storage(old, storages[storage._cdata])
        _put(target, made[id(old)])

    def undo(names: Container[str] | None) -> None:
        for target, old in before:
            if names is None or target.name in names:
                _put(target, old)

    return undo


def shared_groups(targets: Iterable[ModelTensor]) -> list[list[ModelTensor]]:
    """Tensors of the model that have memory in common, in groups of two or more; one alone if it overlaps itself."""
    spans: dict[int, list[tuple[int, int, ModelTensor]]] = {}
    for target in targets:
        tensor = target.tensor
        if not is_lazy(tensor) and tensor.numel() and tensor.layout is torch.strided:
            start = tensor.storage_offset() * tensor.element_size()
            reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            span = (int(start), int(start + (reach + 1) * tensor.element_size()), target)
            spans.setdefault(tensor.untyped_storage()._cdata, []).append(span)
    groups = []
    for members in spans.values():
        members.sort(key=lambda span: span[:2])
        group: list[ModelTensor] = []
        end = -1
        for start, stop, target in members:
            if start >= end and group:
                groups.append(group)
                group = []
            group.append(target)
            end = max(end, stop)
        groups.append(group)
    return [group for group in groups if len(group) > 1 or overlaps_itself(group[0].tensor)]


def overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether two elements of the tensor may have the same address, as after `expand`."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += (size - 1) * stride
    return False


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for table in (module._parameters, module._buffers):
        for name, tensor in table.items():
            if tensor is not None:
                yield name, tensor


def _checked(target: ModelTensor) -> ModelTensor:
    kind = type(target.tensor)
    if kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise LoadError(
            f"{target.name} is a {kind.__name__}, whose values are not in one place; nothing was loaded. "
            "Load before sharding, or use load_checkpoint"
        )
    return target


def find_loading_code(module: nn.Module) -> Iterator[str]:
    """The homes of all code that takes part in loading this module, torch's base class apart."""
    for method in _METHODS:
        function: Any = getattr(type(module), method)
        if function not in (getattr(nn.Module, method), nn.modules.batchnorm._NormBase._load_from_state_dict):
            yield function.__module__
    for table in _HOOKS:
        for hook in vars(module).get(table, {}).values():
            function = getattr(hook, "hook", hook)
            yield getattr(function, "__module__", "")
    if any(tensor is not None and is_lazy(tensor) for tensor in module._parameters.values()):
        yield ""  # its shapes are the file's, so torch's own hooks set them


def _on_storage(old: torch.Tensor, storage: torch.UntypedStorage) -> torch.Tensor:
    with torch.no_grad():
        new = torch.empty(0, dtype=old.dtype, device="cpu")
        new.set_(storage, old.storage_offset(), old.size(), old.stride())
        typed = torch.Tensor._make_subclass(type(old), new, old.requires_grad)
    vars(typed).update(vars(old))
    return typed


def _put(target: ModelTensor, tensor: torch.Tensor) -> None:
    target.tensor = tensor
    setattr(target.module, target.attribute, tensor)
