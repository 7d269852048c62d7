"""What a comparison looks at: modules, tensors and plain values, each at its place in a tree."""

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from modsurg.checkpoints.formats.file_io import Region, memory, read_into
from modsurg.checkpoints.formats.remote import pread
from modsurg.checkpoints.formats.source import Source

SAMPLE = 64
PIECE = 4 << 20
UNSAVED = "buffer, not saved"
ATTRIBUTE = "attribute"


class Leaf(ABC):
    """A tensor that need not be in memory.

    Attributes:
        identity: Equal for two names of one tensor.
        dtype: Of the values.
        shape: None for a parameter of a lazy module.
        requires_grad: None where that is not known.
        role: "parameter", "buffer", "buffer, not saved" or "attribute"; None where that is not known.
    """

    __slots__ = ("dtype", "identity", "requires_grad", "role", "shape")

    def __init__(self, identity: Hashable, dtype: torch.dtype, shape: tuple[int, ...] | None) -> None:
        self.identity = identity
        self.dtype = dtype
        self.shape = shape
        self.requires_grad: bool | None = None
        self.role: str | None = None

    @property
    def nbytes(self) -> int:
        """Size of the values."""
        return math.prod(self.shape or ()) * self.dtype.itemsize

    @abstractmethod
    def read(self) -> Tensor | None:
        """The values; None where there are none, as on meta."""

    @abstractmethod
    def sample(self) -> Tensor | None:
        """A few values, to guess which tensors belong together."""


class TensorLeaf(Leaf):
    """A tensor in memory."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor, identity: Hashable) -> None:
        if tensor.is_nested:
            tensor = torch.cat([part.reshape(-1) for part in tensor.unbind()])
        super().__init__(identity, tensor.dtype, None if is_lazy(tensor) else tuple(tensor.shape))
        self.tensor = tensor

    def read(self) -> Tensor | None:
        """The tensor itself; one that is spread over processes is gathered, which all of them do together."""
        if self.shape is None or self.tensor.is_meta:
            return None
        gather = getattr(self.tensor, "full_tensor", None)
        return gather().detach() if gather is not None else self.tensor.detach()

    def sample(self) -> Tensor | None:
        """From the middle of the tensor."""
        values = self.read()
        return None if values is None else _middle(values)


class StoredLeaf(Leaf):
    """A tensor in a file."""

    __slots__ = ("key", "source")

    def __init__(self, source: Source, key: str) -> None:
        super().__init__(source.notes.ties.get(key, key), source[key].dtype, source[key].shape)
        self.source = source
        self.key = key

    def read(self) -> Tensor | None:
        """The whole tensor, read anew each time."""
        return self.source.read(self.key)

    def sample(self) -> Tensor:
        """From the middle of the tensor, without reading the rest where the format allows that."""
        region = self.source.region(self.key)
        if region is None:
            return _middle(self.source.read(self.key)).clone()  # the rest is given back
        size = self.dtype.itemsize
        values = torch.empty(min(SAMPLE, region.nbytes // size), dtype=self.dtype, device="cpu")
        start = (region.nbytes // size - len(values)) // 2
        read_into(Region(region.fd, region.offset + start * size, values.nbytes), memory(values))
        return values


def same_bytes(old: Leaf, new: Leaf) -> bool:
    """Whether two stored tensors are equal byte for byte, in small pieces; False also where that can't be told."""
    if not isinstance(old, StoredLeaf) or not isinstance(new, StoredLeaf) or old.dtype != new.dtype:
        return False
    one, other = old.source.region(old.key), new.source.region(new.key)
    if one is None or other is None or one.nbytes != other.nbytes:
        return False
    for start in range(0, one.nbytes, PIECE):
        size = min(PIECE, one.nbytes - start)
        piece = pread(one.fd, size, one.offset + start)
        if len(piece) != size or piece != pread(other.fd, size, other.offset + start):
            return False
    return True


@dataclass(slots=True, eq=False)
class Node:
    """A module, a tensor or a plain value at its place.

    Attributes:
        path: Dotted; "" for the root.
        parent: None for the root.
        kind: Class name; "" for what only the keys of a file tell of.
        origin: The module that defines the class, to tell two classes of one name apart.
        details: Plain attributes, as text. A plain value of a state has one, called "".
        children: By name, in order.
        leaf: The tensor, if it is one.
        module: The module, if it is one in memory.
    """

    path: str
    parent: "Node | None"
    kind: str = ""
    origin: str = ""
    details: Mapping[str, str] = field(default_factory=dict)
    children: dict[str, "Node"] = field(default_factory=dict)
    leaf: Leaf | None = None
    module: nn.Module | None = None

    @property
    def name(self) -> str:
        """The last segment of the path."""
        return self.path.rpartition(".")[2]

    @property
    def identity(self) -> Hashable:
        """Equal for two paths of one module in memory."""
        return id(self if self.module is None else self.module)

    @property
    def is_value(self) -> bool:
        """Whether it is neither a module nor a tensor."""
        return "" in self.details

    @property
    def is_opaque(self) -> bool:
        """Whether it is a value of which only the class is known."""
        return self.details.get("") == opaque(self.kind)

    @property
    def is_module(self) -> bool:
        """Whether it is a module of a known class."""
        return self.leaf is None and bool(self.kind) and not self.is_value

    @property
    def described(self) -> str:
        """What it is, on one line."""
        if self.leaf is not None:
            return f"{str(self.leaf.dtype).removeprefix('torch.')} {shape_text(self.leaf.shape)}"
        if self.is_value:
            return self.details[""]
        if self.kind:
            arguments = self.module.extra_repr() if self.module is not None else self._arguments()
            return f"{self.kind}({arguments})" if arguments and "\n" not in arguments else self.kind
        tensors = sum(below.leaf is not None for below in self.below())
        return f"{tensors:,} tensor{'s' * (tensors != 1)}"

    def _arguments(self) -> str:
        return ", ".join(f"{name}={text}" for name, text in self.details.items())

    def is_like(self, other: "Node") -> bool:
        """Whether class and arguments are equal."""
        return (self.kind, self.origin, self.details) == (other.kind, other.origin, other.details)

    def upward(self) -> Iterator["Node"]:
        """The node and everything that holds it, the root last."""
        node: Node | None = self
        while node is not None:
            yield node
            node = node.parent

    def below(self) -> Iterator["Node"]:
        """The node and everything under it, parents first."""
        stack = [self]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(reversed(node.children.values()))


def opaque(kind: str) -> str:
    """The text for a value that can't be told from another of its class."""
    return f"a {kind}"


def shape_text(shape: tuple[int, ...] | None) -> str:
    """A shape as torch prints it."""
    return "of a shape not known yet" if shape is None else str(shape)


def _middle(values: Tensor) -> Tensor:
    if values.layout != torch.strided or values.is_quantized or values.numel() <= SAMPLE:
        return values
    flat = values.reshape(-1)
    start = (values.numel() - SAMPLE) // 2
    return flat[start : start + SAMPLE]
