import functools
import os
from collections import deque, namedtuple
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from modsurg.errors import FormatError, TrustError
from modsurg.structure.decode import Unpacker, set_attributes

WRONG = (FormatError, TrustError, LookupError, TypeError, ValueError, AttributeError, RuntimeError)


def unpack(data, names=(), shared=()):
    return Unpacker(list(names), [nn.Linear(2, 2)], [torch.zeros(1)], list(shared)).unpack(data)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({}, "not enough values"),
        ({"list": [1], "dict": {}}, "too many values"),
        ({"unheard of": 1}, "kind 'unheard of'"),
        ({"__class__": 1}, "kind '__class__'"),
        ({"name": 5}, "out of range"),
        ({"module": 1}, "out of range"),
        ({"tensor": "x"}, "must be integers"),
        ({"shared": 3}, "out of range"),
        ({"dtype": "load"}, "is not a dtype"),
        ({"dtype": 3}, "is not a dtype"),
        ({"float": "0x10"}, "string to float"),
        ({"bytes": "no base64!"}, "base64"),
        ({"items": [[{"list": []}, 1]]}, "a key or a member"),
        ({"set": [{"list": []}]}, "a key or a member"),
        ({"method": [0, "__init__"]}, "no method '__init__'"),
        ({"method": [0, "weight"]}, "no method 'weight'"),
        ({"method": [0, "state_dict"]}, "no method 'state_dict'"),
        ({"method": ["text", "format"]}, "must be integers"),
        ({"method": [0, "forward.__globals__"]}, "no method 'forward.__globals__'"),
        ({"enum": [0, "x"]}, "is not an enumeration"),
        ({"object": {"class": 0}}, "as the class of a plain object"),
        ({"device": "nowhere"}, "device"),
        ({"partial": [3, [], {}]}, "out of range"),
        ({"partial": [2, [], {}]}, "as a value"),
        ({"name": 2}, "as a value"),
        ({"partial": [0, {"range": [0, 9, 1]}, {}]}, "in the place of a list"),
        ({"set": {"range": [0, 9, 1]}}, "in the place of a list"),
        ({"object": {"class": 1, "base": {"range": [0, 9, 1]}, "length": None}}, "in the place of a list"),
        *(
            ({kind: 0}, f"kind '{kind}'")
            for kind in ("regex", "slice", "range", "path", "logger", "generator", "proxy")
        ),
    ],
    ids=str,
)
def test_data_that_the_packer_does_not_write_is_refused(data, words):
    with pytest.raises(WRONG, match=words):
        unpack(data, [nn.Linear, deque, SimpleNamespace])


@pytest.mark.parametrize("kind", [nn.Linear, type, torch.Tensor, nn.Parameter, functools.partial, range, os.system, 3])
def test_only_plain_classes_become_objects(kind):
    with pytest.raises((FormatError, TypeError), match="as the class of a plain object|is not safe"):
        unpack({"object": {"class": 0, "state": {"a": 1}}}, [kind])


def test_bottomless_data_is_refused():
    data = 1
    for _ in range(500):
        data = {"list": [data]}
    with pytest.raises(FormatError, match="nested too deeply"):
        unpack(data)
    with pytest.raises(FormatError, match="nested too deeply"):
        unpack({"shared": 0}, shared=[{"set": [{"shared": 0}]}])


def test_a_key_that_would_take_forever_to_hash_is_refused():
    """Tuples of the same tuple twice: forty levels would be 2^40 numbers."""
    levels = [[1, 2], *([{"shared": n}, {"shared": n}] for n in range(40))]
    shared = [{"object": {"class": 0, "args": level}} for level in levels]
    with pytest.raises(FormatError, match="a key or a member of a set must be"):
        unpack({"set": [{"shared": 40}]}, [namedtuple("Pair", "a b")], shared)


def test_no_descriptor_of_a_class_runs():
    class Careful:
        @property
        def size(self):
            raise AssertionError("a getter ran")

        @size.setter
        def size(self, value):
            raise AssertionError("a setter ran")

        def __setattr__(self, name, value):
            raise AssertionError("__setattr__ ran")

    value = object.__new__(Careful)
    set_attributes(value, {"other": 2})
    assert vars(value) == {"other": 2}
    with pytest.raises(TrustError, match="replaces 'size' of a Careful"):
        set_attributes(value, {"size": 1})


@pytest.mark.parametrize(
    "data",
    [
        {"partial": [0, [{"name": 1}], {}]},
        {"partial": [0, [], {"key": {"method": [0, "forward"]}}]},
        {"partial": [0, [{"partial": [0, [], {}]}], {}]},
        {"partial": [0, [{"module": 0}], {}]},
    ],
)
def test_a_partial_holds_nothing_to_call(data):
    with pytest.raises(TrustError, match="something to call among its arguments"):
        unpack(data, [nn.Linear, torch.relu])


@pytest.mark.parametrize("inner", [{"name": 0}, {"module": 0}, {"list": [{"dict": {"a": {"method": [0, "forward"]}}}]}])
def test_a_data_object_holds_nothing_to_call(inner):
    unpacker = Unpacker([nn.Linear, Options], [nn.Linear(2, 2)], [], [])
    unpacker.unpack({"object": {"class": 1, "state": {"a": inner}}})
    with pytest.raises(TrustError, match="which can be called; nothing of it ran"):
        unpacker.check_objects()


class Options:
    pass


def test_a_damaged_number_of_values_is_refused(monkeypatch):
    monkeypatch.setattr("modsurg.structure.decode.VALUES", 100)
    with pytest.raises(FormatError, match="more than 100 values"):
        unpack({"list": list(range(200))})
