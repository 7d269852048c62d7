"""Forms of an example."""

import random

import pytest
import torch
from torch import nn

from modsurg.tree.examples import arguments, forked_random, has_shape, is_shape

MODEL = nn.Linear(2, 2, dtype=torch.float64)


@pytest.mark.parametrize(
    ("value", "expected"),
    [((1, 3), True), (torch.Size([2]), True), ((), False), ((1, 2.0), False), ((True, 1), False), ([1, 3], False)],
)
def test_is_shape(value, expected):
    assert is_shape(value) is expected


def test_a_shape_becomes_a_tensor_of_the_models_dtype():
    (made,), named = arguments((4, 2), MODEL, None)
    assert (made.shape, made.dtype, named) == ((4, 2), torch.float64, {})
    assert arguments((4, 2), MODEL, torch.int64)[0][0].dtype == torch.int64


def test_everything_else_is_passed_as_it_is():
    tensor = torch.ones(2)
    assert arguments([tensor], MODEL, None) == (([tensor],), {})
    assert arguments((tensor, None, "a"), MODEL, None) == ((tensor, None, "a"), {})
    assert arguments({"x": tensor, "flag": True}, MODEL, None) == ((), {"x": tensor, "flag": True})
    assert not has_shape({"x": tensor})
    assert has_shape({"x": (1, 2)})


def test_random_states_come_back_after_an_error_too():
    states = random.getstate(), torch.get_rng_state()
    with pytest.raises(KeyError, match="x"), forked_random():
        random.random(), torch.rand(2)
        raise KeyError("x")
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
