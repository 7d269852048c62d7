"""What the tests of loading share."""

import pytest
import torch
from torch import nn

from modsurg import load_state
from modsurg.errors import LoadError


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def frozen(model):
    """The model's bytes, objects and flags."""
    state = model.state_dict()
    return (
        {key: (value.clone(), value.data_ptr()) for key, value in state.items() if isinstance(value, torch.Tensor)},
        [(id(each), each.requires_grad) for each in model.parameters()],
    )


def unchanged(model, before):
    tensors, parameters = frozen(model)
    return parameters == before[1] and all(
        torch.equal(tensors[key][0], value) and tensors[key][1] == place for key, (value, place) in before[0].items()
    )


def refused(model, state, match, error=LoadError, **options):
    before = frozen(model)
    with pytest.raises(error, match=match) as caught:
        load_state(model, state, **options)
    assert unchanged(model, before)
    return str(caught.value)
