"""What a parent's forward does with a child: call it, or only read its tensors.

Some modules hand `self.qkv.weight` to a function instead of calling `self.qkv` (nn.MultiheadAttention its out_proj,
Swin its projections). A wrapper in such a place never runs, or lacks what is read. The bytecode of forward, and of the
methods it uses, tells.
"""

import dis
import inspect
import re
from types import FunctionType

from torch import nn

_HALF = re.compile("(?:LOAD|STORE)_FAST")


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


class ForwardCode:
    """What the forwards of a model do with children of a name; each class is read once."""

    def __init__(self) -> None:
        self._reads: dict[tuple[type[nn.Module], str], tuple[set[str], bool]] = {}
        self._numbers: dict[tuple[type[nn.Module], str], set[int]] = {}

    def reads(self, parent: nn.Module, name: str) -> tuple[set[str], bool]:
        """See `reads`."""
        key = (type(parent), name)
        if key not in self._reads:
            self._reads[key] = reads(parent, name)
        return self._reads[key]

    def numbers(self, parent: nn.Module, name: str) -> set[int]:
        """See `numbers`."""
        key = (type(parent), name)
        if key not in self._numbers:
            self._numbers[key] = numbers(parent, name)
        return self._numbers[key]


def picks(container: nn.Module) -> bool:
    """Whether a container's own forward picks children by name or number, rather than run all in their order.

    Example:
        >>> class Pair(nn.Sequential):
        ...     def forward(self, x):
        ...         return self[0](x) + self[1](x)
        >>> picks(Pair(nn.ReLU(), nn.Tanh())), picks(nn.Sequential(nn.ReLU()))
        (True, False)
    """
    if type(container).forward in (nn.Sequential.forward, nn.ModuleList.forward):
        return False
    functions = _forward_functions(type(container))
    loops = any(step.opname == "FOR_ITER" for function in functions for step in dis.get_instructions(function))
    if loops or any("super" in function.__code__.co_names for function in functions):
        return False
    named = any(_uses(function, name) != (set(), False) for function in functions for name in container._modules)
    return named or bool(numbers(container, None))


def numbers(parent: nn.Module, name: str | None) -> set[int]:
    """The numbers by which forward picks children of `self.name`, as in `self.name[0]`; without a name, of `self`."""
    found: set[int] = set()
    for function in map(inspect.unwrap, _forward_functions(type(parent))):
        code = function.__code__
        steps = _instructions(function) if code.co_varnames else []
        for place, step in enumerate(steps[:-1]):
            before = [each for each in steps[max(0, place - 2) : place] if each.opname != "CACHE"]
            holder, me = (before[-1:], before[-1:]) if name is None else (before[-1:], before[-2:-1])
            indexed = steps[place + 1].opname == "BINARY_SUBSCR" or steps[place + 1].argrepr == "[]"
            if indexed and isinstance(step.argval, int) and step.opname in ("LOAD_CONST", "LOAD_SMALL_INT"):
                mine = me and me[0].argval == code.co_varnames[0] and me[0].opname.startswith("LOAD_FAST")
                if mine and (name is None or holder[0].argval == name):
                    found.add(step.argval)
    return found


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


def _instructions(function: FunctionType) -> list[dis.Instruction]:
    """Its bytecode; what Python 3.13 fuses (LOAD_FAST_LOAD_FAST, STORE_FAST_LOAD_FAST) as the two that it was."""
    steps: list[dis.Instruction] = []
    for step in dis.get_instructions(function):
        halves = _HALF.findall(step.opname) if isinstance(step.argval, tuple) else ()
        if halves:
            steps += [step._replace(opname=half, argval=name) for half, name in zip(halves, step.argval, strict=True)]
        else:
            steps.append(step)
    return steps


def _uses(function: FunctionType, name: str) -> tuple[set[str], bool]:
    if name not in function.__code__.co_names or not function.__code__.co_varnames:
        return set(), False
    me = function.__code__.co_varnames[0]
    found: set[str] = set()
    called = False
    steps = _instructions(function)
    for before, step, after in zip(steps, steps[1:], steps[2:], strict=False):
        if step.argval == name and before.argval == me and before.opname.startswith("LOAD_FAST"):
            if after.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                found.add(after.argval)
            else:
                called = True
    return found, called
