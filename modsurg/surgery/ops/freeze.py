"""Freezing: parameters that no optimizer moves, and statistics that stay when the model trains."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from modsurg.surgery.journal import Journal
from modsurg.tree.eval_lock import held, hold, release
from modsurg.tree.walk import Tree


@dataclass(frozen=True, slots=True)
class Frozen:
    """What `freeze` or `unfreeze` changed.

    Attributes:
        parameters: Every parameter that changed, by its first name in the model.
        statistics: Paths of the modules whose statistics are now held, or let go.
        notes: What the user should know: what is shared with a part that was not meant.
    """

    parameters: Mapping[str, nn.Parameter]
    statistics: tuple[str, ...]
    notes: tuple[str, ...]


def freeze_modules(tree: Tree, modules: Iterable[nn.Module], journal: Journal) -> Frozen:
    """Freeze `modules` and all that is in them.

    Parameters lose `requires_grad` and their gradient, so that neither momentum nor weight decay moves them. Modules
    with running statistics (batch and instance normalisation, the vectors of spectral norm) are held in evaluation
    mode: they normalise by their statistics and never change them, also after `model.train()`. Any other mode, so
    that of dropout, stays as the model has it.
    """
    roots = list(modules)
    inside = _inside(roots)
    parameters = {
        id(p): p
        for module in inside.values()
        for p in module.parameters(recurse=False)
        if p.requires_grad or p.grad is not None
    }
    holding = [module for module in inside.values() if has_statistics(module) and held(module) is None]
    for parameter in parameters.values():
        journal.keep_flags(parameter)
        parameter.requires_grad = False
        parameter.grad = None
    for module in holding:
        _keep_mode(module, journal)
        hold(module)
    notes = (*_shared(tree, roots, inside, "frozen"), *_left_out(tree, roots, inside))
    return Frozen(*_names(tree, parameters, holding), notes)


def unfreeze_modules(tree: Tree, modules: Iterable[nn.Module], journal: Journal) -> Frozen:
    """Let `modules` and all that is in them train again, in the mode that the model was last asked for."""
    roots = list(modules)
    inside = _inside(roots)
    parameters = {
        id(p): p
        for module in inside.values()
        for p in module.parameters(recurse=False)
        if not p.requires_grad and (p.is_floating_point() or p.is_complex())
    }
    holding = [module for module in inside.values() if held(module) is not None]
    for parameter in parameters.values():
        journal.keep_flags(parameter)
        parameter.requires_grad = True
    for module in holding:
        _keep_mode(module, journal)
        release(module)
    return Frozen(*_names(tree, parameters, holding), _shared(tree, roots, inside, "trainable"))


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


def _keep_mode(module: nn.Module, journal: Journal) -> None:
    journal.keep_attr(module, "training")
    journal.keep_attr(module, "train")


def _names(
    tree: Tree, parameters: dict[int, nn.Parameter], holding: list[nn.Module]
) -> tuple[dict[str, nn.Parameter], tuple[str, ...]]:
    first: dict[int, str] = {}
    for path, module in tree.modules.items():
        for name, parameter in module._parameters.items():
            if id(parameter) in parameters:
                first.setdefault(id(parameter), f"{path}.{name}" if path else name)
    return {name: parameters[key] for key, name in first.items()}, tuple(tree.paths[id(m)][0] for m in holding)


def _shared(tree: Tree, roots: list[nn.Module], inside: dict[int, nn.Module], state: str) -> tuple[str, ...]:
    """What of `inside` stands outside too: a module under another parent, a parameter in another module."""
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
    return tuple(notes)


def _left_out(tree: Tree, roots: list[nn.Module], inside: dict[int, nn.Module]) -> tuple[str, ...]:
    """Parameters of a parent itself, of whose children several were frozen: whoever selects those may forget them."""
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
        return (f'{trains}{more}: freeze(model, "{path or "**"}"), then unfreeze(model, ...) what is to train',)
    return ()


def _owns(module: nn.Module) -> bool:
    return any(True for _ in module.parameters()) or any(has_statistics(m) for m in module.modules())
