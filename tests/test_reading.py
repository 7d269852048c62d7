import torch
from torch import nn

from modsurg.surgery.reading import reads


class Parent(nn.Module):
    def __init__(self):
        super().__init__()
        self.called, self.read, self.both, self.helped, self.unused = (nn.Linear(2, 2) for _ in range(5))

    def forward(self, x):
        x = nn.functional.linear(self.called(x), self.read.weight, self.read.bias)
        return self.both(x) + self.both.weight.sum() + self.help(x)

    def help(self, x):
        return x * self.helped.bias

    def never(self):
        return self.unused.weight


def test_forward_and_its_helpers_are_read():
    parent = Parent()
    assert reads(parent, "called") == (set(), True)
    assert reads(parent, "read") == ({"weight", "bias"}, False)
    assert reads(parent, "both") == ({"weight"}, True)
    assert reads(parent, "helped") == ({"bias"}, False)
    assert reads(parent, "unused") == (set(), False)


def test_what_is_asked_for_first_is_optional():
    class Careful(Parent):
        def forward(self, x):
            return self.read.weight if hasattr(self.read, "weight") else x

    assert reads(Careful(), "read") == (set(), True)


def test_a_forward_that_is_no_python_function():
    class Compiled(nn.Module):
        forward = torch.relu

    assert reads(Compiled(), "x") == (set(), False)
