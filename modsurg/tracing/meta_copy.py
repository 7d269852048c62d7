"""A second model like the first: every module, container and plain object anew, tensors on meta or copied."""

import copy
import itertools
import random
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from types import CellType, FunctionType, MethodType, SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from modsurg.tree.wrappers import unwrap, wrapper_kind

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
SMALL = 1 << 16
_SPARSE = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
_ATOMS = (type(None), bool, int, float, complex, str, bytes, type, torch.dtype, torch.device, torch.Size, torch.layout)


class _Passthrough(nn.Module):
    """Stands for a wrapper (torch.compile, DDP) inside a copied model: it only calls what it holds."""

    def __init__(self, name: str, inner: nn.Module) -> None:
        super().__init__()
        self.add_module(name, inner)

    def forward(self, *args: object, **kwargs: object) -> object:
        (inner,) = self._modules.values()
        assert inner is not None
        return inner(*args, **kwargs)


def inner_name(module: nn.Module) -> str | None:
    """The name under which a wrapper holds its model: `_orig_mod` for torch.compile, `module` for data parallel."""
    if unwrap(module) is not module:
        return "_orig_mod"
    return "module" if wrapper_kind(module) in ("DDP", "DataParallel") else None


def modules_of(model: nn.Module) -> Iterator[nn.Module]:
    """Every module object once, without recursion, however deep the tree is."""
    seen: set[int] = set()
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if id(module) not in seen:
            seen.add(id(module))
            yield module
            if isinstance(module, torch.jit.ScriptModule):
                continue
            waiting += [child for child in module._modules.values() if child is not None]


def is_own_hook(hook: object) -> bool:
    """Whether torch.nn itself put the hook there: weight and spectral norm, pruning, lazy modules."""
    owner = getattr(hook, "__func__", hook)
    if not isinstance(owner, FunctionType):
        owner = type(owner)
    return owner.__module__.startswith("torch.nn.")


class ScriptedModule(nn.Module):
    """Stands for TorchScript on meta, where it can't run."""

    def forward(self, *args: object, **kwargs: object) -> object:
        """Never runs."""
        raise NotImplementedError("TorchScript does not run on meta tensors")


