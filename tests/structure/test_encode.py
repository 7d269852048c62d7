import argparse
import collections
import contextlib
import dataclasses
import datetime
import decimal
import enum
import functools
import json
import logging
import math
import operator
import pathlib
import re
import sqlite3
import threading
import types
import uuid
import weakref

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from modsurg.errors import TrustError
from modsurg.structure.decode import Unpacker
from modsurg.structure.encode import Packer
from modsurg.structure.trust import Trust


class Color(enum.Enum):
    RED = "r"


Point = collections.namedtuple("Point", "x y")


@dataclasses.dataclass
class Config:
    size: int
    kind: str
    parts: list = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    size: int


class Plain:
    def __init__(self, **attributes):
        raise AssertionError("no constructor is called")


class Registry(dict):
    pass


class Name(str):
    pass


def plain(**attributes):
    value = object.__new__(Plain)
    value.__dict__.update(attributes)
    return value


class Tree:
    """The modules and tensors around a value."""

    def __init__(self, modules=(), tensors=None):
        self.modules = list(modules)
        self.tensors = [] if tensors is None else tensors

    def module(self, module, path):
        return self.modules.index(module)

    def tensor(self, tensor, path):
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def hooks(self, hooks):
        return None


def round_trip(value, modules=(), tensors=None):
    tensors = [] if tensors is None else tensors

    packer = Packer(Tree(modules, tensors))
    data = packer.pack(value, "value")
    assert packer.problems == []
    data, shared = json.loads(json.dumps([data, packer.shared]))
    names = Trust([__name__]).resolve(list(packer.names))
    return Unpacker(names, list(modules), tensors, shared).unpack(data)


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        0,
        -3,
        1.5,
        10**30,
        "text",
        "\ud800",
        (),
        (1, (2, "a"), None),
        [1, [2], (3,)],
        {"a": 1, "b": [2]},
        {1: "a", (2, 3): None, None: 4},
        {"list": [1]},
        {1, 2, 3},
        set(),
        b"\x00\xff",
        1 + 2j,
        math.inf,
        -math.inf,
        torch.float16,
        torch.device("cuda:1"),
        torch.Size([1, 2]),
        collections.OrderedDict(b=1, a=2),
        collections.Counter("aab"),
        collections.deque([1, 2], maxlen=4),
        collections.defaultdict(list, {"a": [1]}),
        Point(1, [2]),
        Config(3, "red", [1]),
        Name("x"),
        nn.functional.relu,
        torch.tanh,
        nn.BatchNorm2d,
        int,
        Registry(a=1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_come_back(value):
    back = round_trip(value)
    assert back == value
    assert type(back) is type(value)
    if isinstance(value, dict):
        assert list(back) == list(value)


@pytest.mark.parametrize(
    "value",
    [
        frozenset({"a"}),
        bytearray(b"ab"),
        slice(1, None, 2),
        range(0, 9, 3),
        ...,
        torch.channels_last,
        types.SimpleNamespace(a=1),
        argparse.Namespace(a=1),
        re.compile("a+"),
        pathlib.Path("/some/where"),
        logging.getLogger("some.logger"),
        Color.RED,
        numpy.float64(2.5),
        numpy.arange(3),
        decimal.Decimal("1.50"),
        datetime.timedelta(days=1),
        uuid.UUID(int=5),
        Frozen(4),
        list[int],
        operator.attrgetter("a"),
        max,
        torch.Generator(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_no_model_needs_is_refused_by_its_place(value):
    if value is max:  # a function that a file may name, though nobody trusts it by default
        with pytest.raises(TrustError, match=r"builtins\.max"):
            Trust([__name__]).resolve(list(packed_names(value)))
        return
    (problem,) = problems({"config": [value]})
    assert problem.startswith("net.head['config'][0]  ")


def packed_names(value):
    packer = Packer(Tree())
    packer.pack(value, "net.head")
    return packer.names


def test_values_whose_equality_says_little():
    assert math.isnan(round_trip(math.nan))
    assert str(round_trip(-0.0)) == "-0.0"
    part = round_trip(functools.partial(nn.LayerNorm, 3, eps=1e-6))
    assert (part.func, part.args, part.keywords) == (nn.LayerNorm, (3,), {"eps": 1e-6})
    back = round_trip(collections.defaultdict(list, {"a": [1]}))
    assert back["new"] == []
    assert round_trip(collections.deque([1], maxlen=3)).maxlen == 3
    registry = Registry(a=1)
    registry.owner = "me"
    assert round_trip(registry).owner == "me"


def test_plain_objects_come_back_without_their_constructor():
    back = round_trip(plain(a=1, inner=plain(b=[2])))
    assert (type(back), back.a, back.inner.b) == (Plain, 1, [2])


def test_one_object_at_two_places_stays_one():
    config = plain(size=[1])
    back = round_trip({"a": config, "b": [config, config.size]})
    assert back["a"] is back["b"][0]
    assert back["b"][1] is back["a"].size


def test_an_object_may_hold_itself():
    loop = plain()
    loop.me = loop
    assert (back := round_trip(loop)).me is back
    items = []
    items.append({"up": items})
    assert (back := round_trip(items))[0]["up"] is back


def test_modules_tensors_and_methods_of_the_tree():
    inner = nn.Linear(2, 2)
    model = nn.Sequential(inner)
    tensor = torch.ones(2)
    tensors = []
    value = {"m": inner, "t": [tensor], "f": inner.forward, "w": weakref.ref(tensor)}
    back = round_trip(value, [inner, model], tensors)
    assert back["m"] is inner
    assert back["t"][0] is tensor
    assert back["f"].__self__ is inner
    assert back["w"]() is tensor


def problems(value):
    packer = Packer(Tree())
    packer.pack(value, "net.head")
    return packer.problems


def local_function():
    def inner():
        pass

    return inner


@pytest.mark.parametrize(
    "value, words",
    [
        (lambda x: x, "net.head  a lambda"),
        ([1, {"k": lambda x: x}], r"net.head\[1\]\['k'\]  a lambda"),
        (local_function(), "net.head  local_function.<locals>.inner, which has no name"),
        (threading.Lock(), "net.head  a _thread.lock"),
        ((i for i in ()), "net.head  a builtins.generator"),
        (numpy.ma.array([1, 2], mask=[0, 1]), "net.head  a numpy.ma"),
        ([].append, "net.head  list.append"),
        (weakref.ref(local_function), "net.head  a weakref.ReferenceType"),
        (plain(a=plain(lock=threading.Lock())), "net.head.a.lock  a _thread.lock"),
        (types.MethodType(local_function, 3), "net.head  a method of a int"),
        ({1: {}.keys()}, r"net.head\[1\]  a builtins.dict_keys"),
    ],
)
def test_what_can_not_be_kept_is_named_by_its_place(value, words):
    (problem,) = problems(value)
    assert re.match(words, problem)
    assert ": " in problem


def test_a_weak_reference_that_is_dead_stays_dead():
    target = torch.ones(1)
    reference = weakref.ref(target)
    del target
    assert round_trip(reference)() is None


def test_an_open_file_is_named(tmp_path):
    with open(tmp_path / "log", "w") as file:
        assert "net.head  a _io.TextIOWrapper" in problems(file)[0]
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        assert "net.head  a sqlite3.Connection" in problems(database)[0]


def test_everything_that_can_not_be_kept_is_listed():
    assert len(problems([lambda: 0, threading.Lock(), lambda: 1])) == 3


def test_nesting_has_a_limit():
    deep = []
    for _ in range(1000):
        deep = [deep]
    assert "nested too deeply" in problems(deep)[0]


def test_the_order_of_a_set_does_not_reach_the_file():
    packed = {json.dumps(Packer(Tree()).pack(set(order), "")) for order in (["a", "b", "c"], ["c", "a", "b"])}
    assert packed == {'{"set": ["a", "b", "c"]}'}


KEYS = st.integers(-(2**59), 2**59)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | KEYS, inner, max_size=4)
        | st.sets(KEYS | st.text(), max_size=4)
    ),
    max_leaves=20,
)


@given(VALUES)
def test_any_plain_data_comes_back(value):
    assert round_trip(value) == value
