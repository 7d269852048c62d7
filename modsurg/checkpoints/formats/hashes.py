"""The hashes that are stored with a state: xxh3 of each tensor's bytes, and one of the header that holds them.

They tell damage, not malice: whoever changes a file on purpose can change its hashes too.
"""

import re
from collections.abc import Callable

import xxhash

from modsurg.checkpoints.formats.file_io import Region, read_into

STEP = 1 << 20  # a piece that is still in the processor's cache when it is written after being hashed
EMPTY = "0" * 16
SEAL = "modsurg.header"

_SEALED = re.compile(rb'("modsurg\.header": ?")[0-9a-f]{16}(")')


def hash_through(view: memoryview, write: Callable[[memoryview], object]) -> str:
    """Hash `view` in step with handing it to `write`; returns 16 hexadecimal digits."""
    state = xxhash.xxh3_64()
    for start in range(0, len(view), STEP):
        piece = view[start : start + STEP]
        state.update(piece)
        write(piece)
    return state.hexdigest()


def hash_region(region: Region) -> str:
    """Hash what lies in a file, through one small buffer."""
    state = xxhash.xxh3_64()
    buffer = memoryview(bytearray(min(STEP, region.nbytes)))
    for start in range(0, region.nbytes, STEP):
        piece = buffer[: region.nbytes - start]
        read_into(Region(region.fd, region.offset + start, len(piece)), piece)
        state.update(piece)
    return state.hexdigest()


def seal(header: bytes) -> str:
    """The hash of a header, whatever stands in it as its own seal."""
    return xxhash.xxh3_64_hexdigest(_SEALED.sub(rb"\g<1>" + EMPTY.encode() + rb"\g<2>", header, count=1))
