"""Caches of functions after a run on meta."""

import functools

import pytest
import torch

from modsurg.tracing.caches import forget_meta


@pytest.mark.parametrize("maxsize", [None, 4])
@pytest.mark.parametrize("made", [lambda x: x, lambda x: (x, 1), lambda x: [x], lambda x: {"x": x}])
def test_only_what_remembers_meta_forgets(maxsize, made):
    on_meta = functools.lru_cache(maxsize)(lambda size: made(torch.ones(size, device="meta")))
    real = functools.lru_cache(maxsize)(lambda size: made(torch.ones(size)))
    on_meta(1), on_meta(2), real(1), real(2)
    forget_meta()
    assert (on_meta.cache_info().currsize, real.cache_info().currsize) == (0, 2)
