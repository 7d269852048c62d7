import dis

import torch
from torch import nn

from modsurg.surgery.ops.bytecode import numbers, reads


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


plain = dis.get_instructions


def fused(function):
    """The bytecode as Python 3.13 has it: two neighbours that load or store locals are one instruction."""
    steps = []
    for step in plain(function):
        last = steps[-1] if steps else step
        if step.opname == "LOAD_FAST" and last.opname in ("LOAD_FAST", "STORE_FAST"):
            pair = f"{last.opname}_LOAD_FAST"
            steps[-1] = last._replace(opname=pair, argval=(last.argval, step.argval))
        else:
            steps.append(step)
    return steps


def test_instructions_that_python_fuses(monkeypatch):
    class Fusing(Parent):
        def forward(self, x):
            y = x
            z = self.called(y)
            return torch.add(x, self.read.weight, self.blocks[1](z))

    monkeypatch.setattr(dis, "get_instructions", fused)
    fused_steps = [step.opname for step in fused(Fusing.forward)]
    assert {"STORE_FAST_LOAD_FAST", "LOAD_FAST_LOAD_FAST"} <= set(fused_steps)
    assert reads(Fusing(), "called") == (set(), True)
    assert reads(Fusing(), "read") == ({"weight"}, False)
    assert numbers(Fusing(), "blocks") == {1}
