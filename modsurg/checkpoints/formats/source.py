"""What every checkpoint format looks like from outside: a mapping from key to `Entry`, read piece by piece."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

import torch

from modsurg.checkpoints.formats.file_io import Region, memory, read_into
from modsurg.errors import FormatError, counted


@dataclass(frozen=True, slots=True)
class Entry:
    """What is known of a stored tensor without reading it.

    Attributes:
        name: The key in the state_dict.
        dtype: Of the stored values.
        shape: Of the stored values; `()` for a number.
        nbytes: Size of the values in bytes.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Notes:
    """What a state holds besides its tensors.

    Attributes:
        metadata: The user's own strings.
        ties: Other name -> the name under which those same values are stored.
        extra: Values of `get_extra_state` that are not tensors, by key.
        versions: Module path -> the module's `_version`, where it is not 1.
        order: Every key, tensors and extra state, in the order of the state_dict; empty where tensors come first.
    """

    metadata: Mapping[str, str] = field(default_factory=dict)
    ties: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, object] = field(default_factory=dict)
    versions: Mapping[str, int] = field(default_factory=dict)
    order: Sequence[str] = ()


class Source(Mapping[str, Entry]):
    """A state that can be read tensor by tensor: a file, a set of files, or a dictionary in memory.

    A format gives `entries` and `notes` to the constructor and says where the values are: by `region`, if they lie in
    a file as they are, or by overriding `read`.

    Attributes:
        path: The file or directory, None for a dictionary in memory.
        notes: What there is besides tensors. Names in `notes.ties` are keys of the mapping like any other.
        taken: Where in a larger checkpoint the state was, as in `"model.state_dict"`; `""` for the top.
        left: What lay beside it in that checkpoint.
        plain: What of that is a number, a text or None, or holds only those, by name.
        left_tensors: What of that holds tensors.
        unreadable: Keys of the state whose tensors can't be read, and why.
        mirror: Of a file elsewhere: deleted when the source is no longer used.
    """

    taken: str = ""
    left: Sequence[str] = ()
    plain: Mapping[str, object] = MappingProxyType({})
    left_tensors: Sequence[str] = ()
    unreadable: Mapping[str, str] = MappingProxyType({})
    mirror: object = None

    def check_readable(self, wanted: Callable[[str], bool] = lambda key: True) -> None:
        """See that every tensor that is wanted can be read.

        Raises:
            FormatError: One can't.
        """
        for key, reason in self.unreadable.items():
            if wanted(key):
                raise FormatError(f"{self.path}: {reason}. Try: only=[...] without it")

    def __init__(self, path: Path | None, entries: Mapping[str, Entry], notes: Notes) -> None:
        self.path = path
        self.notes = notes
        self._entries = entries

    def __getitem__(self, key: str) -> Entry:
        return self._entries[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {counted(len(self), 'tensor', 'tensors')}, {self.path or 'in memory'}>"

    @property
    def keys_in_order(self) -> Sequence[str]:
        """Tensors and extra state, in the order of the state_dict."""
        return self.notes.order or [*self._entries, *self.notes.extra]

    @property
    def stored(self) -> list[str]:
        """The keys that hold values of their own: all but the tied ones."""
        return [key for key in self._entries if key not in self.notes.ties]

    def region(self, key: str) -> Region | None:
        """Where the values lie in a file, None if they have to be unpacked by `read`."""
        return None

    def read(self, key: str) -> torch.Tensor:
        """The values, on the CPU. From a file, a new tensor each time; from memory, the tensor itself."""
        region = self.region(key)
        assert region is not None, "a format without regions has to override read"
        entry = self[key]
        tensor = torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
        read_into(region, memory(tensor))
        return tensor

    def check(self, key: str) -> bool | None:
        """Whether the stored hash of this tensor holds; None where no hash was stored."""
        return None

    @property
    def sealed(self) -> bool | None:
        """Whether the stored hash of the header holds; None where it has none."""
        return None

    def rest(self) -> str:
        """What is wrong with what is in the file besides the state; empty if nothing is, or if nobody can tell."""
        return ""

    def close(self) -> None:
        """Give back the files. Nothing can be read afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
