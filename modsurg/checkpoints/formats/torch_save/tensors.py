"""What the pickles of torch.save say of tensors: how each lies in its storage. Nothing is read from a storage here."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import torch

from modsurg.checkpoints.formats.file_io import Region, memory, read_into
from modsurg.checkpoints.formats.torch_save.unpickler import Loading, Made, Name, Ordered, Unpickled, checked_key, shown
from modsurg.checkpoints.formats.torch_save.zip import Archive
from modsurg.errors import FormatError, TrustError, counted

_EXPANDED: Final = 1 << 26
_DIMENSIONS: Final = 64
_STORAGE_DTYPES: Final = {
    "UntypedStorage": torch.uint8,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "BoolStorage": torch.bool,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "QInt8Storage": torch.qint8,
    "QUInt8Storage": torch.quint8,
    "QInt32Storage": torch.qint32,
}


@dataclass(slots=True)
class Storage:
    """A piece of memory that was saved. `start` counts elements; old files have storages that begin inside another."""

    key: str
    dtype: torch.dtype
    numel: int
    start: int = 0


@dataclass(slots=True)
class Stored:
    """A tensor that was saved: a way of looking at a storage.

    Attributes:
        storage: Where its values are.
        dtype: Of its values; offset and strides count elements of it.
        offset: Of its first value in the storage.
        shape: Its sizes.
        stride: Its strides.
        conj: Whether its values are the conjugates of those in the storage.
        neg: Whether they are the negatives.
        parameter: Whether it was an `nn.Parameter`.
        requires_grad: Whether it required a gradient.
        state: Its attributes.
    """

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    conj: bool = False
    neg: bool = False
    parameter: bool = False
    requires_grad: bool = False
    state: Any = None

    @property
    def numel(self) -> int:
        """How many values it shows."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes they take when they lie in order."""
        return self.numel * self.dtype.itemsize

    @property
    def first(self) -> int:
        """The byte of the storage where it begins."""
        return (self.storage.start + self.offset) * self.dtype.itemsize

    @property
    def span(self) -> int:
        """How many bytes of the storage it reaches over."""
        if not self.numel:
            return 0
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return (last + 1) * self.dtype.itemsize

    @property
    def contiguous(self) -> bool:
        """Whether its values lie in order, with nothing to be done to them."""
        expected = 1
        for size, step in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and step != expected:
                return not self.numel
            expected *= size
        return not (self.conj or self.neg)

    @property
    def identity(self) -> tuple[object, ...]:
        """Equal for two names of the same values."""
        place = (self.storage.key, self.storage.start + self.offset)
        return (*place, self.dtype, self.shape, self.stride, self.conj, self.neg)


