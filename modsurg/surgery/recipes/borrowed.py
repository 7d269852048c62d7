"""What a new module has of the model into which it is put: a recipe says where that stands and builds it not anew."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from modsurg.errors import RecipeError
from modsurg.tree.walk import Tree

Loans = dict[str, dict[str, str]]


def parameter_names(tree: Tree) -> dict[int, str]:
    """The first name of each parameter, by its `id`."""
    names: dict[int, str] = {}
    for path, module in tree.modules.items():
        for name, parameter in module._parameters.items():
            names.setdefault(id(parameter), f"{path}.{name}" if path else name)
    return names


def loans(new: nn.Module, modules: Mapping[int, str], parameters: Mapping[int, str]) -> Loans:
    """The parts of `new` that are the model's own, by their paths in `new` and in the model.

    What stands in `new` more than once is entered once: its slots are the same at each path.

    Args:
        new: About to be recorded.
        modules: The model's, by `id`.
        parameters: The model's, by `id`.

    Returns:
        What there is of `"modules"` and `"parameters"`.

    Example:
        >>> old = nn.Linear(2, 2)
        >>> loans(nn.Sequential(old, nn.ReLU()), {id(old): "fc"}, {})
        {'modules': {'0': 'fc'}}
    """
    parts: dict[str, str] = {}
    tensors: dict[str, str] = {}
    for path, module in entered(new, modules):
        if id(module) in modules:
            parts[path] = modules[id(module)]
            continue
        prefix = f"{path}." if path else ""
        own = module._parameters.items()
        tensors |= {prefix + name: parameters[id(p)] for name, p in own if p is not None and id(p) in parameters}
    return {kind: found for kind, found in (("modules", parts), ("parameters", tensors)) if found}


def entered(new: nn.Module, modules: Mapping[int, str]) -> Iterator[tuple[str, nn.Module]]:
    """The modules of `new` with their paths, each of its own once; what lies inside the model's is left out."""
    waiting, seen = [("", new)], set()
    while waiting:
        path, module = waiting.pop()
        if id(module) in seen:
            continue
        yield path, module
        if id(module) in modules:
            continue
        seen.add(id(module))
        children = [
            (f"{path}.{name}" if path else name, child) for name, child in module._modules.items() if child is not None
        ]
        waiting += reversed(children)


@contextmanager
def taken_out(new: nn.Module, loan: Loans) -> Iterator[None]:
    """Within the block, `new` is without the model's modules."""
    places = [_slot(new, path, "_modules") for path in loan.get("modules", ())]
    kept = [slots[name] for slots, name in places]
    try:
        for slots, name in places:
            slots[name] = nn.Identity()
        yield
    finally:
        for (slots, name), child in zip(places, kept, strict=True):
            slots[name] = child


def give_back(new: nn.Module, loan: Mapping[str, Any], module: Callable[[str], nn.Module]) -> None:
    """Put the parts of another model in their places.

    Args:
        new: Just built from a recipe.
        loan: What `loans` gave.
        module: The module at a path of the other model.

    Raises:
        RecipeError: The other model's parameter has another shape.
        KeyError: Nothing is at such a path.
    """
    for inner, path in loan.get("modules", {}).items():
        slots, name = _slot(new, inner, "_modules")
        slots[name] = module(path)
    for inner, path in loan.get("parameters", {}).items():
        slots, name = _slot(new, inner, "_parameters")
        above, _, last = path.rpartition(".")
        parameter = module(above)._parameters[last]
        if parameter is None or parameter.shape != slots[name].shape:
            found = None if parameter is None else tuple(parameter.shape)
            raise RecipeError(
                f"{path} is {found} here and was {tuple(slots[name].shape)} where the recipe was recorded."
            )
        slots[name] = parameter


def _slot(root: nn.Module, path: str, table: str) -> tuple[dict[str, Any], str]:
    above, _, name = path.rpartition(".")
    slots: dict[str, Any] = getattr(root.get_submodule(above), table)
    if slots.get(name) is None:
        raise KeyError(path)
    return slots, name
