"""Forms of an example."""

import random

import pytest
import torch
from torch import nn

from modsurg.tracing.inputs import arguments, dtypes_to_try, forked_random, is_shape

MODEL = nn.Linear(2, 2, dtype=torch.float64)


@pytest.mark.parametrize(
    ("value", "expected"),
    [((1, 3), True), (torch.Size([2]), True), ((), False), ((1, 2.0), False), ((True, 1), False), ([1, 3], False)],
)
def test_is_shape(value, expected):
    assert is_shape(value) is expected


def test_a_shape_becomes_a_tensor_of_the_models_dtype():
    (made,), named = arguments((4, 2), MODEL, (None,))
    assert (made.shape, made.dtype, named) == ((4, 2), torch.float64, {})
    assert arguments((4, 2), MODEL, (torch.int64,))[0][0].dtype == torch.int64


def test_everything_else_is_passed_as_it_is():
    tensor = torch.ones(2)
    assert arguments([tensor], MODEL, ()) == (([tensor],), {})
    assert arguments((tensor, None, "a"), MODEL, ()) == ((tensor, None, "a"), {})
    assert arguments({"x": tensor, "flag": True}, MODEL, ()) == ((), {"x": tensor, "flag": True})
    assert list(dtypes_to_try({"x": tensor})) == [()]


def test_many_shapes_are_of_one_kind():
    assert list(dtypes_to_try(((1, 2),) * 5)) == [(None,) * 5, (torch.int64,) * 5]


def test_random_states_come_back_after_an_error_too():
    states = random.getstate(), torch.get_rng_state()
    with pytest.raises(KeyError, match="x"), forked_random():
        random.random(), torch.rand(2)
        raise KeyError("x")
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
