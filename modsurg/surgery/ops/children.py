"""Names and numbers of children: in a Sequential, a ModuleList, or a parent of any other kind."""

from collections.abc import Sequence

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from modsurg.errors import ContainerError, EditError, NameTakenError, listed
from modsurg.surgery.changes import Change
from modsurg.surgery.journal import Journal
from modsurg.surgery.ops.bytecode import ForwardCode, picks, reads
from modsurg.surgery.ops.checks import called_in_graph
from modsurg.tree.walk import Tree, last

Entry = tuple[str | None, nn.Module | None]
"""A child and its name; None for a new one."""


def is_container(module: nn.Module) -> bool:
    """Whether a module lists its children in their order."""
    return isinstance(module, nn.Sequential | nn.ModuleList) and not isinstance(module, ParametrizationList)


def in_order(tree: Tree, path: str) -> bool:
    """Whether the parent of `path` runs its children in their order, and picks none by name or number."""
    parent = tree.parent(path)
    return is_container(parent) and not picks(parent) and not called_in_graph(tree, path.rpartition(".")[0])


def numbered(module: nn.Module) -> bool:
    """Whether the children are called 0, 1, 2, ... (a slice may begin with another number)."""
    return is_container(module) and all(name.isdecimal() for name in module._modules)


def next_number(module: nn.Module) -> str:
    """The name that follows the last one."""
    names = list(module._modules)
    return str(int(names[-1]) + 1) if names else "0"


def _renumber(module: nn.Module, entries: Sequence[Entry]) -> list[tuple[str, nn.Module | None]]:
    """Give names to the children in a new order; an entry without a name is a new child.

    Numbers that ran without a gap do so again, from the same first number; over gaps, numbers only move where they
    must. Names stay as they are, and a new child among them is called by its class.
    """
    if not numbered(module):
        return _named(module, entries)
    before = [int(name) for name in module._modules]
    base = before[0] if before else 0
    if before == list(range(base, base + len(before))):
        return [(str(base + place), child) for place, (_, child) in enumerate(entries)]
    names: list[tuple[str, nn.Module | None]] = []
    number = base - 1
    for name, child in entries:
        number = max(number + 1, int(name)) if name is not None else number + 1
        names.append((str(number), child))
    return names


def _named(module: nn.Module, entries: Sequence[Entry]) -> list[tuple[str, nn.Module | None]]:
    taken = {name for name, _ in entries if name is not None}
    names: list[tuple[str, nn.Module | None]] = []
    for name, child in entries:
        if name is None:
            stem = name = type(child).__name__.lower()
            copies = 1
            while name in taken or hasattr(module, name):
                copies += 1
                name = f"{stem}_{copies}"
            taken.add(name)
        names.append((name, child))
    return names


def set_numbered(
    tree: Tree, code: ForwardCode, parent: nn.Module, entries: Sequence[Entry], journal: Journal
) -> list[str]:
    """Give a parent these children in this order; those of a container are numbered again.

    Returns:
        Warnings of forwards that pick children by a number which now means another child.
    """
    before = list(parent._modules.values())
    named = _renumber(parent, entries) if is_container(parent) else [(name or "", child) for name, child in entries]
    journal.set_children(parent, named)
    after = list(parent._modules.values())
    warnings = []
    for path in tree.paths[id(parent)]:
        numbers = code.numbers(tree.parent(path), last(path)) if path else ()
        wrong = [n for n in sorted(numbers) if _at(before, n) is not _at(after, n)]
        if wrong:
            warnings.append(
                f'"{path}": the forward of {type(tree.parent(path)).__name__} picks children of {last(path)} by number '
                f"({', '.join(map(str, wrong))}), where others are now."
            )
    return warnings


def list_renumbered(tree: Tree, changes: Sequence[Change], journal: Journal) -> list[str]:
    """Say which containers gave their other children new numbers when some were removed.

    Args:
        tree: The model before the removal.
        changes: What was removed.
        journal: What the removal touched.
    """
    moved: dict[str, None] = {}
    for parent in [tree.parent(path) for change in changes if change.new is None for path in change.paths]:
        names = {id(child): name for name, child in journal.dicts[id(parent._modules)][1]}
        if any(names[id(child)] != name for name, child in parent._modules.items()):
            moved[tree.paths[id(parent)][0]] = None
    quoted = [f'"{path or type(tree.root).__name__}"' for path in moved]
    return [f"renumbered: {listed(quoted, 5)}"] if quoted else []


def _at(children: list[nn.Module | None], number: int) -> nn.Module | None:
    return children[number] if -len(children) <= number < len(children) else None


def refuse_name(parent: nn.Module, path: str, name: str, keep: str | None = None) -> None:
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
    """What has the name already, if it is not an empty slot (None)."""
    if name in parent._modules:
        return "a child" if parent._modules[name] is not None else None
    if name in parent._parameters:
        return "a parameter"
    if name in parent._buffers:
        return "a buffer"
    if hasattr(type(parent), name):
        return "a property" if isinstance(getattr(type(parent), name), property) else "a class attribute or method"
    return "an attribute" if parent.__dict__.get(name) is not None else None


def listed_in(parent: nn.Module, name: str) -> str | None:
    """The attribute of the parent that holds the child's name as a string: a key, an element or the whole."""
    for attribute, value in vars(parent).items():
        texts = value if isinstance(value, dict | list | tuple | set | frozenset) else (value,)
        if not attribute.startswith("_") and any(type(text) is str and text == name for text in texts):
            return attribute
    return None


def called_by_name(parent: nn.Module, name: str) -> bool:
    """Whether the parent's own code references the child by its name, as `self.name` or `getattr(self, "name")`."""
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
