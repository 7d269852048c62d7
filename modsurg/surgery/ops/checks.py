"""What must not be edited, or not without a word."""

from collections.abc import Iterable

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from modsurg.errors import EditError, WrapperError, listed
from modsurg.surgery.changes import Step, last
from modsurg.surgery.ops.bytecode import reads
from modsurg.surgery.ops.factory import accepts
from modsurg.tree.selection import Site
from modsurg.tree.walk import Tree
from modsurg.tree.wrappers import unwrap, wrapper_kind

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
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


def compiled(tree: Tree, path: str) -> str | None:
    """Why a module right inside a torch.compile wrapper can't be exchanged: the wrapper goes on calling it."""
    if last(path) != "_orig_mod" or unwrap(tree.parent(path)) is not tree.modules[path]:
        return None
    outer = path.rpartition(".")[0]
    return (
        f'"{path}" is what torch.compile compiled, and "{outer}" would go on calling it; edit what is in it, '
        f'or the whole, and compile that: replace(model, "{outer}", torch.compile(new))'
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
    for owner in above(path):
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


def parametrizing(tree: Tree, path: str, new: nn.Module | None) -> str | None:
    """Why `new` can't stand where torch keeps a parametrization, with the line that takes it off.

    Args:
        tree: The model.
        path: Of the place.
        new: What would stand there; None where nothing would, or under another name.
    """
    segments = path.split(".")
    if "parametrizations" not in segments:
        return None
    at = len(segments) - 1 - segments[::-1].index("parametrizations")
    head, below = ".".join(segments[:at]), segments[at + 1 :]
    if not is_parametrized(tree.modules[head]) or len(below) > 2 or (new and _fits(tree, path, new)):
        return None
    tensor = below[0] if below else next(iter(tree.modules[path]._modules))
    layer = f'model.get_submodule("{head}")' if head else "model"
    return (
        f'"{path}" is where torch keeps a parametrization of the {type(tree.modules[head]).__name__}; '
        f'to take it off: torch.nn.utils.parametrize.remove_parametrizations({layer}, "{tensor}")'
    )


def _fits(tree: Tree, path: str, new: nn.Module) -> bool:
    """Whether torch could use `new` in place of a parametrization, a list of them or the dict of these lists."""
    parent, old = tree.parent(path), tree.modules[path]
    if isinstance(parent, ParametrizationList):
        return accepts(new.forward, 1 if parent.is_tensor else parent.ntensors)
    return isinstance(new, type(old)) and new._modules.keys() == old._modules.keys()


def unreadable(step: Step, path: str, old: nn.Module, new: nn.Module) -> str | None:
    """Why a module can't stand at `path`: its parent reads what the old module has and the new one has not."""
    parent = step.tree.parent(path)
    above_it = step.tree.parent(path.rpartition(".")[0])
    first = isinstance(above_it, nn.TransformerEncoder) and last(path) == next(iter(parent._modules))
    if first and parent is above_it.layers:
        parent, attributes = above_it, {"self_attn"}
    elif isinstance(parent, (*_CALLERS, nn.TransformerEncoderLayer)):
        return None
    else:
        attributes, _ = _uses(step, parent, last(path))
    missing = sorted(name for name in attributes if hasattr(old, name) and not hasattr(new, name))
    if not missing:
        return None
    return (
        f'"{path}": {type(parent).__name__} reads {", ".join(missing)} of it, which {type(new).__name__} does not '
        "have; replace the parent, or give the new module these attributes"
    )


def tell_what_went(step: Step, made: Iterable[tuple[Site, tuple[str, ...], nn.Module]]) -> None:
    """Warn where a norm that is gone held more than a norm, as those of timm hold the activation behind it."""
    went = [
        (f'"{paths[0]}.{name}" ({type(child).__name__})', name)
        for site, paths, new in made
        if isinstance(site.module, _NORMS)
        for name, child in site.module._modules.items()
        if child is not None and not isinstance(child, nn.Identity | ParametrizationList | nn.ModuleDict)
        if name not in new._modules and not any(child is module for module in new.modules())
    ]
    if went:
        step.warnings.append(
            f"what stood in a norm went with it: {listed([each for each, _ in went], 3)}. "
            f"To keep it: replace(model, ..., lambda old: nn.Sequential(<the new norm>, old.{went[0][1]}))."
        )


def tell_if_bypassed(step: Step, paths: Iterable[str], layers: bool) -> None:
    """Warn of a parent that reads the new module's weights instead of calling it.

    The fast path of nn.TransformerEncoderLayer does so in eval mode without gradients; it is turned off, as is that of
    the nn.TransformerEncoder above it, which gives its layers nested tensors.

    Args:
        step: The verb at work.
        paths: Where the new module stands.
        layers: Whether there is any such layer in the model.
    """
    for path in paths:
        parent = step.tree.parent(path)
        if not isinstance(parent, _CALLERS):
            attributes, called = _uses(step, parent, last(path))
            if (
                attributes
                and not called
                and not _same_forward(step.tree.modules[path], parent.get_submodule(last(path)))
            ):
                step.warnings.append(
                    f'"{path}" is never called: {type(parent).__name__} reads its {", ".join(sorted(attributes))}, '
                    "so that the new module's own forward does not run."
                )
        turned_off = [owner for owner in above(path) if layers and _turn_off_fast_path(step, step.tree.modules[owner])]
        if turned_off:
            kind = type(step.tree.modules[turned_off[0]]).__name__
            step.warnings.append(
                f'"{turned_off[0]}": the fast path of this nn.{kind} (eval mode, no gradients) would read '
                "the weights and not call the new module; it is turned off."
            )


def _same_forward(old: nn.Module, new: nn.Module) -> bool:
    return type(new).forward is type(old).forward and "forward" not in vars(new)


def _turn_off_fast_path(step: Step, layer: nn.Module) -> bool:
    for kind, name, off in _FAST_PATHS:
        if isinstance(layer, kind) and getattr(layer, name):
            step.journal.keep_attr(layer, name)
            setattr(layer, name, off)
            return True
    return False


_CALLERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_FAST_PATHS = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),
)


def _uses(step: Step, parent: nn.Module, name: str) -> tuple[set[str], bool]:
    key = (type(parent), name)
    if key not in step.uses:
        step.uses[key] = reads(parent, name)
    return step.uses[key]
