"""Names for children: where a new one goes, and whether its name is free."""

from torch import nn

from modsurg.errors import ContainerError, EditError, NameTakenError, NoMatchError
from modsurg.surgery.ops.bytecode import reads
from modsurg.surgery.ops.children import is_container, next_number, numbered
from modsurg.tree.selection import exact_path
from modsurg.tree.suggestions import nearest
from modsurg.tree.walk import Tree


def parent_of(tree: Tree, path: str) -> tuple[str, str]:
    """The path of the parent, which must exist, and the new name.

    Raises:
        NoMatchError: There is no such parent; the message names the nearest paths.
        EditError: The path or its last segment is empty.
    """
    above, _, name = path.rpartition(".") if isinstance(path, str) else ("", "", "")
    if not name:
        raise EditError(f'"{path}" is no path for a child; write "parent.name", or "name" for a child of the root.')
    parent = exact_path(tree, above) if above or path == name else None
    if parent is None:
        raise NoMatchError(f'the parent must exist before "{name}" can be added: {nearest(tree, above)}')
    return parent, name


def free_name(parent: nn.Module, path: str, name: str, keep: str | None = None) -> None:
    """Refuse a name that the parent has already, or that does not continue its numbers.

    Args:
        parent: Gets the child.
        path: Of the parent, for the message.
        name: The child's name.
        keep: A name that is about to be given up (a rename).

    Raises:
        NameTakenError: There is a child, parameter, buffer, attribute, method or property of that name.
        ContainerError: A number that would leave a gap, or a name in a ModuleList.
        EditError: An empty name, or one with a dot.
    """
    owner = f'"{path}" ({type(parent).__name__})' if path else type(parent).__name__
    if not isinstance(name, str) or not name or "." in name:
        raise EditError(f"{name!r} can't be the name of a child of {owner}: it needs a string without dots.")
    taken = _taken(parent, name)
    if taken and name != keep:
        at = f"{path}.{name}" if path else name
        remedy = f'replace(model, "{at}", new)' if taken == "a child" else "choose another name"
        raise NameTakenError(f"{owner} already has {taken} called {name!r}; nothing was changed: {remedy}.")
    if keep is None and numbered(parent) and parent._modules and name.isdecimal() and name != next_number(parent):
        last = next(reversed(parent._modules))
        raise ContainerError(
            f'{owner} is numbered up to {last}, so that the next child is "{next_number(parent)}", not "{name}"; '
            "for another place use insert_before or insert_after."
        )
    if numbered(parent) and name[0] == "-" and name[1:].isdecimal():
        raise ContainerError(f'{name!r} counts from the end of {owner}; "{next_number(parent)}" is next.')
    if isinstance(parent, nn.ModuleList) and keep is not None and name != keep:
        raise ContainerError(
            f"{owner} is a ModuleList, which finds its children by their numbers: they can't be renamed."
        )
    if isinstance(parent, nn.ModuleList) and not name.isdecimal():
        raise ContainerError(f'{owner} is a ModuleList, whose children are numbered: "{next_number(parent)}" is next.')


def _taken(parent: nn.Module, name: str) -> str | None:
    """What stands under the name, if it is not an empty slot (None)."""
    if name in parent._modules:
        return "a child" if parent._modules[name] is not None else None
    if name in parent._parameters:
        return "a parameter"
    if name in parent._buffers:
        return "a buffer"
    if hasattr(type(parent), name):
        return "a property" if isinstance(getattr(type(parent), name), property) else "a class attribute or method"
    return "an attribute" if parent.__dict__.get(name) is not None else None


def sibling(parent: nn.Module, path: str, before: str | None, after: str | None) -> tuple[str, bool] | None:
    """The child beside which the new one goes, and whether after it.

    Raises:
        EditError: Both are given, or the parent is numbered.
        NoMatchError: There is no such child.
    """
    if before is not None and after is not None:
        raise EditError("give before= or after=, not both.")
    name = before if before is not None else after
    if name is None:
        return None
    if name not in parent._modules:
        children = ", ".join(parent._modules) or "none"
        owner = f'"{path}" ({type(parent).__name__})' if path else type(parent).__name__
        raise NoMatchError(f'no child "{name}" in {owner}; its children: {children}.')
    if is_container(parent) and numbered(parent):
        raise EditError("a numbered container keeps its order by number: use insert_before or insert_after.")
    return name, after is not None


def listed_in(parent: nn.Module, name: str) -> str | None:
    """The attribute of the parent in which the child's name stands as a text: a key, an element or the whole."""
    for attribute, value in vars(parent).items():
        texts = value if isinstance(value, dict | list | tuple | set | frozenset) else (value,)
        if not attribute.startswith("_") and any(type(text) is str and text == name for text in texts):
            return attribute
    return None


def called_by_name(parent: nn.Module, name: str) -> bool:
    """Whether the parent's own code speaks of the child by its name, as `self.name` or `getattr(self, "name")`."""
    for kind in type(parent).__mro__:
        if kind.__module__.startswith("torch.nn.modules"):
            return reads(parent, name) != (set(), False)
        for method in vars(kind).values():
            code = getattr(method, "__code__", None)
            if code is None or method.__name__ == "__init__":
                continue
            if name in code.co_names or ("getattr" in code.co_names and name in code.co_consts):
                return True
    return False
