"""What a parent's forward does with a child: call it, or only read its tensors.

Some modules hand `self.qkv.weight` to a function instead of calling `self.qkv` (nn.MultiheadAttention its out_proj,
Swin its projections). A wrapper in such a place never runs, or lacks what is read. The bytecode of forward, and of the
methods it uses, tells.
"""

import dis
from types import FunctionType

from torch import nn


def reads(parent: nn.Module, name: str) -> tuple[set[str], bool]:
    """The attributes of the child `name` that forward reads, and whether it uses the child in another way too.

    Where the code asks `hasattr`, what it reads may be optional, and nothing is returned.

    Example:
        >>> attributes, called = reads(nn.MultiheadAttention(4, 2), "out_proj")
        >>> sorted(attributes), called
        (['bias', 'weight'], False)
    """
    found: set[str] = set()
    called = False
    for function in _forward_functions(type(parent)):
        if "hasattr" in function.__code__.co_names:
            return set(), True
        more, other = _uses(function, name)
        found |= more
        called = called or other
    return found, called


def _forward_functions(kind: type[nn.Module]) -> list[FunctionType]:
    """Forward, and every method of the class that is named in it or in one of those."""
    waiting, functions = ["forward"], {}
    while waiting:
        name = waiting.pop()
        function = getattr(kind, name, None)
        if isinstance(function, FunctionType) and name not in functions:
            functions[name] = function
            waiting += function.__code__.co_names
    return list(functions.values())


def _uses(function: FunctionType, name: str) -> tuple[set[str], bool]:
    if name not in function.__code__.co_names or not function.__code__.co_varnames:
        return set(), False
    me = function.__code__.co_varnames[0]
    found: set[str] = set()
    called = False
    steps = list(dis.get_instructions(function))
    for before, step, after in zip(steps, steps[1:], steps[2:], strict=False):
        if step.argval == name and before.argval == me and before.opname.startswith("LOAD_FAST"):
            if after.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                found.add(after.argval)
            else:
                called = True
    return found, called
