"""A state_dict in memory, seen as a source like any file."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from modsurg.checkpoints.formats.documents import EXTRA_STATE
from modsurg.checkpoints.formats.file_io import why_not_kept
from modsurg.checkpoints.formats.source import Entry, Notes, Source
from modsurg.errors import SaveError, counted


class MemorySource(Source):
    """A state_dict. Its tensors are not copied; what shares its values with an earlier key is tied to it.

    Args:
        state: Key -> tensor, and plain data under the keys of `get_extra_state`.
        metadata: The strings to keep with it.

    Raises:
        SaveError: A value that is not a dense, initialised tensor with values, named by its key.
    """

    def __init__(self, state: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
        self._state = state
        self._copies: dict[str, torch.Tensor] = {}
        entries: dict[str, Entry] = {}
        ties: dict[str, str] = {}
        extra: dict[str, object] = {}
        first: dict[object, str] = {}
        for key, value in state.items():
            if not isinstance(key, str):
                raise SaveError(f"the key {key!r} is not a string, so this is not a state_dict")
            if not isinstance(value, torch.Tensor):
                extra[key] = _checked_extra(key, value)
                continue
            entries[key] = _entry(key, value)
            same = first.setdefault(_identity(value), key) if value.numel() else key
            if same != key:
                ties[key] = same
        versions = {
            path: versions["version"]
            for path, versions in getattr(state, "_metadata", {}).items()
            if type(versions.get("version")) is int and versions["version"] != 1  # transformers has "0.0.5"
        }
        super().__init__(None, entries, Notes(metadata or {}, ties, extra, versions, list(state)))

    def read(self, key: str) -> torch.Tensor:
        """The tensor itself."""
        tensor: torch.Tensor = self._copies[key] if key in self._copies else self._state[key]
        return tensor.detach()

    def keep_apart(
        self, keys: Iterable[str], places: Iterable[torch.Tensor], stays: Mapping[str, torch.Tensor]
    ) -> None:
        """Copy the values that lie in memory which is about to be overwritten.

        Args:
            keys: What will be read.
            places: Tensors that will be filled.
            stays: By key, the tensor that it will fill: where that is the value itself, nothing changes.
        """
        dense = (tensor for tensor in places if tensor.layout is torch.strided and not is_lazy(tensor))
        memories = {tensor.untyped_storage().data_ptr() for tensor in dense} - {0}
        for key in keys:
            value = self.read(key)
            if value.untyped_storage().data_ptr() not in memories:
                continue
            if key not in stays or _identity(stays[key]) != _identity(value):
                self._copies[key] = value.clone()


def _identity(tensor: torch.Tensor) -> object:
    return (
        tensor.device,
        tensor.data_ptr(),
        tensor.dtype,
        tensor.shape,
        tensor.stride(),
        tensor.is_conj(),
        tensor.is_neg(),
    )


def _entry(key: str, tensor: torch.Tensor) -> Entry:
    if problem := why_not_kept(tensor):
        raise SaveError(f"{key} {problem}")
    return Entry(key, tensor.dtype, tuple(tensor.shape), tensor.numel() * tensor.element_size())


def _checked_extra(key: str, value: object) -> object:
    if key.rpartition(".")[2] == EXTRA_STATE:
        return value
    kind = type(value).__name__
    if isinstance(value, Mapping) and value and all(isinstance(item, torch.Tensor) for item in value.values()):
        raise SaveError(
            f"{key} is itself a state ({kind} of {counted(len(value), 'tensor', 'tensors')}): give state[{key!r}]"
        )
    if hasattr(value, "__array__"):
        raise SaveError(f"{key} is of type {kind}, and a state_dict holds tensors: give torch.as_tensor of it")
    raise SaveError(
        f"{key} is of type {kind}, and a state_dict holds tensors: leave it out, save it in metadata={{{key!r}: ...}} "
        "as text, or keep a whole run with save_checkpoint"
    )
