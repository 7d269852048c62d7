import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modsurg.surgery.resize.axes import Axis, factor, fixed, like, new_shape, old_shape, resized, silence_new_inputs

SIZES = st.integers(1, 4)


@given(st.lists(st.tuples(SIZES, SIZES), min_size=1, max_size=3))
def test_the_first_places_are_kept(sizes):
    axes = tuple(Axis((old,), (new,)) for old, new in sizes)
    tensor = torch.rand(old_shape(axes))
    new = resized(tensor, axes, fill=2.0)
    assert new.shape == new_shape(axes)
    common = tuple(slice(min(pair)) for pair in sizes)
    assert torch.equal(new[common], tensor[common])
    assert (new == 2.0).sum() == new.numel() - new[common].numel()


def test_each_part_keeps_its_first_places():
    axes = (Axis((2, 2), (3, 1)),)
    assert resized(torch.tensor([1.0, 2.0, 3.0, 4.0]), axes).tolist() == [1, 3, 0]


def test_old_outputs_read_nothing_new():
    new = torch.ones(3, 3)
    silence_new_inputs(new, (Axis((2,), (3,)), Axis((2,), (3,), reads=True)))
    assert new.tolist() == [[0, 0, 0], [0, 0, 0], [1, 1, 1]]
    new = torch.ones(2)
    silence_new_inputs(new, (Axis((1,), (2,)),))
    assert new.tolist() == [1, 1]


@pytest.mark.parametrize(
    "shape, key, expected",
    [
        ((4, 2, 3), "exp_avg", (5, 1, 3)),
        ((4, 2, 1), "exp_avg", (5, 1, 1)),
        ((1, 2, 3), "exp_avg", (1, 1, 3)),
        ((4, 2), "exp_avg", (5, 1)),
        ((4, 3), "col_var", (5, 3)),
        ((7,), "exp_avg", None),
        ((4, 2, 2), "exp_avg", None),
        ((4, 3, 2), "col_var", None),
    ],
)
def test_factors(shape, key, expected):
    axes = (Axis((4,), (5,)), Axis((2,), (1,)), *fixed(3))
    found = factor(axes, shape, key)
    assert (found and new_shape(found)) == expected


def test_rows_and_columns_of_a_square():
    axes = (Axis((3,), (5,)), Axis((3,), (2,)))
    assert [new_shape(factor(axes, (3,), key)) for key in ("row", "col")] == [(5,), (2,)]


def test_one_row_is_not_a_factor_but_one_column_number_is():
    axes = (Axis((1,), (3,)), Axis((4,), (5,)))
    assert new_shape(factor(axes, (1, 4), "exp_avg")) == (3, 5)
    assert new_shape(factor(axes, (1, 4), "col_var")) == (1, 5)
    assert new_shape(factor(axes, (1, 1), "row_var")) == (3, 1)


def test_memory_format():
    pictures = torch.empty(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    assert like(torch.empty(2, 5, 4, 4), pictures).is_contiguous(memory_format=torch.channels_last)
    videos = torch.empty(2, 3, 4, 4, 4).contiguous(memory_format=torch.channels_last_3d)
    assert like(torch.empty(2, 5, 4, 4, 4), videos).is_contiguous(memory_format=torch.channels_last_3d)
    assert like(torch.empty(2, 5, 4, 4), torch.empty(2, 3, 4, 4)).is_contiguous()
