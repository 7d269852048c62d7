"""Tensors of a model that share memory: what fills one fills the other, so the file must have one value for both."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import xxhash

from modsurg.checkpoints.formats.file_io import as_plain, memory
from modsurg.checkpoints.formats.hashes import hash_region
from modsurg.checkpoints.formats.source import Source
from modsurg.checkpoints.load.model_tensors import ModelTensor, overlaps_itself, shared_groups


@dataclass(frozen=True)
class Sharing:
    """What sharing means for a load.

    Attributes:
        covered: Names that need no key of their own: another one fills their memory.
        conflicts: Name -> the name that it shares memory with, where the file has other values for it; itself
            where one of its own elements is at several indices.
    """

    covered: frozenset[str]
    conflicts: Mapping[str, str]


def check_sharing(source: Source, targets: Sequence[ModelTensor], keys: Mapping[str, str]) -> Sharing:
    """Find the targets that share memory, and those of them that can't all have their values from the file.

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
        conflicts |= {target.name: target.name for target in filled if overlaps_itself(target.tensor)}
        for place, target in enumerate(filled):
            for other in filled[:place]:
                if _overlap(other, target) and not _agree(source, other, target, keys):
                    conflicts.setdefault(target.name, other.name)
    return Sharing(frozenset(covered), conflicts)


def _covers(one: ModelTensor, other: ModelTensor) -> bool:
    (start, stop), (first, last) = _span(one.tensor), _span(other.tensor)
    return start <= first and last <= stop and one.tensor.nbytes == stop - start


def _overlap(one: ModelTensor, other: ModelTensor) -> bool:
    (start, stop), (first, last) = _span(one.tensor), _span(other.tensor)
    return first < stop and start < last


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = int(tensor.storage_offset()) * tensor.element_size()
    return start, start + (int(reach) + 1) * tensor.element_size()


def _agree(source: Source, one: ModelTensor, other: ModelTensor, keys: Mapping[str, str]) -> bool:
    """Whether the file has the same values for both where they overlap."""
    a, b = one.tensor, other.tensor
    same_view = bool(
        a.storage_offset() == b.storage_offset()
        and a.shape == b.shape
        and a.stride() == b.stride()
        and (a.dtype, a.is_conj(), a.is_neg()) == (b.dtype, b.is_conj(), b.is_neg())
    )
    first, second = (source.notes.ties.get(keys[target.name], keys[target.name]) for target in (one, other))
    if same_view and first == second:
        return True
    if same_view:
        same_kind = source[first].dtype == source[second].dtype and source[first].shape == source[second].shape
        return same_kind and _digest(source, first) == _digest(source, second)
    if any(tuple(target.tensor.shape) != source[keys[target.name]].shape for target in (one, other)):
        return False
    scratch = torch.zeros(a.untyped_storage().nbytes(), dtype=torch.uint8, device="cpu").untyped_storage()
    kept, over = _view(a, scratch), _view(b, scratch)
    values = source.read(first).to(a.dtype)
    kept.copy_(values)
    over.copy_(source.read(second))
    return memory(as_plain(kept)) == memory(as_plain(values))


def _view(tensor: torch.Tensor, storage: torch.UntypedStorage) -> torch.Tensor:
    view = torch.empty(0, dtype=tensor.dtype, device="cpu")
    return view.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())


def _digest(source: Source, key: str) -> str:
    region = source.region(key)
    if region is not None:
        return hash_region(region)
    return xxhash.xxh3_64_hexdigest(memory(as_plain(source.read(key))))
