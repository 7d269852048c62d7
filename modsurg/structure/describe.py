"""One model being described: every module, tensor and value gets its number and its line."""

import itertools
import types
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from modsurg.errors import FormatError, SaveError, TrustError, counted
from modsurg.structure.decode import check_child_name
from modsurg.structure.encode import Packer, attributes
from modsurg.structure.module_state import describe_norm_hooks, is_kept
from modsurg.structure.tensors import TensorTable
from modsurg.structure.trust import qualified_name
from modsurg.tree.eval_lock import EvalLock
from modsurg.tree.walk import walk
from modsurg.tree.wrappers import unwrap, wrapper_kind


class ModelDescriber:
    """A model, and what has been said of it so far.

    Args:
        order: Its modules, as `children_first` gives them.
        table: Takes the tensors.
    """

    def __init__(self, order: list[nn.Module], table: TensorTable) -> None:
        tree = walk(order[-1])
        self.table = table
        self._all = tree.modules.values()
        self._paths = {number: paths[0].replace("._orig_mod", "") for number, paths in tree.paths.items()}
        self._order = order
        numbers = {id(module): number for number, module in enumerate(order)}
        self._numbers = {id(module): numbers[id(unwrap(module))] for module in self._all}
        self._root = len(order) - 1
        self._packer = Packer(self)

    def data(self) -> dict[str, Any]:
        """The whole tree as data."""
        for module in self._all:  # first, so that tensors are in the order of the state_dict
            self._slots(module)
        modules: list[dict[str, Any]] = []
        while len(modules) < len(self._order):  # an attribute may bring in a module from outside the tree
            modules.append(self._node(self._order[len(modules)]))
        details = self._tensor_details()
        self._packer.check_objects()
        self._raise_problems()
        tensors = [{**entry, **more} for entry, more in zip(self.table.entries(), details, strict=True)]
        self._raise_problems()
        return {
            **self._packer.tables(),
            "tensors": tensors,
            "modules": modules,
            "root": self._root,
        }

    def module(self, module: nn.Module, path: str) -> int:
        """The number of a module; one from outside the tree (in a plain list) comes in with all that it holds."""
        if id(module) not in self._numbers:
            for inner in children_first(unwrap(module)):
                if id(inner) not in self._numbers:
                    self._numbers[id(inner)] = len(self._order)
                    self._order.append(inner)
            for name, inner in walk(module).modules.items():
                self._numbers.setdefault(id(inner), self._numbers[id(unwrap(inner))])
                self._paths.setdefault(id(inner), f"{path}.{name}".strip("."))
        return self._numbers[id(module)]

    def tensor(self, tensor: torch.Tensor, path: str) -> int:
        """The number of a tensor."""
        return self.table.number(tensor, path)

    def _raise_problems(self) -> None:
        problems = sorted({*self._packer.problems, *self.table.problems})
        if problems:
            count = counted(len(problems), "thing", "things")
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
        self._check_names(module, kind, path)
        names = self._packer.names
        children = {key: None if child is None else self._numbers[id(child)] for key, child in module._modules.items()}
        hooks, others = describe_norm_hooks(module)
        for table in others:
            what = f"a hook ({table.strip('_').removesuffix('s').replace('_', ' ')})"
            self._packer.refuse(path or kind.__name__, what, "remove it, and register it again after loading")
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

    def _check_names(self, module: nn.Module, kind: type, path: str) -> None:
        for name in (*module._modules, *module._parameters, *module._buffers):
            try:
                check_child_name(kind, name)
            except (FormatError, TrustError):
                self._packer.refuse(f"{path}.{name}".strip("."), "a name that a file can't hold", "rename it")

    def _attributes(self, module: nn.Module, kind: type, path: str) -> int | dict[str, Any]:
        held = {
            name: value
            for name, value in attributes(module).items()
            if is_kept(name, value) and (may_replace(name, value, module) or self._packer.may_have(kind, name, path))
        }
        return self._packer.share_attributes(held, path)

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
        """The attributes that somebody put on each tensor."""
        details: list[dict[str, Any]] = []
        while len(details) < len(self.table.tensors):  # an attribute may be another tensor
            held = vars(self.table.tensors[len(details)])
            details.append({"state": self._packer.pack_attributes(held, f"tensor {len(details)}")} if held else {})
        return details


def children_first(root: nn.Module) -> list[nn.Module]:
    """Every module once, children before their parents; torch.compile wrappers looked through.

    Raises:
        SaveError: A module that holds itself.
    """
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
            for child in children:
                if id(child) in open_ and id(child) not in order:
                    around = [each for each in stack if id(each) in open_ and id(each) not in order]
                    raise SaveError(_endless([*map(unwrap, around), child]))
            stack.extend(reversed(children))
    return list(order.values())


def _endless(chain: list[nn.Module]) -> str:
    """What to say of modules each of which holds the next, when the last one holds the others."""
    steps = itertools.pairwise(chain)
    names = [name for outer, inner in steps for name, child in outer._modules.items() if child is inner]
    path = ".".join(names)
    return f"{path} leads back to a {type(chain[-1]).__name__} that it lies in: keep the way back in a list, [module]"


def may_replace(name: str, value: object, module: nn.Module) -> bool:
    """Whether this may stand before a method of the module: what `freeze` puts there, or another forward of its own."""
    if type(value) is EvalLock:
        return name == "train" and value.module is module
    own = type(value) is types.MethodType and value.__self__ is module
    return own and name == "forward" and value.__func__.__name__.startswith("forward_")  # type: ignore[attr-defined]  # a method
