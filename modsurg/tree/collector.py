"""Pause the cyclic garbage collector while one call makes very many objects."""

import gc
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def pause_collector() -> Generator[None]:
    """Pause the collector for the length of a block; afterwards it is as it was.

    An edit of 20,000 modules in a tree of 100,000 makes so many objects that the collector would go through the whole
    model twice, which takes twice as long as the edit itself.

    Example:
        >>> with pause_collector():
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
