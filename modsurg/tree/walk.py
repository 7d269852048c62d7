"""Walk a module tree once, and take its dotted paths apart."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn


def join(path: str, name: str) -> str:
    """Join the path of a parent, `""` for the root, and the name of a child.

    Example:
        >>> join("layer4.0", "conv1"), join("", "fc")
        ('layer4.0.conv1', 'fc')
    """
    return f"{path}.{name}" if path else name


def split(path: str) -> tuple[str, str]:
    """Split a path into that of its parent and its last segment.

    Example:
        >>> split("layer4.0.conv1"), split("fc")
        (('layer4.0', 'conv1'), ('', 'fc'))
    """
    parent, _, name = path.rpartition(".")
    return parent, name


def last(path: str) -> str:
    """Return the last segment of a path."""
    return path.rpartition(".")[2]


def parents(path: str) -> Iterator[str]:
    """Yield the path of each ancestor, the nearest first and the root last.

    Example:
        >>> list(parents("layer4.0.conv1"))
        ['layer4.0', 'layer4', '']
    """
    while path:
        path = path.rpartition(".")[0]
        yield path


@dataclass(frozen=True, slots=True)
class Tree:
    """All the paths of a model as they were when it was walked.

    Attributes:
        modules: Every path and its module in module order, the root at `""`. A module with several paths is listed
            at each of them. Children that are `None` are left out.
        paths: The paths of each module by `id(module)`, the first in module order first.
    """

    modules: dict[str, nn.Module]
    paths: dict[int, list[str]]

    @property
    def root(self) -> nn.Module:
        """The module that was walked."""
        return self.modules[""]

    def parent(self, path: str) -> nn.Module:
        """Return the module that holds the one at `path`."""
        return self.modules[split(path)[0]]


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
        elif any(modules[above] is module for above in parents(path)):
            continue
        else:
            known.append(path)
        modules[path] = module
        children = module._modules
        if children:
            prefix = f"{path}." if path else ""
            stack.extend([(prefix + name, child) for name, child in reversed(children.items()) if child is not None])
    return Tree(modules, paths)


def named_parameters(tree: Tree) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield every name of every parameter, in module order: a shared one comes several times."""
    for path, module in tree.modules.items():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield join(path, name), parameter
