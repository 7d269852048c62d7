"""What can't be edited, and what the user must know of an edit."""

import sys
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from modsurg.errors import EditError, WrapperError
from modsurg.surgery.changes import Change
from modsurg.surgery.journal import Journal
from modsurg.surgery.ops.bytecode import ForwardCode
from modsurg.tree.walk import Tree, last, parents
from modsurg.tree.wrappers import unwrap, wrapper_kind

_UNWRAP = {
    "DDP": "edit the model inside it, `ddp.module`, before wrapping: DDP(edited)",
    "DataParallel": "edit the model inside it, `parallel.module`, before wrapping",
    "FSDP": "edit the model before it is sharded, then shard it again",
    "FSDP2": "edit the model before fully_shard(model), which owns the parameters from then on",
    "ScriptModule": "edit the Python model, then script or trace it again: torch.jit.script(edited)",
}


def wrapped_paths(tree: Tree) -> dict[str, str]:
    """Paths that own everything below them, and by which wrapper."""
    kinds = {kind: wrapper_kind(module) for kind, module in {type(m): m for m in tree.modules.values()}.items()}
    if not any(kinds.values()):
        return {}
    return {path: kind for path, module in tree.modules.items() if (kind := kinds[type(module)])}


def refuse_wrapped(tree: Tree, paths: Iterable[str]) -> None:
    """Refuse places inside DDP, FSDP or TorchScript; a wrapper below an ordinary parent may be replaced whole.

    Raises:
        WrapperError: Names the wrapper, its path and how to go on.
    """
    wrapped = wrapped_paths(tree)
    if not wrapped:
        return
    for path in paths:
        for owner in (*parents(path), ""):
            kind = wrapped.get(owner)
            if kind:
                where = f'"{owner}"' if owner else "the model"
                raise WrapperError(
                    f'"{path}" can\'t be edited: {where} is a {type(tree.modules[owner]).__name__} ({kind}), '
                    f"and nothing was changed: {_UNWRAP[kind]}."
                )


def refuse_cycle(tree: Tree, path: str, new: nn.Module) -> None:
    """Refuse a module that already holds the place into which it is put, and one that torch has not set up.

    Raises:
        EditError: Names both.
    """
    if not hasattr(new, "_modules"):
        kind = type(new).__name__
        raise EditError(f'the new {kind} at "{path}" is not set up: begin {kind}.__init__ with super().__init__().')
    if not new._modules:
        return
    inside = {id(module) for module in new.modules()}
    for owner in parents(path):
        if id(tree.modules[owner]) in inside:
            raise EditError(
                f'the new {type(new).__name__} at "{path}" holds "{owner or "the model itself"}", its own parent; '
                "the tree would have no end. Put a copy into it: copy.deepcopy(part)."
            )


def refuse_offloaded(path: str, old: nn.Module) -> None:
    """Refuse to replace or resize a module whose weights another library moves in and out of memory.

    Raises:
        EditError: Names the path and the line that takes the hook off.
    """
    if "_hf_hook" in old.__dict__:
        raise EditError(
            f'"{path}" is under a hook of accelerate (device map or offloading), which would not know of the edit. '
            "Take the hooks off, edit, dispatch again: accelerate.hooks.remove_hook_from_module(model, recurse=True)."
        )


def refuse_fixed(tree: Tree, paths: Iterable[str]) -> None:
    """Refuse a neighbour, a removal or another name where torch keeps a parametrization or a compiled module.

    Raises:
        EditError: Names the place and the line that takes the parametrization off.
    """
    for path in paths:
        if why := why_fixed(tree, path):
            raise EditError(f"{why}.")


def why_fixed(tree: Tree, path: str) -> str | None:
    """Why the module at `path` can't be exchanged: torch.compile goes on calling it, or torch keeps weights there."""
    outer, _, name = path.rpartition(".")
    if name == "_orig_mod" and unwrap(tree.parent(path)) is tree.modules[path]:
        return (
            f'"{path}" is what torch.compile compiled, and "{outer}" would go on calling it; edit what is in it, '
            f'or the whole, and compile that: replace(model, "{outer}", torch.compile(new))'
        )
    head, found, below = f".{path}".rpartition(".parametrizations")
    head = head[1:]
    if not found or not is_parametrized(tree.modules[head]):
        return None
    tensor = below.split(".")[1] if below else next(iter(tree.modules[path]._modules))
    layer = f'model.get_submodule("{head}")' if head else "model"
    return (
        f'"{path}" is where torch keeps a parametrization of the {type(tree.modules[head]).__name__}; '
        f'to take it off: torch.nn.utils.parametrize.remove_parametrizations({layer}, "{tensor}")'
    )


def called_in_graph(tree: Tree, path: str) -> bool:
    """Whether a graph that torch.fx traced calls the module at `path`, or one inside it, by its name."""
    fx: Any = sys.modules.get("torch.fx.graph_module")
    for owner in parents(path) if fx is not None else ():
        traced = tree.modules[owner]
        if isinstance(traced, fx.GraphModule):
            name = path[len(owner) :].lstrip(".")
            targets = [str(node.target) for node in traced.graph.nodes if node.op in ("call_module", "get_attr")]
            return any(target == name or target.startswith(f"{name}.") for target in targets)
    return False


def warn_if_bypassed(tree: Tree, code: ForwardCode, changes: Iterable[Change]) -> list[str]:
    """Warn of a parent that reads the new module's weights instead of calling it."""
    warnings = []
    for change in changes:
        for path in change.paths if change.new is not None else ():
            parent = tree.parent(path)
            if isinstance(parent, CALLERS):
                continue
            attributes, called = code.reads(parent, last(path))
            if attributes and not called and not _same_forward(tree.modules[path], change.new):
                warnings.append(
                    f'"{path}" is never called: {type(parent).__name__} reads its {", ".join(sorted(attributes))}, '
                    "so that the new module's own forward does not run."
                )
    return warnings


def turn_off_fast_paths(tree: Tree, changes: Iterable[Change], journal: Journal) -> list[str]:
    """Turn off the fast path of encoder layers (eval mode, no gradients): it would not call the new module.

    The fast path of the nn.TransformerEncoder above it goes too: it gives its layers nested tensors.

    Returns:
        Warnings that name the layers.
    """
    if not any(isinstance(module, nn.TransformerEncoderLayer) for module in tree.modules.values()):
        return []
    warnings = []
    for change in changes:
        if change.kind == "remove" and isinstance(change.old, nn.Dropout):  # which does nothing in eval mode
            continue
        for path in change.paths if change.new is not None else ():
            slow = [owner for owner in parents(path) if _turn_off_fast_path(tree.modules[owner], journal)]
            if slow:
                kind = type(tree.modules[slow[0]]).__name__
                warnings.append(
                    f'"{slow[0]}": the fast path of this nn.{kind} (eval mode, no gradients) would read '
                    "the weights and not call the new module; it is turned off."
                )
    return warnings


def _same_forward(old: nn.Module, new: nn.Module | None) -> bool:
    return new is not None and type(new).forward is type(old).forward and "forward" not in vars(new)


def _turn_off_fast_path(layer: nn.Module, journal: Journal) -> bool:
    for kind, name, off in _FAST_PATHS:
        if isinstance(layer, kind) and getattr(layer, name):
            journal.keep_attr(layer, name)
            setattr(layer, name, off)
            return True
    return False


CALLERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_FAST_PATHS = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),
)
