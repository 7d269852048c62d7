"""Numbers and widths."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modsurg.views.text import cells, cut, padded, scaled, size, widest, wrapped


@pytest.mark.parametrize(
    ("number", "text"),
    [(999, "999"), (1000, "1.00k"), (9_996, "10.0k"), (99_960, "100k"), (999_499, "999k"), (999_500, "1.00M")],
)
def test_scaled(number, text):
    assert scaled(number) == text


@pytest.mark.parametrize(("number", "text"), [(0, "0 B"), (1023, "1.0 KiB"), (3 << 40, "3.0 TiB")])
def test_size(number, text):
    assert size(number) == text


@given(st.lists(st.text(max_size=40), min_size=1), st.integers(1, 30))
def test_cut_texts_fit_and_padded_ones_fill(texts, width):
    short = [cut(text, width) for text in texts]
    assert widest(short) == max(map(cells, short)) <= width
    for right in (False, True):
        assert {cells(text) for text in padded(short, width, right)} == {width}


@given(st.text(st.characters(categories=["L", "N", "P", "Zs"]), max_size=200), st.integers(8, 60))
def test_wrapped_lines_fit(text, width):
    assert all(cells(line) <= width for line in wrapped(text, width))


def test_combining_characters_take_no_room():
    assert cells("e\u0301") == 1
    assert cells("\u200b") == 0
