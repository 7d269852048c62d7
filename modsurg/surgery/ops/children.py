"""Sequential and ModuleList: their numbering, a neighbour for a child, a child less."""

from collections.abc import Iterable, Iterator, Sequence

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from modsurg.errors import ContainerError
from modsurg.surgery.changes import Step, last
from modsurg.surgery.journal import Journal
from modsurg.surgery.ops.bytecode import attribute, numbers, picks
from modsurg.tree.walk import Tree, walk

_COUNTS = ("num_layers", "num_hidden_layers", "n_layer", "n_layers", "depth", "num_blocks")  # as libraries call it
_PLACES = ("layer_idx", "layer_id", "layer_number")  # by which a layer finds its keys and values in a cache
Entry = tuple[str | None, nn.Module | None]


def is_container(module: nn.Module) -> bool:
    """Whether a module lists its children in their order."""
    return isinstance(module, nn.Sequential | nn.ModuleList) and not isinstance(module, ParametrizationList)


def in_order(module: nn.Module) -> bool:
    """Whether it is a container whose forward, if it has its own, does not pick children by name or number."""
    return is_container(module) and not picks(module)


def numbered(module: nn.Module) -> bool:
    """Whether the children are called 0, 1, 2, ... (a slice may begin with another number)."""
    return is_container(module) and all(name.isdecimal() for name in module._modules)


def next_number(module: nn.Module) -> str:
    """The name that follows the last one."""
    names = list(module._modules)
    return str(int(names[-1]) + 1) if names else "0"


