"""A pickled module seen as data: its tree and its tensors, whether or not its classes exist here."""

from typing import Any

from modsurg.checkpoints.formats.torch_save.tensors import Stored
from modsurg.checkpoints.formats.torch_save.unpickler import Made
from modsurg.errors import FormatError
from modsurg.structure.schema import VERSION, checked

_SLOTS = ("_parameters", "_buffers", "_modules")
_DEEPEST = 300
_MOST = 1_000_000
_PLAIN = frozenset({type(None), bool, int, float, str})


def is_module(value: object) -> bool:
    """Whether it is what is left of a pickled `nn.Module`."""
    return isinstance(value, Made) and isinstance(value.state, dict) and all(slot in value.state for slot in _SLOTS)


def module_state(root: Made) -> dict[str, Stored]:
    """The state_dict of a pickled module.

    Raises:
        FormatError: It is damaged, or holds itself.
    """
    state: dict[str, Stored] = {}
    stack = [("", root, 0)]
    for _ in range(_MOST):
        if not stack:
            return state
        prefix, module, depth = stack.pop()
        if depth > _DEEPEST:
            break
        passing = module.state.get("_non_persistent_buffers_set", ())
        for slot in ("_parameters", "_buffers"):
            for name, value in _items(module, slot):
                if isinstance(value, Stored) and not (slot == "_buffers" and name in passing):
                    state[prefix + name] = value
        children = [(name, child) for name, child in _items(module, "_modules") if is_module(child)]
        stack.extend((f"{prefix}{name}.", child, depth + 1) for name, child in reversed(children))
    raise FormatError("its modules hold one another without an end")


def module_tree(root: Made) -> dict[str, Any]:
    """The tree of a pickled module as `outline` reads it: classes, children, shapes, and what attributes are plain.

    Raises:
        FormatError: It is damaged, or holds itself.
    """
    names: dict[str, int] = {}
    tensors: dict[object, int] = {}
    entries: list[dict[str, Any]] = []
    numbers: dict[int, int] = {}
    nodes: list[dict[str, Any]] = []
    keys = {stored.identity: key for key, stored in reversed(module_state(root).items())}
    for module in _children_first(root):
        node: dict[str, Any] = {"class": names.setdefault(_class_name(module), len(names))}
        for part, slot in (("parameters", "_parameters"), ("buffers", "_buffers")):
            node[part] = {}
            for name, value in _items(module, slot):
                if isinstance(value, Stored):
                    number = tensors.setdefault(value.identity, len(tensors))
                    if number == len(entries):
                        entries.append(_entry(value, keys.get(value.identity), slot == "_parameters"))
                    node[part][name] = number
        node["children"] = {name: numbers[id(child)] for name, child in _items(module, "_modules") if is_module(child)}
        node["attributes"] = {
            name: _plain(value) for name, value in module.state.items() if type(name) is str and _is_plain(value)
        }
        numbers[id(module)] = len(nodes)
        nodes.append(node)
    tree = {"version": VERSION, "partial": True, "names": list(names), "attributes": [], "shared": []}
    return checked({**tree, "tensors": entries, "modules": nodes, "root": numbers[id(root)]})


def _children_first(root: Made) -> list[Made]:
    order: dict[int, Made] = {}
    entered: set[int] = set()
    stack = [root]
    while stack:
        module = stack[-1]
        if id(module) in entered:
            order.setdefault(id(module), stack.pop())
            continue
        entered.add(id(module))
        stack.extend(child for _, child in _items(module, "_modules") if is_module(child) and id(child) not in entered)
    return list(order.values())


def _items(module: Made, slot: str) -> list[tuple[str, Any]]:
    found = module.state[slot]
    if not isinstance(found, dict) or not all(type(name) is str for name in found):
        raise FormatError(f"the {slot} of a {module.maker} are damaged")
    return list(found.items())


def _class_name(module: Made) -> str:
    return ":".join(str(module.maker).rsplit(".", 1))


def _entry(stored: Stored, key: str | None, parameter: bool) -> dict[str, Any]:
    named = {} if key is None else {"name": key}
    shape = list(stored.shape)
    return {**named, "dtype": str(stored.dtype)[6:], "shape": shape, **({"parameter": True} if parameter else {})}


def _is_plain(value: object) -> bool:
    return type(value) in _PLAIN or (type(value) is tuple and all(type(item) in _PLAIN for item in value))


def _plain(value: Any) -> Any:
    return list(value) if type(value) is tuple else value
