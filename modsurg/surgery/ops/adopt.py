"""What a new module takes over from the one in whose place it stands: device, dtype, mode, hooks."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from modsurg.errors import EditError, counted
from modsurg.surgery.changes import Step
from modsurg.surgery.ops.checks import above, refuse_offloaded
from modsurg.tree.eval_lock import held, mode
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
_EXTRAS = (*_HOOKS, *_STATE_HOOKS, "forward")
_PLAIN_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


def take_place(step: Step, old: nn.Module, new: nn.Module, path: str) -> None:
    """Give `new` the device, dtype, mode and hooks of `old`; what can't be carried becomes a warning.

    Where `new` holds `old` (a wrapper), what belongs to `old` stays with it, hooks included.
    """
    wraps = new._modules and any(module is old for module in new.modules())
    skip = {id(module) for module in old.modules()} if wraps else set()
    settle(step, new, old, path, mode(old), skip)
    if not wraps and (any(map(old.__dict__.get, _EXTRAS)) or "parametrizations" in old._modules):
        _carry_hooks(step, old, new, path)
        _report_left_behind(step, old, new, path)


def settle(
    step: Step,
    new: nn.Module,
    near: nn.Module,
    path: str,
    training: bool,
    skip: set[int] | frozenset[int] = frozenset(),
) -> None:
    """Give `new` a mode, and the device and dtype of `near`, or of the nearest parent of `path` that has weights."""
    own = [module for module in new.modules() if id(module) not in skip] if new._modules else [new]
    for module in own:
        if module.training != training and held(module) is None:
            step.journal.keep_attr(module, "training")
            module.training = training
    if new._parameters or new._buffers or (new._modules and any(m._parameters or m._buffers for m in own)):
        home = _weight(near, path)
        for owner in above(path) if home is None else ():
            if owner not in step.homes:
                step.homes[owner] = _weight(step.tree.modules[owner], path)
            home = step.homes[owner]
            if home is not None:
                break
        if home is not None:
            _move(step, own, home, path)


def _weight(module: nn.Module, path: str) -> torch.Tensor | None:
    """The tensor whose device and dtype speak for a module: its first floating parameter, else such a buffer.

    Raises:
        EditError: It is not where the module runs, but offloaded; named by `path`, where a new module is to stand.
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


def _move(step: Step, modules: list[nn.Module], home: torch.Tensor, path: str) -> None:
    moved: dict[int, torch.Tensor] = {}
    slots: Any
    for module in modules:
        for slots in (module._parameters, module._buffers):
            for name, tensor in slots.items():
                if tensor is None:
                    continue
                _check_inference(tensor, home, path, module)
                dtype = home.dtype if tensor.dtype in _PLAIN_FLOATS else tensor.dtype
                if tensor.device == home.device and tensor.dtype == dtype:
                    continue
                _check_meta(tensor, home, path, module)
                if is_lazy(tensor):
                    step.journal.keep_dict(slots)
                    slots[name] = moved.setdefault(id(tensor), _lazy(tensor, home, dtype))
                elif home.is_meta:
                    step.journal.keep_dict(slots)
                    slots[name] = moved.setdefault(id(tensor), _on_meta(tensor, dtype))
                elif id(tensor) not in moved:
                    step.journal.keep_tensor(tensor, moving=True)
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


def _carry_hooks(step: Step, old: nn.Module, new: nn.Module, path: str) -> None:
    for name, flags in _HOOKS.items():
        hooks = old.__dict__[name]
        if not hooks:
            continue
        carried = {key for key, hook in hooks.items() if not belongs_to(hook, old)}
        bound = [hook for hook in hooks.values() if _is_bound(hook, old)]
        if bound:
            count = counted(len(bound), "hook is a method", "hooks are methods")
            step.warnings.append(f'"{path}": {count} of the old module, and not carried.')
        if name == "_backward_hooks" and carried and not _same_backward_kind(step, old, new, path):
            continue
        if carried:
            for each in (name, *flags):
                _hand_over(step, old, new, each, carried)


def _hand_over(step: Step, old: nn.Module, new: nn.Module, name: str, carried: set[int]) -> None:
    """Move the dict itself, so that a `RemovableHandle` of the user's takes the hook off the new module."""
    hooks, own = old.__dict__[name], new.__dict__[name]
    before = OrderedDict(hooks)
    step.journal.keep_attr(old, name)
    step.journal.keep_attr(new, name)
    step.journal.on_undo(lambda: _hand_back(hooks, before, carried))
    old.__dict__[name] = before
    for key in [key for key in hooks if key not in carried]:
        del hooks[key]
    hooks.update(own)
    new.__dict__[name] = hooks


def _hand_back(hooks: dict[int, Any], before: Mapping[int, Any], carried: set[int]) -> None:
    """Fill the dict with what was in it, but for hooks that the user took off since."""
    kept = [(key, hook) for key, hook in before.items() if key in hooks or key not in carried]
    hooks.clear()
    hooks.update(kept)


def _same_backward_kind(step: Step, old: nn.Module, new: nn.Module, path: str) -> bool:
    if new._backward_hooks and new._is_full_backward_hook != old._is_full_backward_hook:
        step.warnings.append(f'"{path}": backward hooks were not carried, the new module has hooks of the other kind.')
        return False
    step.journal.keep_attr(new, "_is_full_backward_hook")
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


def _report_left_behind(step: Step, old: nn.Module, new: nn.Module, path: str) -> None:
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
    if left:
        step.warnings.append(f'"{path}": the new {type(new).__name__} does not have {", ".join(left)}.')


def _has_like(new: nn.Module, hook: Callable[..., Any]) -> bool:
    return any(type(mine) is type(hook) for mine in new._forward_pre_hooks.values())
