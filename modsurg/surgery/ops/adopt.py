"""What a new module takes over from the one in whose place it is put: device, dtype, mode, hooks."""

from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from modsurg.errors import EditError, counted
from modsurg.surgery.changes import Change
from modsurg.surgery.journal import Journal
from modsurg.surgery.ops.checks import refuse_offloaded
from modsurg.tree.eval_lock import held, mode
from modsurg.tree.walk import Tree, parents
from modsurg.tree.wrappers import wrapper_kind

_HOOKS = {
    "_forward_pre_hooks": ("_forward_pre_hooks_with_kwargs",),
    "_forward_hooks": ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    "_backward_pre_hooks": (),
    "_backward_hooks": (),
}
_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_PARAMETER_HOOKS = {
    "register_hook": "_backward_hooks",
    "register_post_accumulate_grad_hook": "_post_accumulate_grad_hooks",
}
_EXTRAS = (*_HOOKS, *_STATE_HOOKS, "forward")
_PLAIN_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


class Homes:
    """The weights from which new modules take their device and dtype; each parent is searched once.

    Args:
        tree: The model before the edit.
    """

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._known: dict[str, torch.Tensor | None] = {}

    def refuse_unmovable(self, new: nn.Module, near: nn.Module, path: str) -> None:
        """Refuse a new module that can't get the device and dtype of `near`, or of the nearest parent with weights.

        Raises:
            EditError: The new module is on meta or of inference tensors, or the place is offloaded.
        """
        own, home = self._own(new, near), self._find(new, near, path)
        if home is not None:
            for module in own:
                for tensor in (*module._parameters.values(), *module._buffers.values()):
                    if tensor is not None:
                        _check_inference(tensor, home, path, module)
                        _check_meta(tensor, home, path, module)

    def settle(self, new: nn.Module, near: nn.Module, path: str, training: bool, journal: Journal) -> None:
        """Give `new` a mode, and the device and dtype of `near`; a part that `near` is in too stays as it is."""
        own = self._own(new, near)
        for module in own:
            if module.training != training and held(module) is None:
                journal.keep_attr(module, "training")
                module.training = training
        home = self._find(new, near, path)
        if home is not None:
            _move(own, home, journal)

    def _own(self, new: nn.Module, near: nn.Module) -> list[nn.Module]:
        if not new._modules:
            return [new]
        shared = {id(module) for module in near.modules()} if any(m is near for m in new.modules()) else set()
        return [module for module in new.modules() if id(module) not in shared]

    def _find(self, new: nn.Module, near: nn.Module, path: str) -> torch.Tensor | None:
        if not any(module._parameters or module._buffers for module in self._own(new, near)):
            return None
        home = _weight(near, path)
        for owner in parents(path) if home is None else ():
            if owner not in self._known:
                self._known[owner] = _weight(self._tree.modules[owner], path)
            home = self._known[owner]
            if home is not None:
                break
        return home


def take_place(homes: Homes, old: nn.Module, new: nn.Module, path: str, journal: Journal) -> list[str]:
    """Give `new` the device, dtype, mode and hooks of `old`.

    Where `new` holds `old` (a wrapper), what belongs to `old` stays with it, hooks included.

    Returns:
        Warnings about what was not carried.
    """
    homes.settle(new, old, path, mode(old), journal)
    has_more = any(map(old.__dict__.get, _EXTRAS)) or "parametrizations" in old._modules
    if not has_more or (new._modules and any(module is old for module in new.modules())):
        return []
    return [*_carry_hooks(old, new, path, journal), *_report_left_behind(old, new, path)]


def warn_of_parameter_hooks(tree: Tree, changes: Iterable[Change]) -> list[str]:
    """Name the parameters that go and have hooks of their own, which nothing can move to another parameter."""
    warnings = []
    for change in changes:
        if change.old is None or change.new is None or len(change.paths) < len(tree.paths[id(change.old)]):
            continue
        for name, parameter in change.old.named_parameters(prefix=change.paths[0]):
            kinds = [kind for kind, table in _PARAMETER_HOOKS.items() if getattr(parameter, table, None)]
            if kinds and not any(parameter is kept for kept in change.new.parameters()):
                warnings.append(f'"{name}" had hooks of its own ({", ".join(kinds)}); the new module has none of them.')
    return warnings


def _weight(module: nn.Module, path: str) -> torch.Tensor | None:
    """Return the tensor whose device and dtype new modules take: the first floating parameter, else such a buffer.

    Raises:
        EditError: It is not where the module runs, but offloaded; named by `path`, where a new module is to be.
    """
    buffer = None
    stack = [module]
    while stack:
        module = stack.pop()
        for parameter in module._parameters.values():
            if parameter is not None and parameter.dtype in _PLAIN_FLOATS:
                if parameter.is_meta:
                    refuse_offloaded(path, module)
                return parameter
        for tensor in module._buffers.values():
            if buffer is None and tensor is not None and tensor.dtype in _PLAIN_FLOATS:
                buffer = tensor
        if module._modules:
            stack += [child for child in reversed(module._modules.values()) if child is not None]
    return buffer


def _move(modules: list[nn.Module], home: torch.Tensor, journal: Journal) -> None:
    moved: dict[int, torch.Tensor] = {}
    slots: Any
    for module in modules:
        for slots in (module._parameters, module._buffers):
            for name, tensor in slots.items():
                if tensor is None:
                    continue
                dtype = home.dtype if tensor.dtype in _PLAIN_FLOATS else tensor.dtype
                if tensor.device == home.device and tensor.dtype == dtype:
                    continue
                if is_lazy(tensor):
                    journal.keep_dict(slots)
                    slots[name] = moved.setdefault(id(tensor), _lazy(tensor, home, dtype))
                elif home.is_meta:
                    journal.keep_dict(slots)
                    slots[name] = moved.setdefault(id(tensor), _on_meta(tensor, dtype))
                elif id(tensor) not in moved:
                    journal.keep_tensor(tensor, moving=True)
                    tensor.data = tensor.data.to(home.device, dtype)
                    tensor.grad = None
                    moved[id(tensor)] = tensor


