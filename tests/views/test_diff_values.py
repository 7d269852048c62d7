"""Values compared element by element, in every dtype and layout."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modsurg.views.diff.values import MANY, PIECE, SMALL, Values, sketches
from modsurg.views.diff.values import compare_values as compare_pairs


def compare_values(old: torch.Tensor, new: torch.Tensor) -> Values | None:
    return dict(compare_pairs([("a", old, new)])).get("a")


FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
WHOLE = [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64]
COMPLEX = [torch.complex64, torch.complex128]


@pytest.mark.parametrize("dtype", [*FLOATS, *WHOLE, *COMPLEX, torch.bool], ids=str)
def test_every_dtype(dtype):
    old = torch.tensor([0, 1, 1, 0, 1]).to(dtype)
    new = torch.tensor([0, 1, 1, 0, 0]).to(dtype)
    assert compare_values(old, old.clone()) is None
    found = compare_values(old, new)
    assert (found.differing, found.total, found.max_abs, found.max_rel, found.index) == (1, 5, 1.0, 1.0, (4,))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(width=32), st.floats(width=32)), min_size=1, max_size=20))
def test_agrees_with_numpy(pairs):
    old = np.array([pair[0] for pair in pairs], np.float32)
    new = np.array([pair[1] for pair in pairs], np.float32)
    found = compare_values(torch.from_numpy(old), torch.from_numpy(new))
    differ = (old.view(np.int32) != new.view(np.int32)) & ~(np.isnan(old) & np.isnan(new))
    assert (found.differing if found else 0) == differ.sum()
    if found:
        with np.errstate(all="ignore"):
            distance = np.abs(old.astype(np.float64) - new.astype(np.float64))[differ]
        assert np.array_equal(found.max_abs, distance.max(), equal_nan=True)
        assert differ[found.index]


def test_large_whole_numbers_are_exact():
    found = compare_values(torch.tensor(2**62), torch.tensor(2**62 + 1))
    assert (found.max_abs, found.old, found.new, found.index) == (1.0, 2**62, 2**62 + 1, ())
    assert compare_values(torch.tensor(-(2**63)), torch.tensor(2**63 - 1)).max_abs == 2.0**64


def test_true_and_false():
    found = compare_values(torch.tensor([True, False]), torch.tensor([True, True]))
    assert (found.old, found.new, found.index) == (False, True, (1,))
    assert found.new is True


def test_infinity_and_nan():
    found = compare_values(torch.tensor([1.0, 2.0]), torch.tensor([float("inf"), 2.0]))
    assert (found.max_abs, found.max_rel) == (float("inf"), float("inf"))
    found = compare_values(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([9.0, float("nan"), 3.0]))
    assert found.index == (1,)
    assert found.to_dict()["max_abs"] == "nan"
    assert found.to_dict()["new"] == "nan"


def test_the_largest_of_several_pieces():
    old = torch.zeros(2 * PIECE + 5)
    new = old.clone()
    new[3], new[PIECE + 7], new[2 * PIECE + 4] = 1, -4, 2
    found = compare_values(old.view(1, -1), new.view(1, -1))
    assert (found.differing, found.max_abs, found.index, found.new) == (3, 4.0, (0, PIECE + 7), -4.0)


def test_layouts_do_not_matter():
    old = torch.randn(2, 3, 4, 5)
    new = old.contiguous(memory_format=torch.channels_last)
    assert compare_values(old, new) is None
    new = new.clone()
    new[1, 2, 3, 4] += 1
    assert compare_values(old, new).index == (1, 2, 3, 4)
    assert compare_values(old.transpose(0, 1), new.transpose(0, 1)).index == (2, 1, 3, 4)
    assert compare_values(old[0, 0, 0, 0].expand(3), old[0, 0, 0, 0].repeat(3)) is None


def test_views_that_are_computed():
    number = torch.randn(3, dtype=torch.complex64)
    assert compare_values(number.conj(), number.conj().resolve_conj()) is None
    assert compare_values(number.conj().imag, -number.imag) is None
    assert compare_values(torch.eye(3).to_sparse(), torch.eye(3)) is None


def test_two_dtypes_by_value():
    old = torch.randn(100)
    assert compare_values(old, old.double()) is None
    assert compare_values(old.bfloat16(), old).max_rel < 2**-8
    assert compare_values(torch.tensor([1, 2]), torch.tensor([1.0, 2.5])).differing == 1


@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="torch 2.8 and later have float4")
def test_pairs_of_float4_are_compared_as_bytes():
    old, new = (torch.tensor(values, dtype=torch.uint8).view(torch.float4_e2m1fn_x2) for values in ([0, 1], [0, 18]))
    assert compare_values(old, old.clone()) is None
    assert compare_values(old, new) == Values(1, 2, 17.0, 17 / 18, (1,), 1, 18)
    assert sketches([old]) != sketches([new])


def test_empty():
    assert compare_values(torch.empty(0, 3), torch.empty(0, 3)) is None


def test_a_sketch_is_alike_in_every_precision():
    values = torch.randn(64)
    one, other, third, unlike = sketches([values, values.bfloat16(), values.double(), values + 1])
    assert one == other == third != unlike


def test_sketches_of_several_are_those_of_each():
    samples = [make(n) for n in (3, 0, 64) for make in (torch.randn, torch.arange, lambda n: torch.randn(n) * 1j)]
    assert sketches(samples) == [sketches([sample])[0] for sample in samples]


def test_many_small_tensors_are_measured_each_by_itself():
    sizes = [1, 5, SMALL, SMALL + 1, PIECE + 1] * (MANY // 4)
    rows = [(key, torch.randn(size), torch.randn(size)) for key, size in enumerate(sizes)]
    rows += [(f"nan {key}", torch.tensor([1.0, 2.0]), torch.tensor([float("nan"), key])) for key in range(MANY + 1)]
    rows += [(f"int {key}", torch.tensor([key, 2]), torch.tensor([7, 2])) for key in range(MANY + 1)]
    found = dict(compare_pairs(rows))
    assert {key: repr(values) for key, values in found.items()} == {
        key: repr(values) for key, old, new in rows if (values := compare_values(old, new)) is not None
    }
    assert "int 7" not in found
    assert found["int 9"] == Values(1, 2, 2.0, 2 / 9, (0,), 9, 7)
