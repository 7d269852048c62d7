"""A source seen through other names or another dtype, still read tensor by tensor."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import islice

import torch

from modsurg.checkpoints.formats.documents import RUN
from modsurg.checkpoints.formats.file_io import Region
from modsurg.checkpoints.formats.source import Entry, Notes, Source
from modsurg.errors import CheckpointError, LoadError, counted
from modsurg.structure.schema import KEY as TREE

# Of values that are quantised in blocks: the scales, which are powers of two, and the values.
_PARTS = {getattr(torch, name, None) for name in ("float8_e8m0fnu", "float4_e2m1fn_x2")}


class DerivedSource(Source):
    """Some of a source's keys under new names, floating values in another dtype.

    Args:
        source: Where the values come from; closed with this one.
        names: New name -> the source's name, of tensors and extra state, in the new order. None keeps all.
        dtype: For floating tensors; others keep theirs, and so do those of a format that is quantised in blocks.
        allow_overflow: Whether finite values may become infinite in `dtype`.
        metadata: These strings instead of the source's; of those, what describes a whole model or run stays only while
            every tensor is there by its name.
    """

    def __init__(
        self,
        source: Source,
        *,
        names: Mapping[str, str] | None = None,
        dtype: torch.dtype | None = None,
        allow_overflow: bool = False,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self._source = source
        self._dtype = dtype
        self._allow_overflow = allow_overflow
        self._names = names = {key: key for key in source.keys_in_order} if names is None else dict(names)
        entries = {name: self._entry(name, source[old]) for name, old in names.items() if old in source}
        first: dict[str, str] = {}
        ties = {}
        for name in entries:
            same = first.setdefault(source.notes.ties.get(names[name], names[name]), name)
            if same != name:
                ties[name] = same
        extra = {name: source.notes.extra[old] for name, old in names.items() if old in source.notes.extra}
        same_names = all(name == old for name, old in names.items())
        versions = rename_versions(source.notes.versions, names)
        strings = source.notes.metadata if metadata is None else metadata
        if metadata is None and not (same_names and len(names) == len(source.keys_in_order)):
            strings = {name: text for name, text in strings.items() if name not in (RUN, TREE)}
        super().__init__(source.path, entries, Notes(strings, ties, extra, versions, list(names)))

    @property
    def keep_own_dtype(self) -> list[str]:
        """The floating tensors whose dtype is not the one asked for."""
        if self._dtype is None:
            return []
        return [name for name, entry in self.items() if entry.dtype.is_floating_point and entry.dtype != self._dtype]

    def region(self, key: str) -> Region | None:
        """Where the values lie, if they are wanted as they are there."""
        same = self[key].dtype == self._source[self._names[key]].dtype
        return self._source.region(self._names[key]) if same else None

    def read(self, key: str) -> torch.Tensor:
        """The values in the dtype asked for.

        Raises:
            LoadError: A finite value is beyond the dtype's range.
        """
        values = self._source.read(self._names[key])
        dtype = self[key].dtype
        if not self._allow_overflow and (count := count_overflows(values, dtype)):
            wider = (each for each in (torch.bfloat16, torch.float64) if not count_overflows(values, each))
            fix = "".join(f"dtype={each}, or " for each in islice(wider, 1))
            raise LoadError(
                f"{key}: {counted(count, 'finite value does', 'finite values do')} not fit in {dtype}. "
                f"Try: {fix}allow_overflow=True"
            )
        return values.to(dtype)

    def check(self, key: str) -> bool | None:
        """Whether the stored hash of the original holds."""
        return self._source.check(self._names[key])

    @property
    def sealed(self) -> bool | None:
        """Whether the stored hash of the original's header holds."""
        return self._source.sealed

    def close(self) -> None:
        """Close the original."""
        self._source.close()

    def _entry(self, name: str, entry: Entry) -> Entry:
        if self._dtype is None or not is_general(entry.dtype):
            return replace(entry, name=name)
        count = entry.nbytes // entry.dtype.itemsize
        return Entry(name, self._dtype, entry.shape, count * self._dtype.itemsize)


def rename_versions(versions: Mapping[str, int], names: Mapping[str, str]) -> dict[str, int]:
    """Bring the versions of modules under new names.

    Args:
        versions: Old path of a module -> its version.
        names: New key -> old key. A module is where the keys that it holds directly are, otherwise where those
            below it keep the rest of their name.

    Example:
        >>> rename_versions({"norm": 2}, {"body.norm.weight": "norm.weight"})
        {'body.norm': 2}
    """
    renamed: dict[str, int] = {}
    below: dict[str, int] = {}
    for new, old in names.items() if versions else ():
        path, key = old.rpartition(".")[0], new.rpartition(".")[0]
        if path in versions:
            renamed[key] = versions[path]
        while path:
            path = path.rpartition(".")[0]
            tail = old[len(path) :] if path else f".{old}"
            if path in versions and f".{new}".endswith(tail):
                below[f".{new}".removesuffix(tail).removeprefix(".")] = versions[path]
    return below | renamed


def count_overflows(values: torch.Tensor, dtype: torch.dtype) -> int:
    """Count the finite values beyond the range of a floating dtype, which there become infinite or its largest."""
    if not (values.is_floating_point() and dtype.is_floating_point) or values.dtype is dtype or values.is_meta:
        return 0
    if torch.finfo(values.dtype).max <= torch.finfo(dtype).max:
        return 0
    wide = values if values.dtype.itemsize > 1 else values.float()
    limits = torch.finfo(dtype)
    beyond = ~wide.to(dtype).to(wide.dtype).isfinite()
    if dtype.itemsize == 1:  # some of these saturate
        beyond |= wide.float().abs() > limits.max * (1 + limits.eps / 4)  # what rounds to the largest value fits
    return int((wide.isfinite() & beyond).sum())


def is_general(dtype: torch.dtype) -> bool:
    """Whether any floating value may be kept in it, rounded: not one without a sign, and not pairs of four bits."""
    return dtype.is_floating_point and dtype not in _PARTS


def floating(dtype: torch.dtype | None, error: type[CheckpointError]) -> torch.dtype | None:
    """The dtype for floating tensors, if it can be one.

    Raises:
        CheckpointError: As `error`: it holds whole numbers, or is not a dtype.
    """
    if dtype is None or (isinstance(dtype, torch.dtype) and is_general(dtype)):
        return dtype
    what = "would lose what floating tensors hold" if isinstance(dtype, torch.dtype) else "is not a dtype of torch"
    raise error(f"dtype={dtype!r} {what}: take torch.float16 or torch.bfloat16")
