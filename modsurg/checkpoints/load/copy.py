"""Read the planned tensors from the file straight into the model's own memory.

A small state is copied aside first, and comes back if a read fails. A large one would double the memory: its places in
the file are checked before anything is written, it is read once, and if the disk fails the error names what was filled.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from modsurg.checkpoints.formats.file_io import Region, is_plain, prefetch, read_all
from modsurg.checkpoints.formats.source import Source
from modsurg.checkpoints.load.plan import Fill
from modsurg.errors import FormatError, LoadError, counted

JOURNAL_LIMIT = 32 << 20


@dataclass(frozen=True)
class _Read:
    """A tensor whose memory can be read into as it is."""

    region: Region
    fill: Fill


def fill(source: Source, fills: Sequence[Fill]) -> None:
    """Fill tensors.

    Raises:
        LoadError: The file can't be read. The tensors are unchanged, or the message names those that were filled.
        FormatError: The file is shorter than its header says. The tensors are unchanged.
    """
    fills = _distinct(fills)
    reads: list[_Read] = []
    copies: list[Fill] = []
    for each in fills:
        region = _direct_region(source, each)
        if region is None:
            copies.append(each)
        else:
            reads.append(_Read(region, each))
    reads.sort(key=lambda read: read.region)
    _check_regions(source, fills)
    prefetch(region for each in fills if (region := source.region(each.key)) is not None)
    small = sum(each.target.tensor.nbytes for each in fills) <= JOURNAL_LIMIT
    with _restore_on_failure(source, fills) if small else _name_on_failure(source, len(fills)) as filled:
        read_all(
            [(read.region, read.fill.target.tensor) for read in reads],
            lambda number: filled.append(reads[number].fill.target.name),
        )
        for each in copies:
            filled.append(each.target.name)
            _write(each.target.tensor, each.read(source))
    tensors = [read.fill.target.tensor for read in reads]
    torch.autograd.graph.increment_version([tensor for tensor in tensors if not tensor.is_inference()])


def _check_regions(source: Source, fills: Sequence[Fill]) -> None:
    """See that every region lies inside its file as it is now."""
    sizes: dict[int, int] = {}
    for each in fills:
        region = source.region(each.key)
        if region is None:
            continue
        size = sizes.setdefault(region.fd, os.fstat(region.fd).st_size)
        if region.offset + region.nbytes > size:
            raise FormatError(
                f"{source.path}: the file ends at byte {size:,}; it was cut off while being read, at {each.key}; "
                "nothing was loaded"
            )


def _distinct(fills: Sequence[Fill]) -> list[Fill]:
    """One of those that are tied and have the same values, which the plan made sure of."""
    seen: dict[object, Fill] = {}
    for each in fills:
        tensor = each.target.tensor
        view = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        seen.setdefault(view if tensor.numel() else each.target.name, each)
    return list(seen.values())


def _direct_region(source: Source, each: Fill) -> Region | None:
    tensor = each.target.tensor
    if each.adapt or not is_plain(tensor) or tensor.dtype != source[each.key].dtype:
        return None
    return source.region(each.key)


def _write(tensor: torch.Tensor, values: torch.Tensor) -> None:
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        tensor.detach().copy_(values)


@contextlib.contextmanager
def _restore_on_failure(source: Source, fills: Sequence[Fill]) -> Iterator[list[str]]:
    before = [each.target.tensor.detach().clone() for each in fills]
    try:
        yield []
    except BaseException as error:
        for each, values in zip(fills, before, strict=True):
            _write(each.target.tensor, values)
        if isinstance(error, OSError):
            reason = error.strerror or error
            raise LoadError(f"{source.path} can't be read ({reason}); nothing was loaded") from error
        raise


@contextlib.contextmanager
def _name_on_failure(source: Source, count: int) -> Iterator[list[str]]:
    filled: list[str] = []
    try:
        yield filled
    except BaseException as error:
        if not filled:
            raise
        filled = list(dict.fromkeys(filled))  # a large one is read in pieces
        last = filled[-1] if len(filled) == 1 else f"{filled[0]} to {filled[-1]}, in the order of the file"
        text = f"{len(filled)} of {counted(count, 'tensor', 'tensors')} may have new values ({last}): load again"
        if isinstance(error, Exception):
            raise LoadError(f"{source.path} can't be read ({error}); {text}") from error
        error.add_note(text)
        raise
