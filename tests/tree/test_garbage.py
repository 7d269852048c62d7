import gc

from modsurg.tree.garbage import uncollected


def generation(value):
    return next(number for number in range(3) if any(each is value for each in gc.get_objects(generation=number)))


def test_much_counts_as_old_and_a_little_stays_young():
    """Of the garbage of old ones Python lets much pile up: that of every summary of a small model, say."""
    gc.collect()
    with uncollected():
        few = [[] for _ in range(100)]
    assert generation(few) < 2
    with uncollected():
        many = [[] for _ in range(60_000)]
    assert generation(many) == 2
