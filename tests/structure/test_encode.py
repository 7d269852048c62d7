import collections
import contextlib
import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import json
import logging
import math
import pathlib
import re
import sqlite3
import sys
import threading
import types
import typing
import uuid
import weakref

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from modsurg.structure.decode import Unpacker
from modsurg.structure.encode import Packer
from modsurg.structure.trust import Trust


class Color(enum.Enum):
    RED = "r"


class Number(enum.IntEnum):
    ONE = 1


class Permission(enum.Flag):
    READ = 1
    WRITE = 2


class Box(typing.Generic[typing.TypeVar("T")]):
    pass


Point = collections.namedtuple("Point", "x y")


@dataclasses.dataclass
class Config:
    size: int
    kind: Color
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
        frozenset({"a"}),
        set(),
        b"\x00\xff",
        bytearray(b"ab"),
        1 + 2j,
        slice(1, None, 2),
        range(0, 9, 3),
        ...,
        math.inf,
        -math.inf,
        torch.float16,
        torch.device("cuda:1"),
        torch.Size([1, 2]),
        torch.channels_last,
        torch.sparse_coo,
        collections.OrderedDict(b=1, a=2),
        collections.Counter("aab"),
        collections.deque([1, 2], maxlen=4),
        collections.defaultdict(list, {"a": [1]}),
        types.SimpleNamespace(a=1, b=(2,)),
        re.compile("a+", re.IGNORECASE),
        pathlib.Path("/some/where"),
        logging.getLogger("some.logger"),
        Color.RED,
        Number.ONE,
        Point(1, [2]),
        Config(3, Color.RED, [1]),
        Frozen(4),
        Name("x"),
        nn.functional.relu,
        torch.tanh,
        nn.BatchNorm2d,
        int,
        Registry(a=1),
        numpy.float64(2.5),
        numpy.int8(-3),
        numpy.dtype("float32"),
        numpy.uint8,
        re.compile(rb"a\x00"),
        torch.per_tensor_affine,
        Permission.READ | Permission.WRITE,
        decimal.Decimal("1.50"),
        fractions.Fraction(1, 3),
        datetime.datetime(2020, 1, 2, 3, tzinfo=datetime.timezone(datetime.timedelta(hours=1))),
        datetime.timedelta(days=1),
        pathlib.PurePosixPath("some/where"),
        uuid.UUID(int=5),
        list[int],
        Box[int],
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_come_back(value):
    back = round_trip(value)
    assert back == value
    assert type(back) is type(value)
    if isinstance(value, dict):
        assert list(back) == list(value)


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
    array = numpy.arange(6, dtype=numpy.int16).reshape(2, 3)
    assert (round_trip(array) == array).all()
    assert round_trip(array).dtype == array.dtype


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
    value = {"m": inner, "t": [tensor], "f": inner.extra_repr, "w": weakref.ref(inner), "p": weakref.proxy(inner)}
    back = round_trip(value, [inner, model], tensors)
    assert back["m"] is inner
    assert back["t"][0] is tensor
    assert back["f"]() == inner.extra_repr()
    assert back["w"]() is inner
    assert back["p"].weight is inner.weight


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
        (numpy.arange(3, dtype=">i4" if sys.byteorder == "little" else "<i4"), "net.head  a numpy.ndarray"),
        (numpy.zeros(2, dtype=numpy.longdouble), "net.head  a numpy.ndarray"),
        ([].append, "net.head  list.append"),
        (weakref.ref(local_function), "net.head  a weak reference to a function"),
        (plain(a=plain(lock=threading.Lock())), "net.head.a.lock  a _thread.lock"),
        (types.MethodType(local_function, 3), "net.head  local_function, bound by hand"),
        ({1: {}.keys()}, r"net.head\[1\]  a builtins.dict_keys"),
    ],
)
def test_what_can_not_be_kept_is_named_by_its_place(value, words):
    (problem,) = problems(value)
    assert re.match(words, problem)
    assert ": " in problem


def test_a_generator_goes_on_where_it_was():
    generator = torch.Generator().manual_seed(3)
    torch.rand(5, generator=generator)
    back = round_trip(generator, tensors=[])
    assert torch.equal(torch.rand(5, generator=back), torch.rand(5, generator=generator))


def test_a_weak_reference_that_is_dead_stays_dead():
    target = Plain.__new__(Plain)
    reference = weakref.ref(target)
    del target
    assert round_trip(reference)() is None


def test_a_read_only_array_does_not_become_writeable_by_the_back_door(recwarn):
    array = numpy.arange(3)
    array.flags.writeable = False
    assert round_trip(array).tolist() == [0, 1, 2]
    assert not recwarn


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


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=4)
        | st.sets(st.integers() | st.text(), max_size=4)
    ),
    max_leaves=20,
)


@given(VALUES)
def test_any_plain_data_comes_back(value):
    assert round_trip(value) == value
