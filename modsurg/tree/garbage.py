"""The cyclic garbage collector, held while many objects are made at once."""

import gc
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Generator[None]:
    """Hold the collector: it would go through the whole model again for every few hundred new objects.

    Example:
        >>> with uncollected():
        ...     gc.isenabled()
        False
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