def renamed(module: nn.Module, entries: Sequence[Entry]) -> list[tuple[str, nn.Module | None]]:
    """Names for the children in a new order; an entry without a name is a new child.

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


def neighbours(step: Step, anchors: Iterable[tuple[str, nn.Module]], after: bool) -> dict[int, list[str]]:
    """Put a new module before or after each anchor path; each container is rebuilt once.

    Returns:
        The paths of every module after the edit, by its `id`.

    Raises:
        ContainerError: The parent calls its children by attribute, so that a neighbour would never run.
    """
    by_parent: dict[int, dict[str, nn.Module]] = {}
    for path, new in anchors:
        parent = step.tree.parent(path)
        if not in_order(parent):
            raise ContainerError(_no_container(path, parent, new, after))
        by_parent.setdefault(id(parent), {})[last(path)] = new
    for key, news in by_parent.items():
        parent = step.tree.modules[step.tree.paths[key][0]]
        entries: list[Entry] = []
        for name, child in parent._modules.items():
            around: list[Entry] = [(name, child)]
            if name in news:
                around.insert(len(around) if after else 0, (None, news[name]))
            entries += around
        _put(step, parent, renamed(parent, entries))
    return walk(step.tree.root).paths


def _no_container(path: str, parent: nn.Module, new: nn.Module, after: bool) -> str:
    order = "old, new" if after else "new, old"
    return (
        f'"{path}" stands in a {type(parent).__name__}, which calls its children by attribute: a neighbour would never '
        f'run. Put both into its place: wrap(model, "{path}", lambda old: nn.Sequential({order})) '
        f"with new = {type(new).__name__}(...)."
    )


def without(step: Step, paths: Iterable[str]) -> list[str]:
    """Take children out of their containers and close the gaps; each container is rebuilt once.

    Returns:
        The containers whose other children got other numbers, by their first path.
    """
    by_parent: dict[int, set[str]] = {}
    for path in paths:
        by_parent.setdefault(id(step.tree.parent(path)), set()).add(last(path))
    moved: list[str] = []
    for key, names in by_parent.items():
        parent = step.tree.modules[step.tree.paths[key][0]]
        entries: list[Entry] = [(name, child) for name, child in parent._modules.items() if name not in names]
        after = renamed(parent, entries) if is_container(parent) else [(name or "", child) for name, child in entries]
        if [name for name, _ in after] != [name for name, _ in entries]:
            moved.append(step.tree.paths[key][0])
        _put(step, parent, after)
    return moved


def outdated(tree: Tree, journal: Journal) -> list[str]:
    """Notes about the numbers by which a model may go, and which its containers no longer hold: how many, and which.

    Args:
        tree: The model before the edit.
        journal: What the edit touched.
    """
    notes: list[str] = []
    touched = [(path, module) for path, module in tree.modules.items() if id(module._modules) in journal.dicts]
    for path, module in touched:
        old, new = len(journal.dicts[id(module._modules)][1]), len(module._modules)
        if path and old != new and is_container(module):
            for place, owner in _owners(tree, path, module).items():
                said = {name: attribute(owner, name) for name in _COUNTS}
                name = next((name for name, value in said.items() if type(value) is int and value == old), None)
                if name:
                    notes.append(f"the model may go by its {name}, which still says {old}: {place}.{name} = {new}")
                kinds = attribute(owner, "layer_types")
                if isinstance(kinds, list) and len(kinds) == old:
                    notes.append(f"{place}.layer_types has an entry for each of {old} layers: make it one of {new}")
        is_list = isinstance(module, nn.ModuleList)  # a Sequential gives its layers no cache
        known = _misnumbered(journal.dicts[id(module._modules)][1], module) if is_list else []
        if known:
            each = " = ".join(f"layer.{name}" for name in known)
            at = f'model.get_submodule("{path}")' if path else "model"
            notes.append(f"layers know their own number, which changed: for n, layer in enumerate({at}): {each} = n")
    return notes


def _misnumbered(before: Sequence[tuple[str, nn.Module | None]], container: nn.Module) -> list[str]:
    """Attributes in which the children of a container knew their place, and which are wrong for one of them now."""
    old = [child for _, child in before]
    moved = [(n, child) for n, child in enumerate(container._modules.values()) if n >= len(old) or old[n] is not child]
    wrong = dict.fromkeys(name for n, child in moved for name, value in _own_numbers(child) if value != n)
    said = [dict(_own_numbers(child)) for child in old] if wrong else []
    return [name for name in wrong if all(one.get(name, n) == n for n, one in enumerate(said))]


def _own_numbers(layer: nn.Module | None) -> Iterator[tuple[str, int]]:
    for path, module in layer.named_modules() if layer is not None else ():
        for name in _PLACES:
            value = vars(module).get(name)
            if type(value) is int:
                yield f"{path}.{name}".lstrip("."), value


def _owners(tree: Tree, path: str, container: nn.Module) -> dict[str, object]:
    """What may know how many children there are, by how to get at it: the parent, or a configuration."""
    above, parent = path.rpartition(".")[0], tree.parent(path)
    place = f'model.get_submodule("{above}")' if above else "model"
    owners: dict[str, object] = {place: parent}
    if isinstance(container, nn.ModuleList):
        owners["model.config"] = attribute(tree.root, "config")
        if attribute(parent, "config") is not owners["model.config"]:
            owners[f"{place}.config"] = attribute(parent, "config")
    return owners


def _put(step: Step, container: nn.Module, entries: list[tuple[str, nn.Module | None]]) -> None:
    before = list(container._modules.values())
    step.children(container, entries)
    after = list(container._modules.values())
    for path in step.tree.paths[id(container)]:
        if not path:
            continue
        parent = step.tree.parent(path)
        key = (type(parent), last(path))
        if key not in step.numbers:
            step.numbers[key] = numbers(parent, last(path))
        wrong = sorted(n for n in step.numbers[key] if _at(before, n) is not _at(after, n))
        if wrong:
            step.warnings.append(
                f'"{path}": the forward of {type(parent).__name__} picks children of {last(path)} by number '
                f"({', '.join(map(str, wrong))}), where others stand now."
            )


def _at(children: list[nn.Module | None], number: int) -> nn.Module | None:
    return children[number] if -len(children) <= number < len(children) else None
