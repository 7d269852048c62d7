"""Freezing: parameters that no optimizer moves, and statistics that stay when the model trains."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from torch import nn
from torch.nn.parameter import is_lazy

from modsurg.errors import EditError
from modsurg.surgery.changes import Change, Frozen
from modsurg.surgery.journal import Journal
from modsurg.tree.eval_lock import held, hold, release
from modsurg.tree.selection import Selection
from modsurg.tree.walk import Tree, split


def plan_freeze(tree: Tree, selection: Selection) -> tuple[list[Change], list[str]]:
    """Plan to freeze each site and all that is in it.

    Parameters lose `requires_grad` and their gradient, so that neither momentum nor weight decay moves them. Modules
    with running statistics (batch and instance normalisation, the vectors of spectral norm) are held in evaluation
    mode: they normalise by their statistics and never change them, also after `model.train()`. Any other mode, so
    that of dropout, stays as the model has it.

    Returns:
        The changes, and warnings about what is shared with a part that was not meant.
    """
    changes = []
    for site in selection:
        parameters = tuple(p for p in site.module.parameters() if p.requires_grad or p.grad is not None)
        statistics = tuple(m for m in site.module.modules() if has_statistics(m) and held(m) is None)
        changes.append(_change("freeze", tree, site.module, Frozen(parameters, statistics, trainable=False)))
    roots = selection.modules
    return changes, [*_shared(tree, roots, "frozen"), *_left_out(tree, roots)]


def plan_unfreeze(tree: Tree, selection: Selection) -> tuple[list[Change], list[str]]:
    """Plan to let each site and all that is in it train again, in the mode that the model was last asked for.

    Returns:
        The changes, and warnings about what is shared with a part that was not meant.

    Raises:
        EditError: A parameter was made under `torch.inference_mode`.
    """
    changes = []
    for site in selection:
        parameters = tuple(
            p for p in site.module.parameters() if not p.requires_grad and (p.is_floating_point() or p.is_complex())
        )
        for name, parameter in site.module.named_parameters(prefix=site.path):
            _refuse_inference(name, parameter)
        statistics = tuple(m for m in site.module.modules() if held(m) is not None)
        changes.append(_change("unfreeze", tree, site.module, Frozen(parameters, statistics, trainable=True)))
    return changes, _shared(tree, selection.modules, "trainable")


def plan_parameters(tree: Tree, named: Mapping[str, nn.Parameter], trainable: bool) -> list[Change]:
    """Plan to freeze parameters that are named themselves, or to let them train again.

    Raises:
        EditError: A parameter was made under `torch.inference_mode`.
    """
    kind: Literal["freeze", "unfreeze"] = "unfreeze" if trainable else "freeze"
    changes = []
    for name, parameter in named.items():
        owner = tree.modules[split(name)[0]]
        if trainable:
            _refuse_inference(name, parameter)
        changing = trainable is not parameter.requires_grad or (parameter.grad is not None and not trainable)
        detail = Frozen((parameter,) if changing else (), (), trainable, alone=True)
        changes.append(Change(kind, (name,), old=owner, new=owner, detail=detail))
    return changes


def apply_frozen(changes: Iterable[Change], journal: Journal) -> None:
    """Freeze or unfreeze what the plan says."""
    for change in changes:
        assert isinstance(change.detail, Frozen)
        assert change.new is not None
        modules = () if change.detail.alone else change.new.modules()
        kept = [tensor for m in modules for tensor in (*m._parameters.values(), *m._buffers.values())]
        for tensor in (*kept, *change.detail.parameters):  # also what is frozen already: undo would thaw it
            if tensor is not None:
                journal.keep_flags(tensor)
        for parameter in change.detail.parameters:
            parameter.requires_grad = change.detail.trainable
            if not change.detail.trainable:
                parameter.grad = None
        for module in change.detail.statistics:
            journal.keep_attr(module, "training")
            journal.keep_attr(module, "train")
            (release if change.detail.trainable else hold)(module)


def _change(kind: Literal["freeze", "unfreeze"], tree: Tree, module: nn.Module, detail: Frozen) -> Change:
    return Change(kind, tuple(tree.paths[id(module)]), old=module, new=module, detail=detail)


def _refuse_inference(name: str, parameter: nn.Parameter) -> None:
    if not is_lazy(parameter) and parameter.is_inference():
        raise EditError(
            f'"{name}" was made under torch.inference_mode(), so it can\'t train. '
            "A copy made outside has ordinary tensors: model = copy.deepcopy(model)"
        )


def has_statistics(module: nn.Module) -> bool:
    """Whether a forward in training mode changes buffers of `module`: running statistics, vectors of spectral norm.

    Example:
        >>> has_statistics(nn.BatchNorm2d(3)), has_statistics(nn.LayerNorm(3))
        (True, False)
    """
    return any(
        buffer is not None and (name.startswith("running_") or name.endswith("_u"))
        for name, buffer in module._buffers.items()
    )


def _inside(modules: Iterable[nn.Module]) -> dict[int, nn.Module]:
    return {id(module): module for outer in modules for module in outer.modules()}


def _shared(tree: Tree, roots: Sequence[nn.Module], state: str) -> list[str]:
    """Name what is inside `roots` and outside too: a module under another parent, a parameter in another module."""
    inside = _inside(roots)
    outermost = {id(module) for module in roots}
    own = {id(p) for m in inside.values() for p in m._parameters.values() if p is not None}
    notes = []
    for path, module in tree.modules.items():
        if id(module) in inside:
            if id(module) not in outermost and id(tree.parent(path)) not in inside and _owns(module):
                notes.append(f"{path} is the same module as one inside: it is {state} there too")
            continue
        for name, parameter in module._parameters.items():
            if id(parameter) in own:
                notes.append(f"{path}.{name}".lstrip(".") + f" is the same parameter as one inside: it is {state} too")
    return notes


def _left_out(tree: Tree, roots: Sequence[nn.Module]) -> list[str]:
    """Name the parameters of a parent itself, of whose children several are frozen: they are easily forgotten."""
    inside = _inside(roots)
    above = Counter(tree.paths[id(root)][0].rpartition(".")[0] for root in roots)
    found = []
    for path in (path for path, children in above.items() if children > 1):
        parent = tree.modules[path]
        names = [name for name, p in parent._parameters.items() if p is not None and p.requires_grad]
        others = [each for each in parent.children() if id(each) not in inside and any(True for _ in each.parameters())]
        if names and id(parent) not in inside and len(others) <= 1:
            found.append((path, parent, names))
    for path, parent, names in found[:1]:
        trains = f"{', '.join(names)} of {type(parent).__name__} itself still train{'s' * (len(names) == 1)}"
        more = f" (the like in {len(found) - 1} more modules)" if len(found) > 1 else ""
        return [f'{trains}{more}: freeze(model, "{path or "**"}"), then unfreeze(model, ...) what is to train']
    return []


def _owns(module: nn.Module) -> bool:
    return any(True for _ in module.parameters()) or any(has_statistics(m) for m in module.modules())
