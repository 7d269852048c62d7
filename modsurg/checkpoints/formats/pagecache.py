"""What of a file the system has in memory, so that reading it needs no disk."""

import ctypes
import mmap
import sys

from modsurg.checkpoints.formats.file_io import Region

_CACHESTAT = 451  # Linux 6.5, the same number on every architecture; the C library has no name for it
_libc = ctypes.CDLL(None)


def is_cached(region: Region) -> bool:
    """Whether reading the region needs no disk. The kernel tells only the owner of a file; to others it says yes."""
    start = region.offset // mmap.PAGESIZE * mmap.PAGESIZE
    length = region.offset + region.nbytes - start
    pages = -(-length // mmap.PAGESIZE)
    counted = _counted(region.fd, start, length)
    return _is_resident(region.fd, start, length, pages) if counted is None else counted >= pages


def _counted(fd: int, start: int, length: int) -> int | None:
    """How many pages of a range are in memory; None where the system does not say (cachestat(2))."""
    if sys.platform != "linux":
        return None
    span, counts = (ctypes.c_uint64 * 2)(start, length), (ctypes.c_uint64 * 5)()
    failed = _libc.syscall(_CACHESTAT, fd, ctypes.byref(span), ctypes.byref(counts), 0)
    return None if failed else int(counts[0])


def _is_resident(fd: int, start: int, length: int, pages: int) -> bool:
    """The same page by page, which takes hundreds of times as long (mincore(2))."""
    resident = ctypes.create_string_buffer(pages)
    try:
        with mmap.mmap(fd, length, access=mmap.ACCESS_COPY, offset=start) as mapped:
            address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))  # a number, which keeps nothing open
            failed = _libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(length), resident)
    except (OSError, ValueError):  # a filesystem without mappings, a file cut short: reading will tell
        return False
    return not failed and resident.raw.count(1) == pages
