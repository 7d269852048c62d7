"""Rows of a printed comparison: folded, indented, wrapped."""

from modsurg.views.diff.layout import DiffLine, folded, laid_out
from modsurg.views.diff.values import Values
from modsurg.views.text import cells


def text(lines: list[DiffLine], width: int = 80) -> list[str]:
    return [mark + row for mark, row in laid_out(folded(lines), width)]


def test_branches_are_indented_and_chains_are_one_row():
    lines = [DiffLine("~", "a.b.c", "x"), DiffLine("+", "a.b.d", "y"), DiffLine("-", "e.f.g", "z")]
    assert text(lines) == ["  a.b", "~   c  x", "+   d  y", "- e.f.g  z"]


def test_the_same_of_block_after_block_is_one():
    lines = [DiffLine("~", f"layer{i}.{j}.act", "ReLU -> GELU") for i in range(2) for j in range(2)]
    assert text(lines) == ["~ layer*.*.act  ReLU -> GELU  in 4 places"]
    assert len(text(lines[:2])) == 3


def test_runs():
    lines = [DiffLine("~", f"blocks.{i}", "Block", str(i - 1)) for i in range(4, 9)]
    assert text(lines) == ["~ blocks.4-8 -> 3-7  Block"]
    assert text([DiffLine("+", f"blocks.{i}", "Block") for i in range(3)]) == ["+ blocks.0-2  Block"]
    assert len(text([DiffLine("-", f"blocks.{i}", "Block") for i in (0, 2, 4)])) == 4


def test_many_values_are_put_together():
    values = Values(1, 4, 0.5, 0.1, (0,), 1.0, 1.5)
    lines = [DiffLine("~", f"blocks.{i}.weight", f"{i}", values=values) for i in range(30)]
    assert text(lines) == ["~ blocks.*.weight  30 of 120 in 30 tensors differ, by up to 0.5 (relative 0.1)"]
    assert len(text(lines[:10])) == 11


def test_a_long_text_is_wrapped_and_a_path_never_cut():
    rows = text([DiffLine("~", "x" * 100, "word " * 20)], 40)
    assert rows[0].strip("~ ").startswith("x" * 100)
    assert all(len(row) <= 40 for row in rows[1:])


def test_wide_characters_take_two_columns():
    rows = laid_out([DiffLine("~", "卷积层.weight", "word " * 20)], 40)
    assert max(cells(mark + row) for mark, row in rows) <= 40
    assert len({cells(row) - cells(row.lstrip()) for _, row in rows[1:]}) == 1
