"""What a whole-model file says of its tree, read without torch and without looking up a single class.

`describe` writes the tree. Here it is read for those who only look at it: `modsurg summary FILE`, `diff`.
"""

import json
import math
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from modsurg.errors import FormatError, ModsurgError

KEY = "modsurg.tree"
BESIDE = "modsurg.beside."
VERSION = 2
PATHS = 100_000
PATHS_PER_MODULE = 100


@dataclass(frozen=True, slots=True)
class Slot:
    """A parameter or buffer at its place in a module.

    Attributes:
        name: In the module, such as `weight`.
        key: Of its values in the file; None where the tree itself holds them. Tied slots have the same key.
        dtype: Such as `float32`.
        shape: Its sizes; `()` for a number.
        parameter: False for a buffer.
        trainable: Whether it requires a gradient.
        number: Of the tensor; the same at every slot of one tensor.
    """

    name: str
    key: str | None
    dtype: str
    shape: tuple[int, ...]
    parameter: bool
    trainable: bool
    number: int


@dataclass(frozen=True, slots=True)
class Place:
    """A module at one of its paths.

    Attributes:
        path: Dotted, `""` for the root.
        kind: The class, as in `torch.nn.modules.conv.Conv2d`.
        number: Of the module; the same at every path of one module.
        tensors: Its own parameters, then its own buffers; empty slots (`bias=None`) are left out.
        attributes: Its attributes as data; numbers, strings, true, false, null and lists of them are plain.
    """

    path: str
    kind: str
    number: int
    tensors: tuple[Slot, ...]
    attributes: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The class alone, as in `Conv2d`."""
        return self.kind.rpartition(".")[2]


def read_tree(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The tree in the metadata of a safetensors file as data, None if the file holds a state alone.

    Raises:
        FormatError: A tree that is damaged, or of a later version.
    """
    text = metadata.get(KEY)
    if text is None:
        return None
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"the tree can't be read: {error}") from None
    return checked(data)


def checked(data: Any) -> dict[str, Any]:
    """The tree itself, if its modules and tensors are numbered as they should be.

    Raises:
        FormatError: It is damaged, or of a later version.
    """
    if not isinstance(data, dict) or type(data.get("version")) is not int:
        raise FormatError("this is not a tree that modsurg wrote")
    if data["version"] > VERSION:
        raise FormatError(
            f"the tree has version {data['version']}, this modsurg reads up to {VERSION}: upgrade modsurg"
        )
    if data["version"] < VERSION:
        raise FormatError(f"the tree has version {data['version']}, which modsurg reads no more: save the model again")
    with sound():
        _check(data)
    return data


@contextmanager
def sound() -> Generator[None]:
    """Whatever goes wrong in the block means that the tree is damaged.

    Raises:
        FormatError: Says so.
    """
    try:
        yield
    except ModsurgError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        raise FormatError(f"the tree is damaged: {type(error).__name__}: {error}") from error


def _check(data: dict[str, Any]) -> None:
    tables = ("names", "attributes", "shared", "tensors", "modules")
    if not all(type(data[table]) is list for table in tables):
        raise ValueError(f"one of {', '.join(tables)} is not a list")
    names, modules, tensors = data["names"], data["modules"], data["tensors"]
    if (
        type(data["root"]) is not int
        or data["root"] not in range(len(modules))
        or not all(type(name) is str for name in names)
    ):
        raise ValueError("there is no root, or a name is not a string")
    if not all(type(each) is dict for each in (*data["attributes"], *tensors, *modules)):
        raise ValueError("a list where a module, a tensor or attributes should be")
    for entry in tensors:
        if not _is_shape(entry["shape"]) or type(entry["dtype"]) is not str or type(entry.get("name", "")) is not str:
            raise ValueError("a tensor without a name, a dtype or a shape that can be")
    _check_modules(modules, names, data["attributes"], tensors)


def _is_shape(sizes: Any) -> bool:
    """Whether it is a list of sizes, of no more elements than torch can count."""
    whole = type(sizes) is list and all(type(size) is int and size >= 0 for size in sizes)
    return whole and math.prod(max(size, 1) for size in sizes) < 1 << 63


def _check_modules(modules: list[Any], names: list[str], attributes: list[Any], tensors: list[Any]) -> None:
    sizes: list[int] = []
    most = PATHS + PATHS_PER_MODULE * len(modules)
    for node in modules:
        if node["class"] not in range(len(names)):
            raise ValueError("a class that is not in the table")
        children = [child for child in node.get("children", {}).values() if child is not None]
        if any("." in name or not name for name in node.get("children", {})):
            raise ValueError("a child without a proper name")
        if any(type(child) is not int or not 0 <= child < len(sizes) for child in children):
            raise ValueError("a module that comes before its children")
        sizes.append(1 + sum(sizes[child] for child in children))
        if sizes[-1] > most:
            raise ValueError(f"over {most} paths of {len(modules)} modules")
        own = node.get("attributes", {})
        if type(own) is not dict and own not in range(len(attributes)):
            raise ValueError("attributes that are not in the table")
        for kind in ("parameters", "buffers"):
            for number in node.get(kind, {}).values():
                if number is not None and (type(number) is not int or not 0 <= number < len(tensors)):
                    raise ValueError("a tensor that is not in the table")


def outline(data: Mapping[str, Any]) -> Iterator[Place]:
    """Every path of the tree in module order, a module with several paths at each of them.

    Args:
        data: What `read_tree` or `describe` gives.

    Example:
        >>> data = {
        ...     "version": 2,
        ...     "names": ["torch.nn.modules.linear:Linear", "torch.nn.modules.container:Sequential"],
        ...     "tensors": [{"name": "0.weight", "dtype": "float32", "shape": [1, 2], "parameter": True}],
        ...     "modules": [{"class": 0, "parameters": {"weight": 0}}, {"class": 1, "children": {"0": 0}}],
        ...     "root": 1,
        ... }
        >>> for place in outline(data):
        ...     print(repr(place.path), place.name, [(slot.key, slot.shape) for slot in place.tensors])
        '' Sequential []
        '0' Linear [('0.weight', (1, 2))]
    """
    modules = data["modules"]
    stack = [("", data["root"])]
    while stack:
        path, number = stack.pop()
        node = modules[number]
        yield Place(
            path, data["names"][node["class"]].replace(":", "."), number, _slots(data, node), _attributes(data, node)
        )
        children = [(name, child) for name, child in node.get("children", {}).items() if child is not None]
        stack.extend((f"{path}.{name}" if path else name, child) for name, child in reversed(children))


def _slots(data: Mapping[str, Any], node: Mapping[str, Any]) -> tuple[Slot, ...]:
    return tuple(
        _slot(name, number, data["tensors"][number])
        for kind in ("parameters", "buffers")
        for name, number in node.get(kind, {}).items()
        if number is not None
    )


def _slot(name: str, number: int, entry: Mapping[str, Any]) -> Slot:
    parameter = entry.get("parameter", False)
    trainable = entry.get("requires_grad", parameter)
    return Slot(name, entry.get("name"), entry["dtype"], tuple(entry["shape"]), parameter, trainable, number)


def _attributes(data: Mapping[str, Any], node: Mapping[str, Any]) -> Mapping[str, Any]:
    attributes = node.get("attributes", {})
    found: Mapping[str, Any] = data["attributes"][attributes] if isinstance(attributes, int) else attributes
    return found
