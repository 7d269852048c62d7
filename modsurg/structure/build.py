"""A module tree as plain data, and back: what a whole-model file says of a model besides its weights.

Modules and tensors are numbered; one that is at two places has one number. Children come before their parents, so that
no tree can hold itself. `docs/guides/file-format.md` describes the tables, `encode` the values.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from modsurg.errors import FormatError
from modsurg.structure.decode import Unpacker, check_child_name, set_attributes
from modsurg.structure.describe import ModelDescriber, children_first, may_replace
from modsurg.structure.module_state import (
    SLOTS,
    add_norm_hooks,
    fresh_slots,
    is_attribute,
    reparametrize,
)
from modsurg.structure.schema import checked, sound
from modsurg.structure.tensors import TensorTable, make_tensors
from modsurg.structure.trust import Renames, Trust, Trusted
from modsurg.tree.wrappers import unwrap


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """A model as data: its structure and its state.

    Attributes:
        data: The tree, JSON-able.
        state: The state_dict, tied tensors under each of their names, and after it the tensors that the tree names and
            the state_dict does not have.
    """

    data: dict[str, Any]
    state: "OrderedDict[str, Any]"


def describe(module: nn.Module) -> ModelDescription:
    """Take a model apart into its structure, as JSON-able data, and its state.

    Args:
        module: Any model. A torch.compile wrapper is looked through.

    Raises:
        SaveError: Values that a file can not hold (a lambda, an open file), all of them, each by its path.

    Example:
        >>> data = describe(nn.Linear(2, 3)).data
        >>> data["names"], data["modules"][0]["parameters"]
        (['torch.nn.modules.linear:Linear'], {'weight': 0, 'bias': 1})
    """
    root = unwrap(module)
    order = children_first(root)
    known = root.state_dict(keep_vars=True)
    state = OrderedDict((key.replace("_orig_mod.", ""), value) for key, value in known.items())
    state.__dict__.update(vars(known))  # the versions of the modules
    names: dict[int, str] = {}
    for key, value in state.items():
        names.setdefault(id(value), key)
    describer = ModelDescriber(order, TensorTable(names))
    data = describer.data()
    for tensor, entry in zip(describer.table.tensors, data["tensors"], strict=True):
        if "name" in entry:
            state.setdefault(entry["name"], tensor)
    return ModelDescription(data, state)


def build(
    data: Mapping[str, Any],
    trust: Trusted = (),
    rename: Renames | None = None,
    values: Mapping[str, torch.Tensor] | None = None,
) -> nn.Module:
    """Build a model from its description. No constructor is called, and nothing is initialised.

    Args:
        data: What `describe` gave, also by way of JSON.
        trust: Packages and classes besides torch.nn and torchvision, as in `load_model`.
        rename: Old dotted name -> the class that took its place, as in `load_model`.
        values: The tensors in the state of `describe`, used as they are. Without them parameters and buffers are
            empty, on the meta device.

    Raises:
        TrustError: Classes or functions that are not trusted, all of them; nothing was imported.
        FormatError: Data that `describe` does not write.

    Example:
        >>> build(describe(nn.Linear(2, 3)).data)
        Linear(in_features=2, out_features=3, bias=True)
    """
    checked(data)
    if "partial" in data:
        raise FormatError("its tree comes from a pickle and is not complete. Try: load_model of the .pt file itself")
    names = Trust(trust, rename).resolve(data["names"])
    with sound():
        return _Building(data, names, make_tensors(data["tensors"], values)).module()


class _Building:
    """One model being built."""

    def __init__(self, data: Mapping[str, Any], names: list[object], tensors: list[torch.Tensor]) -> None:
        self._data = data
        self._tensors = tensors
        self._kinds = [_module_class(names[node["class"]]) for node in data["modules"]]
        self._modules: list[nn.Module] = [object.__new__(kind) for kind in self._kinds]
        self._unpacker = Unpacker(names, self._modules, tensors, data["shared"])

    def module(self) -> nn.Module:
        """The root, with everything in its place."""
        for module in self._modules:
            module.__dict__.update(fresh_slots())
        alike = [self._unpack(attributes) for attributes in self._data["attributes"]]
        for module, node in zip(self._modules, self._data["modules"], strict=True):
            attributes = node["attributes"]
            self._set(module, alike[attributes] if isinstance(attributes, int) else self._unpack(attributes))
            self._fill(module, node)
        for tensor, entry in zip(self._tensors, self._data["tensors"], strict=True):
            if "state" in entry:
                set_attributes(tensor, self._unpack(entry["state"]))
        for module, node in zip(self._modules, self._data["modules"], strict=True):
            reparametrize(module, node.get("parametrized", ()))
        self._unpacker.check_objects()
        root: int = self._data["root"]
        return self._modules[root]

    def _unpack(self, attributes: Mapping[str, Any]) -> dict[str, Any]:
        return {name: self._unpacker.unpack(value) for name, value in attributes.items()}

    def _set(self, module: nn.Module, attributes: dict[str, Any]) -> None:
        for name, value in attributes.items():
            if not is_attribute(name):
                raise FormatError(f"{name!r:.80} of a {type(module).__name__}, which belongs to nn.Module itself")
            if name in SLOTS and type(value) is not bool:
                raise FormatError(f"{name!r} of a {type(module).__name__} must be true or false")
        locks = {name: value for name, value in attributes.items() if may_replace(name, value, module)}
        set_attributes(module, {name: value for name, value in attributes.items() if name not in locks})
        module.__dict__.update(locks)

    def _fill(self, module: nn.Module, node: Mapping[str, Any]) -> None:
        used: set[str] = set()
        for kind, slots, objects in (
            ("parameters", module._parameters, self._tensors),
            ("buffers", module._buffers, self._tensors),
            ("children", module._modules, self._modules),
        ):
            for name, number in node.get(kind, {}).items():
                check_child_name(type(module), name)
                if name in module.__dict__ or name in used:
                    raise FormatError(f"{name!r:.80} twice in a {type(module).__name__}")
                used.add(name)
                slots[name] = None if number is None else objects[number]
        module._non_persistent_buffers_set.update(node.get("transient", ()))
        add_norm_hooks(module, node.get("hooks", ()))


def _module_class(kind: object) -> type[nn.Module]:
    if not isinstance(kind, type) or not issubclass(kind, nn.Module):
        raise FormatError(f"{kind!r:.80} as the class of a module")
    return kind
