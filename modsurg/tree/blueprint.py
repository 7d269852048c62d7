"""A module tree as plain data, and back: what a whole-model file says of a model besides its weights.

    {"version": 1,
     "names": ["torch.nn.modules.linear:Linear", ...],        every class and function that the tree asks for
     "attributes": [{"training": true, "in_features": 4}],    attributes that several modules have alike
     "shared": [...],                                         mutable objects that are reached more than once
     "tensors": [{"name": "0.weight", "dtype": "float32", "shape": [8, 4], "parameter": true}, ...],
     "modules": [{"class": 0, "attributes": 0, "parameters": {"weight": 0, "bias": 1}}, ...,
                 {"class": 1, "attributes": {...}, "children": {"0": 0, "1": 1}}]}

Modules and tensors are numbered; a number that stands at two places is one object there. Children come before their
parents, so that the last module is the root and no tree can hold itself. `values` says how attributes are written.
"""

import json
import re
import types
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from modsurg.errors import FormatError, SaveError, TrustError
from modsurg.tree.frozen import Held
from modsurg.tree.outline import VERSION, checked
from modsurg.tree.slots import attributes, fresh_slots, is_attribute, methods, pack_hooks, reparametrize, unpack_hooks
from modsurg.tree.tensors import TensorTable, make_tensors
from modsurg.tree.trust import Renames, Trust, Trusted, qualified_name
from modsurg.tree.unpacking import Unpacker, set_attributes
from modsurg.tree.values import Packer
from modsurg.tree.walk import walk
from modsurg.tree.wrappers import unwrap, wrapper_kind


@dataclass(frozen=True, slots=True)
class Blueprint:
    """A model taken apart.

    Attributes:
        data: The tree, JSON-able.
        state: The state_dict, tied tensors under each of their names, and after it the tensors that the tree names and
            the state_dict does not know.
    """

    data: dict[str, Any]
    state: "OrderedDict[str, Any]"


def describe(module: nn.Module) -> dict[str, Any]:
    """The structure of a model as JSON-able data, without its weights.

    Args:
        module: Any model. A torch.compile wrapper is looked through.

    Raises:
        SaveError: Something that no data can stand for (a lambda, an open file), all of it, each by its path.

    Example:
        >>> data = describe(nn.Linear(2, 3))
        >>> data["names"], data["modules"][0]["parameters"]
        (['torch.nn.modules.linear:Linear'], {'weight': 0, 'bias': 1})
    """
    return draw(module).data


