"""Pickles read as data: right for data, inert for everything else, bounded for bombs."""

import collections
import contextlib
import os
import pickle
import struct

import hypothesis
import hypothesis.strategies as st
import pytest

from modsurg.checkpoints.formats.torch_save.unpickler import Loading, Made, Name, Ordered, unpickle
from modsurg.errors import FormatError

NOTHING = Loading({}, lambda saved: ("persistent", saved))
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers(-(1 << 60) + 1, (1 << 60) - 1), inner)
        | st.sets(st.text())
    ),
    max_leaves=20,
)


@hypothesis.given(PLAIN, st.sampled_from([4, 5]))
def test_data_is_what_pickle_makes_of_it(value, protocol):
    assert unpickle(pickle.dumps(value, protocol), NOTHING).value == value


@hypothesis.given(st.recursive(st.integers() | st.text(), lambda inner: st.lists(inner) | st.tuples(inner, inner)))
def test_protocol_two(value):
    assert unpickle(pickle.dumps(value, 2), NOTHING).value == value


def test_sharing_and_cycles():
    inner = [1]
    value = unpickle(pickle.dumps([inner, inner]), NOTHING).value
    assert value[0] is value[1]
    inner.append(inner)
    value = unpickle(pickle.dumps(inner), NOTHING).value
    assert value[1] is value


def test_one_pickle_after_the_other():
    data = pickle.dumps("a") + pickle.dumps([2])
    first = unpickle(data, NOTHING)
    assert first.value == "a"
    assert unpickle(data, NOTHING, first.end).value == [2]


class Plain:
    def __init__(self):
        self.size = 3


class Call:
    def __reduce__(self):
        return os.getenv, ("HOME",)


def test_nothing_is_made():
    found = unpickle(pickle.dumps({"a": Plain(), "b": Call(), "c": os.getcwd}, 2), NOTHING)
    plain, call = found.value["a"], found.value["b"]
    assert (plain.called, plain.maker.name, plain.state) == (False, "Plain", {"size": 3})
    assert (call.called, str(call.maker), call.args) == (True, "os.getenv", ("HOME",))
    assert found.value["c"] == Name("posix", "getcwd")
    assert found.made == [plain, call]


def test_a_module_that_does_not_exist_is_only_a_name():
    found = unpickle(b"\x80\x02cno.such.module\nThing\n)\x81}X\x01\x00\x00\x00aK\x01sb.", NOTHING)
    assert isinstance(found.value, Made)
    assert str(found.value.maker) == "no.such.module.Thing"
    assert found.value.state == {"a": 1}


def test_calls_that_mean_data_are_carried_out():
    loading = Loading({"collections.OrderedDict": Ordered}, lambda saved: saved)
    ordered = collections.OrderedDict(a=1)
    ordered.note = "x"
    found = unpickle(pickle.dumps(ordered, 2), loading)
    assert found.value == {"a": 1}
    assert found.value.state == {"note": "x"}
    assert not found.made


def test_the_names_of_python_two():
    assert unpickle(b"\x80\x02c__builtin__\neval\n.", NOTHING).value == Name("builtins", "eval")
    assert unpickle(b"\x80\x02U\x03abc.", NOTHING).value == "abc"
    assert unpickle(b"\x80\x02U\x02\xff\xfe.", NOTHING).value == "\xff\xfe"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "damaged or cut off"),
        (b"\x80\x02", "damaged or cut off"),
        (b".", "damaged or cut off"),
        (b"\x80\x02K", "damaged or cut off"),
        (b"\x80\x02t.", "damaged or cut off"),
        (b"\x80\x02h\x05.", "damaged or cut off"),
        (b"cos\nsystem", "cut off in a name"),
        (b"X\xff\xff\xff\xffabc.", "4,294,967,295 bytes wanted, 4 left"),
        (b"\x96" + struct.pack("<Q", 1 << 60) + b".", "bytes wanted, 1 left"),
        (b"\x8b\xff\xff\xff\xff.", "-1 bytes wanted"),
        (b"]K\x01K\x02s.", "keys and values for a list"),
        (b"}K\x01a.", "items for a dict"),
        (b"(](}K\x01u.", "keys and values for a|damaged"),
        (b"}]K\x01s.", "a list as a key, which no state_dict has"),
        (b"})\x85\x85K\x01s.", "a tuple as a key"),
        (b"cos\nsystem\n}b.", "changes os.system itself"),
        (b"\x80\x02(I1\n.", "operation 0x49 at byte 3"),
        (b"<html>", "operation 0x3c at byte 0"),
    ],
)
def test_damage(data, message):
    with pytest.raises(FormatError, match=message):
        unpickle(data, NOTHING)


def test_a_memo_of_billions_takes_no_memory():
    """The C unpickler makes room for every number below the largest."""
    found = unpickle(b"\x80\x02Nr\xff\xff\xff\xff.", NOTHING)
    assert found.value is None


def test_a_key_that_would_take_years_to_hash():
    """Each tuple holds the one before it twice; Python hashes both."""
    doubling = b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(100))
    with pytest.raises(FormatError, match="a tuple as a key"):
        unpickle(b"})" + doubling + b"Ns.", NOTHING)


@hypothesis.given(st.binary(max_size=60))
def test_noise(data):
    with contextlib.suppress(FormatError):
        unpickle(b"\x80\x02" + data, NOTHING)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (pickle.dumps({number * (2**61 - 1) for number in range(1, 4)}, 4), "a number of more than 60 bits as a key"),
        (pickle.dumps({tuple(range(100)): 1}, 2), "a tuple of 100 values as a key"),
        (pickle.dumps([1 << 5000], 2), "a number of 626 bytes"),
    ],
)
def test_values_that_take_long_to_hash_or_print(data, message):
    with pytest.raises(FormatError, match=message):
        unpickle(data, NOTHING)


def test_calls_of_calls_can_be_shown():
    """Each object is made by the one before it."""
    calls = unpickle(b"\x80\x02cos\nsystem\n" + b")R" * 50_000 + b".", NOTHING).value
    assert repr(calls) == "<Made>"
