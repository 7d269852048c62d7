"""Tensors of a model that share memory: what fills one fills the other, so the file has to agree with itself."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import xxhash

from modsurg.checkpoints.formats.file_io import as_plain, memory
from modsurg.checkpoints.formats.hashes import hash_region
from modsurg.checkpoints.formats.source import Source
from modsurg.checkpoints.load.model_tensors import Target, overlaps_itself, shared_groups


@dataclass(frozen=True)
class Sharing:
    """What sharing means for a load.

    Attributes:
        covered: Names that need no key of their own: another one fills their memory.
        conflicts: Name -> the name that it shares memory with and that the file has other values for.
    """

    covered: frozenset[str]
    conflicts: Mapping[str, str]


def check_sharing(source: Source, targets: Sequence[Target], keys: Mapping[str, str]) -> Sharing:
    """Look at all targets that share memory.

    Args:
        source: The state.
        targets: All tensors of the model.
        keys: Name -> the source's key, for those that will be filled.
    """
    covered: set[str] = set()
    conflicts: dict[str, str] = {}
    for group in shared_groups(targets):
        filled = [target for target in group if target.name in keys]
        covered |= {
            target.name for target in group if target.name not in keys and any(_covers(each, target) for each in filled)
        }
        suspect = any(not _alike(source, filled[0], target, keys) for target in filled[1:])
        if suspect or any(overlaps_itself(target.tensor) for target in filled):
            conflicts |= _conflict(source, filled, keys)
    return Sharing(frozenset(covered), conflicts)


def write_anywhere(tensor: torch.Tensor, values: torch.Tensor) -> None:
    """Copy, also into a tensor whose elements share places; the values have to agree there."""
    if not overlaps_itself(tensor):
        tensor.copy_(values)
        return
    storage = tensor.untyped_storage()
    count = storage.nbytes() // tensor.element_size()
    flat = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(storage, 0, (count,), (1,))
    places = torch.arange(count, device=tensor.device).as_strided(
        tensor.shape, tensor.stride(), int(tensor.storage_offset())
    )
    flat[places.reshape(-1)] = values.to(tensor.dtype).to(tensor.device).reshape(-1)


def _covers(one: Target, other: Target) -> bool:
    (start, stop), (first, last) = _span(one.tensor), _span(other.tensor)
    return start <= first and last <= stop and one.tensor.nbytes == stop - start


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = int(tensor.storage_offset()) * tensor.element_size()
    return start, start + (int(reach) + 1) * tensor.element_size()


def _alike(source: Source, one: Target, other: Target, keys: Mapping[str, str]) -> bool:
    """Whether both are the same view and the file has the same values for them."""
    a, b = one.tensor, other.tensor
    same_view = bool(
        a.storage_offset() == b.storage_offset()
        and a.shape == b.shape
        and a.stride() == b.stride()
        and (a.dtype, a.is_conj(), a.is_neg()) == (b.dtype, b.is_conj(), b.is_neg())
    )
    first, second = (source.notes.ties.get(keys[target.name], keys[target.name]) for target in (one, other))
    if not same_view or first == second:
        return same_view
    same_kind = source[first].dtype == source[second].dtype and source[first].shape == source[second].shape
    return same_kind and _digest(source, first) == _digest(source, second)


def _digest(source: Source, key: str) -> str:
    region = source.region(key)
    if region is not None:
        return hash_region(region)
    return xxhash.xxh3_64_hexdigest(memory(as_plain(source.read(key))))


def _conflict(source: Source, filled: Sequence[Target], keys: Mapping[str, str]) -> dict[str, str]:
    """Fill a copy of the memory, one after the other, and look whether one of them spoils another or itself."""
    if any(tuple(target.tensor.shape) != source[keys[target.name]].shape for target in filled):
        return {filled[-1].name: filled[0].name}
    scratch = torch.zeros(
        filled[0].tensor.untyped_storage().nbytes(), dtype=torch.uint8, device="cpu"
    ).untyped_storage()
    views: dict[str, torch.Tensor] = {}
    for target in filled:
        view = _view(target.tensor, scratch)
        write_anywhere(view, source.read(keys[target.name]))
        views[target.name] = view
        for name, each in views.items():
            expected = source.read(keys[name]).to(each.dtype)
            if memory(as_plain(each)) != memory(as_plain(expected)):
                return {target.name: name}
    return {}


def _view(tensor: torch.Tensor, scratch: torch.UntypedStorage) -> torch.Tensor:
    view = torch.empty(0, dtype=tensor.dtype, device="cpu")
    view.set_(scratch, tensor.storage_offset(), tensor.size(), tensor.stride())
    return view
