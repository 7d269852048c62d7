"""Forms of an example."""

import random

import numpy
import pytest
import torch
from torch import nn

from modsurg.tracing.inputs import arguments, dtypes_to_try, forked_random, is_array, is_shape, with_batch
from modsurg.tracing.trace import run

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


def test_an_array_becomes_a_tensor_of_the_models_dtype():
    (made, numbers), _ = arguments((numpy.ones((3, 2), numpy.float32), numpy.arange(3)), MODEL, ())
    assert (made.dtype, made.shape, numbers.dtype) == (torch.float64, (3, 2), torch.int64)
    assert run(MODEL, numpy.ones((3, 2))).outputs[""] == ((3, 2),)
    assert not is_array(numpy.array(["text"]))
    assert not is_array(2.0)


def test_a_batch_size_before_everything_that_has_sizes():
    assert with_batch((3, 8)) == (1, 3, 8)
    assert with_batch((torch.ones(2), 1.0))[0].shape == (1, 2)
    assert with_batch(torch.ones(2)).shape == with_batch(numpy.ones(2)).shape == (1, 2)
    assert with_batch({"x": (3,), "flag": True}) == {"x": (1, 3), "flag": True}
    assert with_batch({"flag": True}) is None


def test_a_forgotten_batch_size_is_hinted_at():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    assert run(model, (3, 8, 8)).hint == "Try: the batch size as the first one: (batch, 3, 8, 8)."
    assert run(model, torch.ones(3, 8, 8)).hint == "Try: the batch size as the first one: (batch, 3, 8, 8)."
    assert run(model, (2, 8, 8)).hint == run(model, (1, 3, 8, 8)).hint == ""
