import pytest

from modsurg.checkpoints.formats.documents import is_state

TENSOR = {"$tensor": "model.weight"}


@pytest.mark.parametrize(
    ("state", "is_one"),
    [
        ({"weight": TENSOR}, True),
        ({"weight": TENSOR, "norm._extra_state": {"seen": 3}}, True),
        ({"_extra_state": {"seen": 3}}, False),
        ({"weight": {"$tensor": "elsewhere"}}, False),
        ({"weight": TENSOR, "lr": 0.1}, False),
        ({}, False),
        ([TENSOR], False),
    ],
)
def test_which_states_are_those_of_modules(state, is_one):
    assert is_state(state, {"model.weight"}) is is_one