class Cloner:
    """Copies a model, and whatever else belongs to it, once for each object.

    Hooks are dropped, but for those by which torch.nn implements a layer. What can't be copied (a lock, an open file, a
    compiled object) is shared.

    Args:
        tensor: Makes the copy of a tensor: `to_meta` holds nothing, `to_real` has the same values.
    """

    def __init__(self, tensor: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._tensor = tensor
        self._memo: dict[int, Any] = {}
        self._kept: list[object] = []

    def model(self, model: nn.Module) -> nn.Module:
        """The copy of a whole tree."""
        fresh = [module for module in modules_of(model) if id(module) not in self._memo]
        for module in fresh:
            self._remember(module, self._shell(module))
        for module in fresh:
            if not isinstance(module, torch.jit.ScriptModule):
                self._fill(module, self._memo[id(module)])
        copied: nn.Module = self._memo[id(model)]
        return copied

    def _shell(self, module: nn.Module) -> nn.Module:
        if isinstance(module, torch.jit.ScriptModule):
            return ScriptedModule() if self._tensor is to_meta else copy.deepcopy(module)
        kind = _Passthrough if inner_name(module) else type(module)
        return object.__new__(kind)

    def value(self, value: Any) -> Any:
        """The copy of anything that a model may hold, or be given."""
        if type(value) in weakref.ProxyTypes:  # before anything else: a dead one can't even be asked for its class
            return self._proxy(value)
        if isinstance(value, _ATOMS):
            return value
        if id(value) not in self._memo:
            self._copy(value)
        return self._memo[id(value)]

    def _proxy(self, value: Any) -> Any:
        try:
            referent = value.__init__.__self__
        except ReferenceError:
            return value
        copied = self.value(referent)
        return value if copied is referent else weakref.proxy(copied)

    def _remember(self, old: object, new: object) -> None:
        self._memo[id(old)] = new
        self._kept.append(old)

    def _fill(self, old: nn.Module, new: nn.Module) -> None:
        state = vars(new)
        name = inner_name(old)
        if name:
            _Passthrough.__init__(new, name, self._memo[id(old._modules[name])])  # type: ignore[arg-type]  # made above
            new.training = old.training
            return
        held = dict(vars(old))
        for key in _HOOKS:
            if key in held:
                kept = type(held[key])((number, hook) for number, hook in held[key].items() if is_own_hook(hook))
                self._remember(held[key], kept)
                for number, hook in kept.items():
                    kept[number] = self.value(hook)
        if "_hf_hook" in held and "_old_forward" in held:
            held["forward"] = held["_old_forward"]
        for key, value in held.items():
            state[key] = None if key == "_compiled_call_impl" else self.value(value)

    def _copy(self, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            new = self._tensor(value)
            self._remember(value, new)
            if vars(value):
                vars(new).update(self.value(dict(vars(value))))
        elif isinstance(value, nn.Module):
            self.model(value)
        elif isinstance(value, tuple):
            items = [self.value(item) for item in value]
            same = all(a is b for a, b in zip(items, value, strict=True))
            self._remember(value, value if same else _rebuilt(value, items))
        elif isinstance(value, (dict, list, deque, set)):
            self._container(value)
        elif isinstance(value, (MethodType, partial, weakref.ref, FunctionType)):
            self._remember(value, self._callable(value))
        elif isinstance(value, (random.Random, itertools.count)) or type(value).__module__.startswith("numpy.random"):
            self._remember(value, _generator(value))
        elif type(value).__module__.partition(".")[0] == "numpy" and hasattr(value, "setflags"):
            self._remember(value, _array(value))
        elif isinstance(value, torch.Generator):
            self._remember(value, value.clone_state())
        else:
            self._object(value)

    def _container(self, value: Any) -> None:
        try:
            new = copy.copy(value)
        except Exception:  # a container that can't be copied is shared, like any other object
            self._remember(value, value)
            return
        self._remember(value, new)
        if isinstance(new, dict):
            for key, item in value.items():
                new[key] = self.value(item)
        elif isinstance(new, set):
            new.clear()
            new.update(self.value(item) for item in value)
        else:
            for index, item in enumerate(value):
                new[index] = self.value(item)

    def _callable(self, value: Any) -> Any:
        if isinstance(value, MethodType):
            owner = self.value(value.__self__)
            return value if owner is value.__self__ else MethodType(value.__func__, owner)
        if isinstance(value, partial):
            return partial(self.value(value.func), *map(self.value, value.args), **self.value(value.keywords))
        if isinstance(value, weakref.ref):
            referent = value()
            copied = self.value(referent)
            return value if copied is referent else weakref.ref(copied)
        return self._function(value)

    def _function(self, value: FunctionType) -> FunctionType:
        """The same code over copied closure cells; the same object where the closure holds nothing of the model."""
        cells = value.__closure__ or ()
        if not cells and not value.__defaults__:
            return value
        self._memo[id(value)] = value
        held = [self.value(cell.cell_contents) if _is_full(cell) else None for cell in cells]
        defaults = self.value(value.__defaults__)
        same = all(not _is_full(cell) or cell.cell_contents is item for cell, item in zip(cells, held, strict=True))
        if same and defaults is value.__defaults__:
            return value
        closure = tuple(CellType(item) if _is_full(cell) else cell for cell, item in zip(cells, held, strict=True))
        new = FunctionType(value.__code__, value.__globals__, value.__name__, defaults, closure)
        new.__kwdefaults__ = value.__kwdefaults__
        vars(new).update({key: item for key, item in vars(value).items() if key != "__wrapped__"})
        return new

    def _object(self, value: Any) -> None:
        kind = type(value)
        ours = kind.__module__.partition(".")[0] not in sys.stdlib_module_names or kind is SimpleNamespace
        plain = kind is SimpleNamespace or all(
            getattr(kind, name) is getattr(object, name) for name in ("__reduce_ex__", "__reduce__")
        )
        if (
            not (ours and plain and hasattr(value, "__dict__"))
            or hasattr(kind, "__del__")
            or hasattr(kind, "__deepcopy__")
        ):
            self._remember(value, value)
            return
        try:
            new = copy.copy(value)
        except Exception:
            self._remember(value, value)
            return
        self._remember(value, new)
        for key, item in vars(value).items():
            vars(new)[key] = self.value(item)


def _is_full(cell: CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _generator(value: Any) -> Any:
    try:
        return copy.deepcopy(value)
    except Exception:  # the system's own has no state to copy
        return value


def _array(value: Any) -> Any:
    """A copy where it costs little; else a view, by which what a forward writes does not get into the model."""
    if value.nbytes <= SMALL:
        return value.copy()
    view = value.view()
    view.setflags(write=False)
    return view


def _rebuilt(old: tuple[Any, ...], items: list[Any]) -> Any:
    return type(old)(*items) if hasattr(old, "_fields") else type(old)(items)


def to_meta(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same shape, strides and dtype that holds nothing; a sharded one has its outer shape."""
    if is_lazy(tensor):
        return _lazy(tensor, torch.device("meta"))
    if tensor.is_nested:
        raise NotImplementedError("a nested tensor has no copy on meta")
    plain = type(tensor) in (torch.Tensor, nn.Parameter, nn.Buffer) and tensor.layout is torch.strided
    if tensor.layout in _SPARSE:
        new = tensor.detach().to("meta")  # it stays sparse, so that no product of it is taken for a dense one
    elif plain and not tensor.is_quantized:
        new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    else:
        new = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(new, requires_grad=tensor.requires_grad)
    return new


def to_example(tensor: torch.Tensor) -> torch.Tensor:
    """What a shadow is given: a few whole numbers keep their values (a mask may be asked whether it is full)."""
    small = tensor.numel() <= SMALL and not tensor.is_meta and tensor.layout is torch.strided
    if small and not (tensor.is_floating_point() or tensor.is_complex() or tensor.is_quantized):
        return tensor.detach().to("cpu", copy=True)
    return to_meta(tensor).requires_grad_(tensor.requires_grad)


def to_real(tensor: torch.Tensor) -> torch.Tensor:
    """A second tensor with the same values, on the same device, outside of any graph."""
    if is_lazy(tensor):
        return _lazy(tensor, tensor.device)
    new = tensor.detach().clone()
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(new, requires_grad=tensor.requires_grad)
    return new.requires_grad_(tensor.requires_grad)


def _lazy(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    kind: Callable[..., torch.Tensor] = type(tensor)
    return kind(tensor.requires_grad, device=device, dtype=tensor.data.dtype)
