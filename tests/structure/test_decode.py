import functools
import os
import re
from collections import deque, namedtuple

import pytest
import torch
from torch import nn

from modsurg.errors import FormatError
from modsurg.structure.decode import Unpacker, set_attributes

WRONG = (FormatError, LookupError, TypeError, ValueError, AttributeError, RuntimeError, re.error)


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
        ({"dtype": "load"}, "is no dtype"),
        ({"dtype": 3}, "is no dtype"),
        ({"layout": "float32"}, "is no layout"),
        ({"float": "0x10"}, "string to float"),
        ({"bytes": "no base64!"}, "base64"),
        ({"items": [[{"list": []}, 1]]}, "unhashable"),
        ({"set": [{"list": []}]}, "unhashable"),
        ({"method": [{"module": 0}, "__init__"]}, "no method '__init__'"),
        ({"method": [{"module": 0}, "weight"]}, "no method 'weight'"),
        ({"method": ["text", "format"]}, "no method 'format'"),
        ({"method": [{"module": 0}, "forward.__globals__"]}, "no method 'forward.__globals__'"),
        ({"enum": [0, "x"]}, "is no enumeration"),
        ({"object": {"class": 0}}, "as the class of a plain object"),
        ({"scalar": ["O", "AAAAAAAAAAA="]}, "numpy dtype 'O'"),
        ({"slice": [1, 2, 3, 4]}, "at most 3 arguments"),
        ({"device": "nowhere"}, "device"),
        ({"partial": [3, [], {}]}, "callable"),
        ({"partial": [{"name": 0}, {"range": [0, 9, 1]}, {}]}, "in the place of a list"),
        ({"set": {"range": [0, 9, 1]}}, "in the place of a list"),
        ({"slice": {"range": [0, 2, 1]}}, "in the place of a list"),
        ({"object": {"class": 1, "base": {"range": [0, 9, 1]}, "length": None}}, "as the content of a deque"),
        ({"regex": ["(", 0]}, "unterminated subpattern"),
        ({"handle": [0, [0, "_parameters"]]}, "something else than hooks"),
        ({"handle": ["x", [0, "_forward_hooks"]]}, "something else than hooks"),
        ({"weakref": 3}, "weak reference"),
        ({"made": [0, []]}, "is not called"),
        ({"made": [1, [{"list": [1]}]]}, "is not called"),
        ({"alias": [3, []]}, "no type arguments"),
        ({"generator": ["cpu", 0]}, "ByteTensor"),
        ({"numpy": "O"}, "numpy dtype 'O'"),
        ({"qscheme": "float32"}, "is no qscheme"),
        ({"proxy": 3}, "weak reference"),
    ],
    ids=str,
)
def test_data_that_the_packer_does_not_write_is_refused(data, words):
    with pytest.raises(WRONG, match=words):
        unpack(data, [nn.Linear, deque])


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
    """Tuples of the same tuple twice: sixty levels would be 2^60 numbers."""
    levels = [[1, 2], *([{"shared": n}, {"shared": n}] for n in range(60))]
    shared = [{"object": {"class": 0, "base": level}} for level in levels]
    with pytest.raises(FormatError, match="a key of more than 10000 parts"):
        unpack({"set": [{"shared": 60}]}, [namedtuple("Pair", "a b")], shared)


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
    set_attributes(value, {"size": 1, "other": 2})
    assert vars(value) == {"size": 1, "other": 2}