def draw(module: nn.Module) -> Blueprint:
    """Take a model apart into its structure and its state; see `describe`."""
    root = unwrap(module)
    order = _children_first(root)
    known = root.state_dict(keep_vars=True)
    state = OrderedDict((key.replace("_orig_mod.", ""), value) for key, value in known.items())
    state.__dict__.update(vars(known))  # the versions of the modules
    names: dict[int, str] = {}
    for key, value in state.items():
        names.setdefault(id(value), key)
    drawing = _Drawing(order, TensorTable(names))
    data = drawing.data()
    for tensor, entry in zip(drawing.table.tensors, data["tensors"], strict=True):
        if "name" in entry:
            state.setdefault(entry["name"], tensor)
    return Blueprint(data, state)


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
        values: The tensors in the state of `draw`, used as they are. Without them parameters and buffers are empty, on
            the meta device.

    Raises:
        TrustError: Classes or functions that are not trusted, all of them; nothing was imported.
        FormatError: Data that `describe` does not write.

    Example:
        >>> build(describe(nn.Linear(2, 3)))
        Linear(in_features=2, out_features=3, bias=True)
    """
    checked(data)
    if "partial" in data:
        raise FormatError("its tree was taken from a pickle to be looked at: open the .pt itself with load_model")
    names = Trust(trust, rename).resolve(data["names"])
    try:
        return _Building(data, names, make_tensors(data["tensors"], names, values)).module()
    except (FormatError, TrustError):
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError, re.error) as error:
        raise FormatError(f"the tree is damaged: {type(error).__name__}: {error}") from error


class _Drawing:
    """One model being described."""

    def __init__(self, order: list[nn.Module], table: TensorTable) -> None:
        tree = walk(order[-1])
        self.table = table
        self._all = tree.modules.values()
        self._paths = {number: paths[0].replace("_orig_mod", "").strip(".") for number, paths in tree.paths.items()}
        self._order = order
        numbers = {id(module): number for number, module in enumerate(order)}
        self._numbers = {id(module): numbers[id(unwrap(module))] for module in self._all}
        self._packer = Packer(self._numbers, table.number)
        self._alike: dict[str, int] = {}
        self._methods: dict[type, set[str]] = {}

    def data(self) -> dict[str, Any]:
        """The whole tree as data."""
        for module in self._all:  # first, so that tensors are in the order of the state_dict
            self._slots(module)
        modules = [self._node(module) for module in self._order]
        details = self._tensor_details()
        self._raise_problems()
        tensors = [{**entry, **more} for entry, more in zip(self.table.entries(), details, strict=True)]
        self._raise_problems()
        return {
            "version": VERSION,
            "names": list(self._packer.names),
            "attributes": [json.loads(text) for text in self._alike],
            "shared": self._packer.shared,
            "tensors": tensors,
            "modules": modules,
        }

    def _raise_problems(self) -> None:
        problems = sorted({*self._packer.problems, *self.table.problems})
        if problems:
            count = f"{len(problems)} thing{'s' * (len(problems) > 1)}"
            raise SaveError("\n  ".join([f"{count} can't be kept; nothing was written.", *problems]))

    def _slots(self, module: nn.Module) -> dict[str, dict[str, int | None]]:
        path = self._paths[id(module)]
        return {
            kind: {
                name: None if tensor is None else self.table.number(tensor, f"{path}.{name}".strip("."))
                for name, tensor in slots.items()
            }
            for kind, slots in (("parameters", module._parameters), ("buffers", module._buffers))
            if slots
        }

    def _node(self, module: nn.Module) -> dict[str, Any]:
        path = self._paths[id(module)]
        if self._refuses(module, path):
            return {}
        kind = parametrize.type_before_parametrizations(module)
        name = qualified_name(kind) or f"{kind.__module__}:{kind.__qualname__}"
        names = self._packer.names
        children = {key: None if child is None else self._numbers[id(child)] for key, child in module._modules.items()}
        hooks = pack_hooks(module, self._packer, path or kind.__name__)
        parametrized = list(module.parametrizations) if parametrize.is_parametrized(module) else []  # type: ignore[arg-type]  # a ModuleDict
        parts = {
            "children": children,
            "transient": sorted(module._non_persistent_buffers_set),
            "hooks": hooks,
            "parametrized": parametrized,
        }
        return {
            "class": names.setdefault(name, len(names)),
            "attributes": self._attributes(module, kind, path),
            **self._slots(module),
            **{part: value for part, value in parts.items() if value},
        }

    def _attributes(self, module: nn.Module, kind: type, path: str) -> int | dict[str, Any]:
        before = self._packer.marks
        held = attributes(module)
        for name in self._methods.setdefault(kind, methods(kind)) & held.keys():
            if not _is_own_method(held[name], module):
                self._packer.refuse(f"{path}.{name}".strip("."), "a method replaced on this object", "use a subclass")
                del held[name]
        packed = {name: self._packer.pack(value, f"{path}.{name}".strip(".")) for name, value in held.items()}
        if self._packer.marks > before:
            return packed
        return self._alike.setdefault(json.dumps(packed), len(self._alike))

    def _refuses(self, module: nn.Module, path: str) -> bool:
        """Whether this is a wrapper that owns what is in it."""
        kind = "torch.fx" if isinstance(module, torch.fx.GraphModule) else wrapper_kind(module)
        if kind is None:
            return False
        remedy = {
            "torch.fx": "save the model that it was traced from, or its state with save_state",
            "ScriptModule": "keep it with torch.jit.save, or its state with save_state",
            "FSDP2": "keep its state with save_state",
        }.get(kind, "save the module inside it, .module")
        self._packer.refuse(path or "the model", f"a {kind} module", remedy)
        return True

    def _tensor_details(self) -> list[dict[str, Any]]:
        """The class of each tensor where it is not torch's own, and the attributes that somebody put on it."""
        details: list[dict[str, Any]] = []
        while len(details) < len(self.table.tensors):  # an attribute may be another tensor
            tensor = self.table.tensors[len(details)]
            place = f"tensor {len(details)}"
            more: dict[str, Any] = {}
            if type(tensor) not in (torch.Tensor, nn.Parameter):
                more["class"] = self._packer.name(type(tensor), place)
            if tensor.__dict__:
                more["state"] = {
                    name: self._packer.pack(value, f"{place}.{name}") for name, value in vars(tensor).items()
                }
            details.append(more)
        return details


