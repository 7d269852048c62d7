"""What nn.Module itself keeps in every module, and the hooks among it."""

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _WrappedHook  # torch holds its load hooks in it; no public name
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.spectral_norm import SpectralNorm, SpectralNormLoadStateDictPreHook, SpectralNormStateDictHook
from torch.nn.utils.weight_norm import WeightNorm

from modsurg.errors import FormatError
from modsurg.structure.encode import check_name, class_entry

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
_WEIGHT_NORM_HOOK = "weight_norm.<locals>._weight_norm_compat_hook"
# The hooks by which torch implements weight and spectral norm: what a file says of each, and its fields.
NORM_HOOKS = {
    "torch.nn.utils.weight_norm.WeightNorm": ("old_weight_norm", ("name", "dim")),
    "torch.nn.utils.spectral_norm.SpectralNorm": ("spectral_norm", ("name", "n_power_iterations", "dim", "eps")),
}
# Come with the ones above.
UNUSED_HOOKS = frozenset(
    f"torch.nn.utils.spectral_norm.SpectralNorm{name}Hook" for name in ("LoadStateDictPre", "StateDict")
)


def is_attribute(name: str) -> bool:
    """Whether this entry of a module's `__dict__` is kept as a plain value."""
    return (name not in SLOTS or name in _VALUES) and name != COMPILED


def is_kept(name: str, value: object) -> bool:
    """Whether a file keeps this entry of a module's `__dict__` as a plain value."""
    return is_attribute(name) and (value is not None or name not in SLOTS) and name != _CAPTURED


def fresh_slots() -> dict[str, Any]:
    """The `__dict__` of a module without parameters, buffers, children and hooks."""
    slots = dict(_EMPTY)
    slots.update([(name, kind()) for name, kind in _CONTAINERS])
    return slots


def describe_norm_hooks(module: nn.Module) -> tuple[list[list[Any]], list[str]]:
    """The hooks by which torch implements weight and spectral norm as data, and the tables that hold other hooks."""
    found: list[list[Any]] = []
    others: list[str] = []
    for table in HOOKS:
        for hook in (module.__dict__.get(table) or {}).values():
            inner: Any = hook.hook if type(hook) is _WrappedHook else hook
            kind, qualname = f"{type(inner).__module__}.{type(inner).__qualname__}", getattr(inner, "__qualname__", "")
            if kind in NORM_HOOKS:
                tag, fields = NORM_HOOKS[kind]
                found.append([tag, *(getattr(inner, field) for field in fields)])
            elif qualname == _WEIGHT_NORM_HOOK and inner.__closure__:
                found.append(["weight_norm", inner.__closure__[0].cell_contents])
            elif kind not in UNUSED_HOOKS and qualname != _CAPTURING:
                others.append(table)
    return found, others


def add_norm_hooks(module: nn.Module, hooks: Iterable[Any]) -> None:
    """Give a module the hooks that `describe_norm_hooks` found, as torch makes them.

    Raises:
        FormatError: A hook of another kind, or one without the parameter that it works on.
    """
    register_save: Any = nn.Module._register_state_dict_hook
    register_load: Any = nn.Module._register_load_state_dict_pre_hook
    for kind, name, *options in hooks:
        check_name(type(module), name)
        needed = {"weight_norm": "parametrizations", "old_weight_norm": f"{name}_g", "spectral_norm": f"{name}_orig"}
        numbers = all(type(option) in (int, float, type(None)) for option in options)
        if not numbers or needed.get(kind) not in {**module._parameters, **module._modules}:
            raise FormatError(f"a hook of kind {kind!r:.40} without its parameter")
        if kind == "weight_norm":
            register_load(module, _make_weight_norm_hook(name))
        elif kind == "old_weight_norm":
            nn.Module.register_forward_pre_hook(module, WeightNorm(name, *options))
        else:
            norm = SpectralNorm(name, *options)
            nn.Module.register_forward_pre_hook(module, norm)
            register_save(module, SpectralNormStateDictHook(norm))
            register_load(module, SpectralNormLoadStateDictPreHook(norm))


def _make_weight_norm_hook(name: str) -> Any:
    """The hook by which torch's weight_norm reads old checkpoints; only weight_norm itself can make it."""
    module = nn.Module()
    module.register_parameter(name, nn.Parameter(torch.ones(1, 1)))
    parametrizations.weight_norm(module, name)
    (hook,) = module._load_state_dict_pre_hooks.values()
    return hook.hook  # type: ignore[attr-defined]  # torch wraps it


def reparametrize(module: nn.Module, names: Iterable[str]) -> None:
    """Give a module whose parametrizations are in place the class and the properties that use them.

    torch has no public way that leaves the parametrizations as they are: registering one computes it again.
    """
    for number, name in enumerate(names):
        lists = module._modules.get("parametrizations")
        found = lists._modules.get(name) if type(lists) is nn.ModuleDict else None
        if not isinstance(found, parametrize.ParametrizationList):
            raise FormatError(f"no parametrization of {name!r:.80}")
        check_name(type(module), name)
        slots = (module.__dict__, module._parameters, module._buffers, module._modules)
        if any(name in slot for slot in slots) or class_entry(type(module), name) is not None:
            raise FormatError(f"a parametrization of {name!r:.80}, which is there already")
        if not number:
            parametrize._inject_new_class(module)
        parametrize._inject_property(module, name)
