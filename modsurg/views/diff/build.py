"""The two sides of a comparison: a model, a state or a file as one kind of tree."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modsurg.checkpoints.formats.source import Source
from modsurg.checkpoints.state import State
from modsurg.errors import SaveError
from modsurg.structure.build import describe
from modsurg.structure.schema import BESIDE, outline, read_tree, sound
from modsurg.structure.tensors import check_within, within
from modsurg.tree.walk import walk
from modsurg.tree.wrappers import unwrap
from modsurg.views.diff.attributes import as_tensor, attributes, packed_attributes, text_of
from modsurg.views.diff.nodes import ATTRIBUTE, UNSAVED, Leaf, Node, StoredLeaf, TensorLeaf, opaque


@dataclass(slots=True)
class Side:
    """One of the two things compared.

    Attributes:
        label: What to call it: a class or a file name.
        root: The tree.
        is_model: Whether classes and their arguments are known, and tensors that are not saved are there.
    """

    label: str
    root: Node
    is_model: bool


def two_sides(old: object, new: object) -> tuple[Side, Side]:
    """Take two models, states, sources or any mix of them, seen in as much detail as both give.

    Raises:
        TypeError: Something else.
    """
    if isinstance(old, nn.Module) and isinstance(new, nn.Module):
        return _from_model(unwrap(old)), _from_model(unwrap(new))
    try:
        outlined = [_from_outline(thing) for thing in (old, new)]
    except SaveError:
        outlined = [None]
    if outlined[0] is None or outlined[-1] is None:
        return _from_state(old), _from_state(new)
    _keep_common_details(outlined[0], outlined[-1])
    return outlined[0], outlined[-1]


def _keep_common_details(*sides: Side) -> None:
    """Leave out what only one of two descriptions tells of a class: a file need not hold every attribute."""
    known: list[dict[tuple[str, str], set[str]]] = []
    for side in sides:
        names: dict[tuple[str, str], set[str]] = {}
        for node in side.root.below():
            names.setdefault((node.kind, node.origin), set()).update(node.details)
        known.append(names)
    for side in sides:
        for node in side.root.below():
            if node.is_module:
                kind = (node.kind, node.origin)
                node.details = {
                    name: text
                    for name, text in node.details.items()
                    if all(name in names.get(kind, node.details) for names in known)
                }


def _from_outline(thing: object) -> Side | None:
    """A side by the description of its tree, None if it has none."""
    leaf: Callable[[str], Leaf]
    if isinstance(thing, nn.Module):
        description = describe(thing)
        data, state, label = description.data, description.state, type(unwrap(thing)).__name__
        leaf = lambda key: TensorLeaf(state[key], key)  # noqa: E731  # the two ways to the values, side by side
    elif isinstance(thing, Source) and thing.path is not None and (found := read_tree(thing.notes.metadata)):
        data, label = found, thing.path.name
        leaf = lambda key: StoredLeaf(thing, key)  # noqa: E731
    else:
        return None
    with sound():
        return Side(label, _outlined(data, leaf), True)


def _outlined(data: Mapping[str, Any], leaf: Callable[[str], Leaf]) -> Node:
    """The root of a described tree; `leaf` gives a tensor by its key."""

    def held(number: int) -> Leaf:
        entry = data["tensors"][number]
        return leaf(entry["name"]) if "name" in entry else TensorLeaf(within(entry), number)

    check_within(data["tensors"])
    nodes: dict[str, Node] = {}
    for place in outline(data):
        parent = nodes[place.path.rpartition(".")[0]] if place.path else None
        details = packed_attributes(place.attributes, data["names"])
        node = Node(place.path, parent, place.name, place.kind.rpartition(".")[0], details)
        nodes[place.path] = node
        if parent is not None:
            parent.children[node.name] = node
        for slot in place.tensors:
            tensor = held(slot.number)
            tensor.requires_grad = slot.trainable
            tensor.role = UNSAVED if slot.key is None else "parameter" if slot.parameter else "buffer"
            _insert(node, slot.name, tensor)
        for name, value in place.attributes.items():
            if name[0] != "_" and isinstance(value, dict) and not value.keys().isdisjoint(("tensor", "array")):
                (number,) = value.values()
                tensor = held(number)
                tensor.role = ATTRIBUTE
                _insert(node, name, tensor)
    return nodes[""]


def _from_state(thing: object) -> Side:
    if isinstance(thing, nn.Module):
        return as_state(_from_model(unwrap(thing)))
    if isinstance(thing, State):
        source: Source = thing.source
        items = {key: StoredLeaf(source, key) if key in source else source.notes.extra[key] for key in thing}
    elif isinstance(thing, Source):
        source = thing
        items = {key: StoredLeaf(thing, key) for key in thing if not key.startswith(BESIDE)} | dict(thing.notes.extra)
    elif isinstance(thing, Mapping):
        return _from_leaves("state", _flat(thing, ""))
    else:
        raise TypeError(
            f"diff compares models, states and files, not a {type(thing).__name__}: pass an nn.Module, a state_dict or "
            "a path"
        )
    label = Path(source.path).name if source.path is not None else "state"
    return _from_leaves(label, _flat(items, ""))


def as_state(side: Side) -> Side:
    """A side cut down to what a state_dict holds."""
    root = Node("", None)
    stack = [(side.root, root)]
    while stack:
        old, new = stack.pop()
        for name, child in old.children.items():
            if not _is_kept(child):
                continue
            plain = child.leaf is not None or child.is_value
            kind = child.kind if child.is_value else ""
            new.children[name] = copy = Node(child.path, new, kind, "", child.details if plain else {}, {}, child.leaf)
            stack.append((child, copy))
    return Side(side.label, root, False)


def _is_kept(node: Node) -> bool:
    """Whether a state_dict has something of the node."""
    return any(
        below.is_value or (below.leaf is not None and below.leaf.role not in (UNSAVED, ATTRIBUTE))
        for below in node.below()
    )


def _from_model(model: nn.Module) -> Side:
    nodes: dict[str, Node] = {}
    for path, module in walk(model).modules.items():
        parent = nodes[path.rpartition(".")[0]] if path else None
        kind = type(module)
        node = Node(path, parent, kind.__name__, kind.__module__, attributes(module), {}, None, module)
        nodes[path] = node
        if parent is not None:
            parent.children[path.rpartition(".")[2]] = node
        _add_tensors(node, module)
    return Side(nodes[""].kind, nodes[""], True)


def _add_tensors(node: Node, module: nn.Module) -> None:
    transient = module._non_persistent_buffers_set
    tensors: list[tuple[str, Tensor | None, str]] = [
        (name, tensor, "parameter") for name, tensor in module._parameters.items()
    ]
    tensors += [(name, tensor, UNSAVED if name in transient else "buffer") for name, tensor in module._buffers.items()]
    for name, value in vars(module).items():
        if name[0] != "_":
            tensors.append((name, as_tensor(value), ATTRIBUTE))
    for name, tensor, role in tensors:
        if tensor is not None:
            leaf = TensorLeaf(tensor, id(tensor))
            leaf.requires_grad, leaf.role = tensor.requires_grad, role
            node.children[name] = Node(_joined(node.path, name), node, leaf=leaf)
    if type(module).get_extra_state is not nn.Module.get_extra_state:
        for key, value in _flat(module.get_extra_state(), "_extra_state"):
            _insert(node, key, value)


def _from_leaves(label: str, items: Iterable[tuple[str, object]]) -> Side:
    root = Node("", None)
    for key, value in items:
        _insert(root, key, value)
    return Side(label, root, False)


def _insert(node: Node, key: str, value: object) -> None:
    """Put a tensor or a plain value at a dotted key below `node`."""
    *parents, name = key.split(".")
    for part in parents:
        node = node.children.setdefault(part, Node(_joined(node.path, part), node))
    path = _joined(node.path, name)
    child = node.children.setdefault(name, Node(path, node))  # a key may lie inside another: "a" and "a.b"
    tensor = as_tensor(value)
    if tensor is not None:
        value = TensorLeaf(tensor, _identity(tensor))
    if isinstance(value, (TensorLeaf, StoredLeaf)):
        child.leaf = value
    else:
        child.kind = type(value).__name__
        child.details = {"": text_of(value) or opaque(child.kind)}


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _flat(value: object, path: str) -> Iterator[tuple[str, object]]:
    """Tensors and plain values in nested dictionaries and lists, with dotted keys."""
    items: Iterable[tuple[Any, Any]]
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, (list, tuple)) and any(
        isinstance(item, (Mapping, list, tuple)) or as_tensor(item) is not None for item in value
    ):
        items = enumerate(value)
    else:
        yield path, value
        return
    for name, item in items:
        yield from _flat(item, _joined(path, str(name)))


def _identity(tensor: Tensor) -> Hashable:
    if tensor.is_nested or tensor.layout != torch.strided or tensor.is_meta or not tensor.numel():
        return id(tensor)
    return (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
