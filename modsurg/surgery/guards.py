"""What must not be edited, or not without a word."""

from collections.abc import Iterable

from torch import nn

from modsurg.errors import EditError, WrapperError
from modsurg.tree.walk import Tree
from modsurg.tree.wrappers import wrapper_kind

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
        for owner in above(path):
            kind = wrapped.get(owner)
            if kind:
                where = f'"{owner}"' if owner else "the model"
                raise WrapperError(
                    f'"{path}" can\'t be edited: {where} is a {type(tree.modules[owner]).__name__} ({kind}), '
                    f"and nothing was changed: {_UNWRAP[kind]}."
                )


def above(path: str) -> Iterable[str]:
    """The paths of the parents, from the nearest up to the root `""`; of the root itself, the root."""
    if not path:
        yield ""
    while path:
        path = path.rpartition(".")[0]
        yield path


def refuse_cycle(tree: Tree, path: str, new: nn.Module) -> None:
    """Refuse a module that already holds the place into which it is put.

    Raises:
        EditError: Names both.
    """
    if not new._modules:
        return
    inside = {id(module) for module in new.modules()}
    for owner in above(path):
        if id(tree.modules[owner]) in inside:
            raise EditError(
                f'the new {type(new).__name__} at "{path}" holds "{owner or "the model itself"}", its own parent; '
                "the tree would have no end. Put a copy into it: copy.deepcopy(part)."
            )


def refuse_offloaded(path: str, old: nn.Module) -> None:
    """Refuse to take out a module whose weights another library moves in and out of memory.

    Raises:
        EditError: Names the path and the line that takes the hook off.
    """
    if "_hf_hook" in old.__dict__:
        raise EditError(
            f'"{path}" is under a hook of accelerate (device map or offloading), which its replacement would not have. '
            "Take the hooks off, edit, dispatch again: accelerate.hooks.remove_hook_from_module(model, recurse=True)."
        )


def bypassed(parent: nn.Module, name: str) -> str | None:
    """Why a child is not called by its parent, where torch reads its tensors instead."""
    if isinstance(parent, nn.MultiheadAttention) and name == "out_proj":
        return (
            "nn.MultiheadAttention never calls out_proj: it reads out_proj.weight and out_proj.bias, "
            "so that the new module's forward does not run"
        )
    if isinstance(parent, nn.TransformerEncoderLayer):
        return (
            "nn.TransformerEncoderLayer does not call its children on the fast path (eval mode, no gradients); "
            "turn it off: torch.backends.mha.set_fastpath_enabled(False)"
        )
    return None
