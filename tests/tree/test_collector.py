"""The collector is paused for one block and no longer."""

import gc

import pytest

from modsurg.tree.collector import pause_collector


def test_it_is_on_again_afterwards_also_after_an_error():
    with pytest.raises(KeyError, match="x"), pause_collector():
        assert not gc.isenabled()
        raise KeyError("x")
    assert gc.isenabled()


def test_a_user_who_turned_it_off_keeps_it_off():
    gc.disable()
    try:
        with pause_collector():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_nothing_is_frozen():
    before = gc.get_freeze_count()
    with pause_collector():
        kept = [[] for _ in range(60_000)]
    assert gc.get_freeze_count() == before
    assert len(kept) == 60_000