def _check_meta(tensor: torch.Tensor, home: torch.Tensor, path: str, module: nn.Module) -> None:
    if tensor.is_meta and not home.is_meta:
        raise EditError(
            f'the new {type(module).__name__} at "{path}" has no weights (it is on meta), while the model is on '
            f'{home.device}. Make it there: new.to_empty(device="{home.device}"), then initialise or load it.'
        )


def _check_inference(tensor: torch.Tensor, home: torch.Tensor, path: str, module: nn.Module) -> None:
    if not is_lazy(tensor) and tensor.is_inference() and not home.is_inference():
        kind = type(module).__name__
        raise EditError(
            f'the new {kind} at "{path}" was made under torch.inference_mode(), so it can\'t train. Make it outside: '
            f"with torch.inference_mode(False): new = {kind}(...)."
        )


def _on_meta(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    meta = tensor.detach().to("meta", dtype)
    return nn.Parameter(meta, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta


def _lazy(tensor: Any, home: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    made: torch.Tensor = type(tensor)(requires_grad=tensor.requires_grad, device=home.device, dtype=dtype)
    return made


def _carry_hooks(old: nn.Module, new: nn.Module, path: str, journal: Journal) -> list[str]:
    warnings: list[str] = []
    for name, flags in _HOOKS.items():
        hooks = old.__dict__[name]
        if not hooks:
            continue
        carried = {key for key, hook in hooks.items() if not belongs_to(hook, old)}
        bound = [hook for hook in hooks.values() if _is_bound(hook, old)]
        if bound:
            count = counted(len(bound), "hook is a method", "hooks are methods")
            warnings.append(f'"{path}": {count} of the old module, and not carried.')
        if name == "_backward_hooks" and carried and not _same_backward_kind(old, new, journal):
            warnings.append(f'"{path}": backward hooks were not carried, the new module has hooks of the other kind.')
            continue
        if carried:
            for each in (name, *flags):
                _hand_over(old, new, each, carried, journal)
    return warnings


def _hand_over(old: nn.Module, new: nn.Module, name: str, carried: set[int], journal: Journal) -> None:
    """Move the dict itself, so that a `RemovableHandle` of the user's takes the hook off the new module."""
    hooks, own = old.__dict__[name], new.__dict__[name]
    before = OrderedDict(hooks)
    journal.keep_attr(old, name)
    journal.keep_attr(new, name)
    added = set(own)
    journal.on_undo(lambda: _hand_back(hooks, before, carried, added))
    old.__dict__[name] = before
    for key in [key for key in hooks if key not in carried]:
        del hooks[key]
    hooks.update(own)
    new.__dict__[name] = hooks


def _hand_back(hooks: dict[int, Any], before: Mapping[int, Any], carried: set[int], own: Container[int]) -> None:
    """Fill the dict with what was in it, without hooks that the user took off since, with those registered since."""
    kept = [(key, hook) for key, hook in before.items() if key in hooks or key not in carried]
    kept += [(key, hook) for key, hook in hooks.items() if key not in before and key not in own]
    hooks.clear()
    hooks.update(kept)


def _same_backward_kind(old: nn.Module, new: nn.Module, journal: Journal) -> bool:
    if new._backward_hooks and new._is_full_backward_hook != old._is_full_backward_hook:
        return False
    journal.keep_attr(new, "_is_full_backward_hook")
    new._is_full_backward_hook = old._is_full_backward_hook
    return True


def belongs_to(hook: Callable[..., Any], module: nn.Module) -> bool:
    """Whether a hook is part of the module itself: torch's way to norm, prune or initialise weights, or our freeze."""
    if isinstance(hook, MethodType) and hook.__self__ is module:
        return True
    return any(kind.__module__.startswith(("torch.nn.", "modsurg.")) for kind in type(hook).__mro__)


def _is_bound(hook: Callable[..., Any], module: nn.Module) -> bool:
    return (
        isinstance(hook, MethodType)
        and hook.__self__ is module
        and not isinstance(module, nn.modules.lazy.LazyModuleMixin)
    )


def _report_left_behind(old: nn.Module, new: nn.Module, path: str) -> list[str]:
    left: list[str] = []
    if "forward" in old.__dict__ and "forward" not in new.__dict__ and wrapper_kind(old) is None:
        left.append("the forward that was set on the old module itself")
    if "parametrizations" in old._modules and is_parametrized(old) and not is_parametrized(new):
        left.append(f"the parametrization of {', '.join(old.get_submodule('parametrizations')._modules)}")
    for hook in old._forward_pre_hooks.values():
        if belongs_to(hook, old) and not isinstance(hook, MethodType) and not _has_like(new, hook):
            left.append(f"{type(hook).__name__} (a hook of {type(hook).__module__})")
    if any(old.__dict__.get(name) and not new.__dict__.get(name) for name in _STATE_HOOKS):
        left.append("its state_dict hooks")
    return [f'"{path}": the new {type(new).__name__} does not have {", ".join(left)}.'] if left else []


def _has_like(new: nn.Module, hook: Callable[..., Any]) -> bool:
    return any(type(mine) is type(hook) for mine in new._forward_pre_hooks.values())
