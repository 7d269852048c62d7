"""Results that functions remember, and that a run on meta must not leave behind."""

import functools
import gc

import torch

DEPTH = 4
Cache = functools._lru_cache_wrapper


def forget_meta() -> None:
    """Empty every `functools.lru_cache` that remembers a tensor on meta.

    A function that makes a table once, `@lru_cache def mask(size): return torch.ones(size, size)`, would give the
    shadow's table, which holds nothing, to the model itself.

    Example:
        >>> table = functools.lru_cache(lambda size: torch.ones(size, device="meta"))
        >>> _ = table(3)
        >>> forget_meta()
        >>> table.cache_info().currsize
        0
    """
    for found in gc.get_objects():
        if type(found) is Cache and found.cache_info().currsize and _remembers_meta(found):
            found.cache_clear()


def _remembers_meta(cache: "Cache[object]") -> bool:
    held = gc.get_referents(cache)  # a dictionary of results, or the results themselves
    for _ in range(DEPTH):
        if any(isinstance(each, torch.Tensor) and each.is_meta for each in held):
            return True
        held = gc.get_referents(*(each for each in held if isinstance(each, (tuple, list, dict))))
    return False