@dataclass
class TorchFile:
    """A file of torch.save, of whatever age.

    Attributes:
        pickle: What was saved.
        places: Storage key -> where its bytes lie.
        archive: The zip archive, None for files before torch 1.6.
        swapped: Whether the values are of the other byte order than this machine's.
    """

    pickle: Unpickled
    places: Mapping[str, Region]
    archive: Archive | None = None
    swapped: bool = False

    def place(self, storage: Storage) -> Region:
        """Where the bytes of a storage lie.

        Raises:
            FormatError: The file does not have all of them.
        """
        if storage.key not in self.places:
            raise FormatError(f"its storage {storage.key[:40]!r} is missing in the file")
        region = self.places[storage.key]
        needed = (storage.start + storage.numel) * storage.dtype.itemsize
        if needed > region.nbytes:
            raise FormatError(f"its storage should have {needed:,} bytes, and the file has {region.nbytes:,}")
        return region

    def code(self, name: str) -> str:
        """The source text of a file of a TorchScript archive, `""` where there is none."""
        if self.archive is None or name not in self.archive:
            return ""
        return self.archive.read(name).decode(errors="replace")

    def swaps(self, stored: Stored) -> bool:
        """Whether the bytes of its values have to be turned round."""
        return self.swapped and stored.dtype.itemsize > 1

    def read(self, stored: Stored) -> torch.Tensor:
        """A new tensor with the values and strides that were saved, on the CPU."""
        region = self.place(stored.storage)
        values = torch.empty(stored.span // stored.dtype.itemsize, dtype=stored.dtype, device="cpu")
        read_into(Region(region.fd, region.offset + stored.first, stored.span), memory(values))
        if self.swaps(stored):
            width = stored.dtype.itemsize // (2 if stored.dtype.is_complex else 1)
            values = values.view(torch.uint8).view(-1, width).flip(1).view(-1).view(stored.dtype)
        tensor = values.as_strided(stored.shape, stored.stride) if stored.span else values.view(stored.shape)
        if stored.conj:
            tensor = tensor.conj().resolve_conj()
        return tensor.neg() if stored.neg else tensor


def storage_dtype(maker: object) -> torch.dtype:
    """The dtype of a storage class, by its name.

    Raises:
        FormatError: No storage class, or one that this version of torch does not have.
    """
    dtype = _STORAGE_DTYPES.get(maker.name) if isinstance(maker, Name) else None
    if dtype is None:
        raise FormatError(f"a storage of class {shown(maker)}, which this version of torch does not have")
    return dtype


def storage_key(value: object) -> str:
    """The key of a storage; a number in old files."""
    if type(value) is not str and type(value) is not int:
        raise FormatError(f"the key of a storage is {shown(value)}")
    return str(value)


def stored_id(saved: Any) -> Storage:
    """The storage that a persistent id in a zip archive means."""
    if saved[0] != "storage" or type(saved[4]) is not int or not 0 <= saved[4] < 1 << 62:
        raise FormatError("the pickle refers to something that is not a storage of torch")
    return Storage(storage_key(saved[2]), storage_dtype(saved[1]), saved[4])


def loading(persistent: Callable[[object], object]) -> Loading:
    """The calls in a pickle of torch.save that mean data, and are carried out on `Stored`."""
    return Loading(_CALLS, persistent)


def _rebuild(storage: Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *rest: Any) -> Stored:
    """Of `torch._utils._rebuild_tensor` and `_v2`; `rest` is requires_grad, hooks, metadata."""
    stored = checked(storage, (offset, shape, stride), rest[2] if len(rest) > 2 else None)
    return replace(stored, requires_grad=bool(rest) and rest[0] is True)


def _rebuild_v3(storage: Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *rest: Any) -> Stored:
    """Of dtypes without a storage class; `rest` is requires_grad, hooks, dtype, metadata."""
    dtype = getattr(torch, rest[2].name, None)
    if rest[2].module != "torch" or not isinstance(dtype, torch.dtype):
        raise FormatError(f"a tensor of dtype {shown(rest[2])}, which this version of torch does not have")
    stored = checked(storage, (offset, shape, stride), rest[3] if len(rest) > 3 else None, dtype)
    return replace(stored, requires_grad=rest[0] is True)


def checked(
    storage: Storage, view: tuple[Any, Any, Any], metadata: Any = None, dtype: torch.dtype | None = None
) -> Stored:
    """A tensor of `view` (offset, shape, strides) that lies inside its storage.

    Raises:
        FormatError: It does not.
    """
    offset, shape, stride = view[0], tuple(view[1]), tuple(view[2])
    if not len(shape) == len(stride) <= _DIMENSIONS or not all(
        type(n) is int and 0 <= n < 1 << 62 for n in (offset, *shape, *stride)
    ):
        raise FormatError("a tensor of a shape, strides or an offset that can't be")
    if not is_countable(shape):
        raise FormatError(f"a tensor of a shape that no memory can have: {str(shape)[:80]}")
    bits = metadata or {}
    dtype = dtype or storage.dtype
    elements = counted(storage.numel, "element", "elements")
    stored = Stored(storage, dtype, offset, shape, stride, bool(bits.get("conj")), bool(bits.get("neg")))
    room = storage.numel * storage.dtype.itemsize - offset * dtype.itemsize
    if stored.numel and (stored.numel >= 1 << 62 or stored.span > room):
        raise FormatError(f"a tensor of shape {shape} reaches beyond its storage of {elements}")
    if stored.nbytes > max(_EXPANDED, 16 * storage.numel * storage.dtype.itemsize):
        raise FormatError(f"a tensor of shape {shape} is to be made of only {elements} by repetition")
    return stored


def is_countable(shape: tuple[int, ...]) -> bool:
    """Whether torch can make strides for it: a size of 0 does not excuse the others."""
    return math.prod(max(size, 1) for size in shape) < 1 << 62


def _rebuild_parameter(data: Any, requires_grad: Any = True, _: Any = None, state: Any = None) -> Any:
    if not isinstance(data, Stored):
        return data
    return replace(data, parameter=True, requires_grad=requires_grad is True, state=state)


def _rebuild_typed(function: Any, kind: Any, args: Any, state: Any) -> object:
    """A tensor with attributes. A subclass of Tensor stays unmade."""
    plain = str(kind) in ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")
    if not plain:
        return Made(kind, tuple(args), called=False)
    rebuild = _CALLS.get(str(function))
    made = rebuild(*args) if rebuild else Made(function, tuple(args), called=True)
    return replace(made, state=state) if isinstance(made, Stored) else made


def _encode(text: str, encoding: str = "utf-8") -> bytes:
    """`_codecs.encode`, by which old pickles write bytes."""
    if encoding not in ("latin1", "latin-1", "utf-8", "ascii"):
        raise FormatError(f"bytes in the encoding {shown(encoding)}")
    return text.encode(encoding)


def _plain_bytes(kind: type[bytes | bytearray], content: object = b"", encoding: str = "latin1") -> bytes | bytearray:
    """`bytes` and `bytearray` of what is in the pickle; of a number they would be as long as it says."""
    if isinstance(content, str):
        content = _encode(content, encoding)
    if not isinstance(content, bytes):
        raise TrustError(f"refused: opening it would run builtins.{kind.__name__}. Nothing ran")
    return kind(content)


class Device(str):
    """The text of a `torch.device`."""


def _device(kind: Any, index: Any = None) -> Device:
    return Device(shown(kind) if index is None else f"{shown(kind)}:{shown(index)}")


def _mapping(maker: str, items: Any = ()) -> Ordered:
    ordered = Ordered()
    ordered.maker = maker
    for key, value in items.items() if isinstance(items, dict) else items:
        ordered[checked_key(key)] = value
    return ordered


def _default_mapping(default: Any = None, items: Any = ()) -> Ordered:
    ordered = _mapping("collections.defaultdict", items)
    ordered.default = default
    return ordered


_CALLS: Final[dict[str, Callable[..., object]]] = {
    "torch._utils._rebuild_tensor": _rebuild,
    "torch._utils._rebuild_tensor_v2": _rebuild,
    "torch._utils._rebuild_tensor_v3": _rebuild_v3,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch._tensor._rebuild_from_type_v2": _rebuild_typed,
    "torch.nn.parameter.Parameter": _rebuild_parameter,
    "torch.Size": lambda items=(): torch.Size(items),
    "torch.device": _device,
    "collections.OrderedDict": partial(_mapping, "collections.OrderedDict"),
    "collections.Counter": partial(_mapping, "collections.Counter"),
    "collections.defaultdict": _default_mapping,
    "_codecs.encode": _encode,
    "builtins.set": lambda items=(): {checked_key(item) for item in items},
    "builtins.complex": lambda real, imag: complex(real, imag),
    "builtins.bytes": partial(_plain_bytes, bytes),
    "builtins.bytearray": partial(_plain_bytes, bytearray),
}
