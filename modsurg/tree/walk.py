"""Every place in a module tree, one pass."""

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, slots=True)
class Tree:
    """All the paths of a model as they were when it was walked.

    Attributes:
        modules: Every path and its module in module order, the root at `""`; a module that stands at several paths is
            there several times. `None` slots are left out.
        paths: The paths of each module by `id(module)`, the first in module order first.
    """

    modules: dict[str, nn.Module]
    paths: dict[int, list[str]]

    @property
    def root(self) -> nn.Module:
        """The module that was walked."""
        return self.modules[""]

    def parent(self, path: str) -> nn.Module:
        """The module that holds the one at `path`."""
        return self.modules[path.rpartition(".")[0]]


def walk(model: nn.Module) -> Tree:
    """Walk the tree in module order.

    A module that (through a shared child) holds itself is entered once on each way down.

    Example:
        >>> shared = nn.ReLU()
        >>> tree = walk(nn.Sequential(shared, nn.Linear(2, 2), shared))
        >>> list(tree.modules)
        ['', '0', '1', '2']
        >>> tree.paths[id(shared)]
        ['0', '2']
    """
    modules: dict[str, nn.Module] = {}
    paths: dict[int, list[str]] = {}
    stack = [("", model)]
    while stack:
        path, module = stack.pop()
        known = paths.get(id(module))
        if known is None:
            paths[id(module)] = [path]
        elif _holds_itself(modules, path, module):
            continue
        else:
            known.append(path)
        modules[path] = module
        children = module._modules
        if children:
            prefix = f"{path}." if path else ""
            stack.extend([(prefix + name, child) for name, child in reversed(children.items()) if child is not None])
    return Tree(modules, paths)


def _holds_itself(modules: dict[str, nn.Module], path: str, module: nn.Module) -> bool:
    while path:
        path = path.rpartition(".")[0]
        if modules[path] is module:
            return True
    return False
