"""Bytes between files and tensors' own memory, with nothing in between."""

import ctypes
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import NamedTuple

import torch
from torch.nn.parameter import is_lazy

from modsurg.checkpoints.formats.remote import fetch
from modsurg.errors import FormatError

PIECE = 16 << 20
THREADS = 2


class Region(NamedTuple):
    """Where a tensor's bytes lie: in order, without gaps, little-endian."""

    fd: int
    offset: int
    nbytes: int


def memory(tensor: torch.Tensor) -> memoryview:
    """The tensor's own bytes, writable; the tensor lives as long as they are held.

    Args:
        tensor: On the CPU, contiguous, with nothing lazy about it; see `is_plain`.
    """
    assert is_plain(tensor)
    if not tensor.numel():
        return memoryview(bytearray())
    array = (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())
    array.owner = tensor  # type: ignore[attr-defined]  # ctypes arrays take attributes, and this one keeps the memory
    return memoryview(array).cast("B")


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether the tensor's memory is its values, in order: then a file can be read straight into it."""
    return (
        tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and tensor.is_contiguous()
        and not tensor.is_conj()
        and not tensor.is_neg()
    )


def why_not_kept(tensor: torch.Tensor) -> str | None:
    """Why a tensor can't be kept; the rest of a sentence that begins with its name."""
    if is_lazy(tensor):
        return "is not initialised yet: run the model once before saving"
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        fix = "full_tensor() of it, or save_checkpoint" if hasattr(tensor, "full_tensor") else "a plain tensor"
        return f"is a {type(tensor).__name__}, whose values are not in one place: keep {fix}"
    if tensor.is_nested:
        return "is a nested tensor: keep its values() and offsets(), or to_padded_tensor(0)"
    if tensor.is_quantized:
        return "is a quantised tensor: keep int_repr() with its scale and zero point, or dequantize() it"
    if tensor.layout is not torch.strided:
        return f"is a sparse tensor ({str(tensor.layout).removeprefix('torch.')}): keep to_dense() of it"
    if tensor.is_meta:
        return "is on the meta device and has no values: load the model's state first"
    return None


def as_plain(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where its memory is its values, otherwise a copy that is."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    return plain.cpu().contiguous()


def read_into(region: Region, view: memoryview) -> None:
    """Fill `view` with the region's bytes.

    Raises:
        FormatError: The file ends before the region does.
        OSError: The disk failed.
    """
    fetch(region.fd, [(region.offset, region.offset + region.nbytes)])
    done = 0
    while done < region.nbytes:
        count = os.preadv(region.fd, [view[done:]], region.offset + done)
        if not count:
            raise FormatError(f"the file ends at byte {region.offset + done}; it was cut off while being read")
        done += count


def prefetch(regions: Iterable[Region]) -> None:
    """Get the regions that lie in files elsewhere, several at a time, before anything is done with them."""
    by_file: dict[int, list[tuple[int, int]]] = {}
    for region in regions:
        by_file.setdefault(region.fd, []).append((region.offset, region.offset + region.nbytes))
    for fd, ranges in by_file.items():
        fetch(fd, ranges)


def read_all(jobs: Sequence[tuple[Region, torch.Tensor]], begun: Callable[[int], object]) -> None:
    """Fill plain tensors from their regions, with two threads where there is enough to share.

    The first failure stops the rest and is raised.

    Args:
        jobs: Each a region and the tensor to fill.
        begun: Called with the number of a job before its tensor is touched.
    """
    pieces = iter(
        [
            (number, start, Region(region.fd, region.offset + start, min(PIECE, region.nbytes - start)))
            for number, (region, _) in enumerate(jobs)
            for start in range(0, region.nbytes, PIECE)
        ]
    )  # a list iterator's next() is atomic under the GIL
    stop = Event()

    def work() -> None:
        for number, start, region in pieces:
            if stop.is_set():
                return
            begun(number)
            try:
                read_into(region, memory(jobs[number][1])[start : start + region.nbytes])
            except BaseException:
                stop.set()
                raise

    if sum(region.nbytes for region, _ in jobs) < PIECE:
        work()
        return
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            for future in [pool.submit(work) for _ in range(THREADS)]:
                future.result()
        finally:
            stop.set()  # a Ctrl-C comes to this thread
