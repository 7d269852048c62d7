"""The cyclic garbage collector, held while many objects are made at once."""

import gc
from collections.abc import Generator
from contextlib import contextmanager

_MANY = 50_000


@contextmanager
def uncollected() -> Generator[None]:
    """Hold the collector: it would go through the whole model again for every few hundred new objects.

    What was made meanwhile, if it is much, counts as old afterwards, without being gone through: `gc.freeze` and
    `gc.unfreeze` only move the list of the young objects to the old ones. Where the program froze objects of its own,
    that is left out. A little stays young: the old ones are seldom gone through, and their garbage would pile up.

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
            if gc.get_count()[0] > _MANY and gc.get_freeze_count() == 0:
                gc.freeze()
                gc.unfreeze()
            gc.enable()
