"""Models to take apart and put together, and what has to be the same afterwards."""

import json

import torch
from torch import nn

from modsurg.structure.build import build, describe


class Net(nn.Module):
    def __init__(self, **attributes):
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return x

    def other(self, x):
        return -x

    def forward_negative(self, x):
        return -x


def again(model):
    """The model by way of JSON, with its own values."""
    description = describe(model)
    values = {
        key: value.detach().clone() for key, value in description.state.items() if isinstance(value, torch.Tensor)
    }
    packages = {name.partition(":")[0].partition(".")[0] for name in description.data["names"]}
    return build(json.loads(json.dumps(description.data)), packages, values=values)


def assert_same(a, b):
    assert repr(a) == repr(b)
    first, second = a.state_dict(), b.state_dict()
    assert list(first) == list(second)
    assert all(torch.equal(first[key], second[key]) for key in first if isinstance(first[key], torch.Tensor))
    assert [type(m).__name__ for m in a.modules()] == [type(m).__name__ for m in b.modules()]
    assert [m.training for m in a.modules()] == [m.training for m in b.modules()]
    for (name, p), (other, q) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert (name, p.requires_grad, p.dtype, p.stride()) == (other, q.requires_grad, q.dtype, q.stride())
    assert [name for name, _ in a.named_buffers()] == [name for name, _ in b.named_buffers()]


def linear():
    return json.loads(json.dumps(describe(nn.Sequential(nn.Linear(2, 2), nn.ReLU())).data))


def damage(data, *path_and_value):
    *path, last, value = path_and_value
    inner = data
    for part in path:
        inner = inner[part]
    inner[last] = value
    return data