def _children_first(root: nn.Module) -> list[nn.Module]:
    """Every module once, children before their parents; torch.compile wrappers looked through."""
    order: dict[int, nn.Module] = {}
    open_: set[int] = set()
    stack = [root]
    while stack:
        module = unwrap(stack[-1])
        if id(module) in order:
            stack.pop()
        elif id(module) in open_:
            order[id(module)] = module
            stack.pop()
        else:
            open_.add(id(module))
            children = [unwrap(child) for child in module._modules.values() if child is not None]
            if any(id(child) in open_ and id(child) not in order for child in children):
                raise SaveError(f"a {type(module).__name__} holds itself by way of its children")
            stack.extend(reversed(children))
    return list(order.values())


def _is_own_method(value: object, module: nn.Module) -> bool:
    if isinstance(value, Held):
        return value.module is module
    return isinstance(value, types.MethodType) and value.__self__ is module


class _Building:
    """One model being built."""

    def __init__(self, data: Mapping[str, Any], names: list[object], tensors: list[torch.Tensor]) -> None:
        self._data = data
        self._tensors = tensors
        self._kinds = [_module_class(names[node["class"]]) for node in data["modules"]]
        self._modules: list[nn.Module] = [object.__new__(kind) for kind in self._kinds]
        self._unpacker = Unpacker(names, self._modules, tensors, data["shared"])
        self._forbidden = {kind: methods(kind) for kind in set(self._kinds)}

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
        return self._modules[-1]

    def _unpack(self, attributes: Mapping[str, Any]) -> dict[str, Any]:
        return {name: self._unpacker.unpack(value) for name, value in attributes.items()}

    def _set(self, module: nn.Module, attributes: Mapping[str, Any]) -> None:
        for name in self._forbidden[type(module)] & attributes.keys():
            if not _is_own_method(attributes[name], module):
                raise TrustError(f"the file replaces {name!r} of a {type(module).__name__}; nothing of it ran")
        for name in attributes:
            if not is_attribute(name):
                raise FormatError(f"{name!r} of a {type(module).__name__}, which belongs to nn.Module itself")
        module.__dict__.update(attributes)

    def _fill(self, module: nn.Module, node: Mapping[str, Any]) -> None:
        for kind, slots, objects in (
            ("parameters", module._parameters, self._tensors),
            ("buffers", module._buffers, self._tensors),
            ("children", module._modules, self._modules),
        ):
            for name, number in node.get(kind, {}).items():
                slots[name] = None if number is None else objects[number]
        module._non_persistent_buffers_set.update(node.get("transient", ()))
        if "hooks" in node:
            unpack_hooks(module, node["hooks"], self._unpacker)


def _module_class(kind: object) -> type[nn.Module]:
    if not isinstance(kind, type) or not issubclass(kind, nn.Module):
        raise FormatError(f"{kind!r:.80} as the class of a module")
    return kind
