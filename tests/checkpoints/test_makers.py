"""What a pickle may call with which arguments: bombs, and numpy told lies."""

import collections
import enum
import fractions
import zipfile

import numpy
import pytest
import torch
from torch import nn

from modsurg import load_model
from modsurg.checkpoints.makers import classes_of_numbers
from modsurg.errors import FormatError, TrustError

RANGE = b"cbuiltins\nrange\nK\x00\x8a\x06\x00\x00\x00\x00\x00\x01\x86R"  # range(0, 1 << 40)
MANY = b"](" + b"".join(b"M" + n.to_bytes(2, "little") for n in range(50_000)) + b"eq\xfe"
BOMB = b")" + b"".join(b"q" + bytes([n]) + b"h" + bytes([n]) + b"\x86" for n in range(200, 255))  # 2^55 numbers
LETTER = b"c_codecs\nencode\nX\x01\x00\x00\x00bX\x06\x00\x00\x00latin1\x86R"
TEN = b"\x8a\x06\x00\x00\x00\x00\x00\x01"


def text(value):
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def dtype(code, state=b""):
    return b"cnumpy\ndtype\n" + text(code) + b"\x89\x88\x87R" + state


def array(shape, letter=LETTER):
    return b"cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + shape + letter + b"\x87R"


def scalar(kind, data):
    return b"cnumpy._core.multiarray\nscalar\n" + kind + data + b"\x86R"


class Pair(collections.namedtuple("Pair", "a b")):
    pass


class Row(tuple):
    pass


class Raw(bytes):
    pass


class Color(enum.Enum):
    RED = (1, 2)


def holding(path, code):
    """A pickled model with one attribute more, which this code makes."""
    torch.save(nn.ReLU(), path.with_name("plain.pt"))
    with zipfile.ZipFile(path.with_name("plain.pt")) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            more = data[:-2] + text("extra") + code + b"sb."
            new.writestr(name, more if name.endswith("data.pkl") else data)
    return path


@pytest.mark.parametrize(
    "code, words",
    [
        (b"cbuiltins\ntuple\n" + RANGE + b"\x85\x81", r"builtins\.tuple"),
        (b"cbuiltins\nlist\n" + RANGE + b"\x85\x81", r"builtins\.list"),
        (b"cbuiltins\nbytes\n" + TEN + b"\x85\x81", r"builtins\.bytes"),
        (b"cbuiltins\ntype\n" + text("X") + b")}\x87\x81", r"builtins\.type"),
        (b"ctorch.storage\nUntypedStorage\n" + TEN + b"\x85\x81", r"UntypedStorage"),
        (b"ctorch\nTensor\n" + TEN + b"\x85\x81", r"torch\.Tensor"),
        (b"ctest_makers\nRow\n" + RANGE + b"\x85\x81", r"test_makers\.Row"),
        (b"ctest_makers\nRaw\n" + TEN + b"\x85\x81", r"test_makers\.Raw"),
        (b"cpathlib\nPosixPath\n]\x85R", r"pathlib\.PosixPath"),
        (dtype("O8"), r"numpy\.dtype"),
        (dtype("V9999999"), r"numpy\.dtype"),
        (dtype("i8", b"(K\x03" + text("<") + b"NNNK\x40J\xff\xff\xff\xffK\x00tb"), r"numpy\.dtype"),
        (array(TEN + b"\x85"), r"_reconstruct"),
        (scalar(dtype("i8"), TEN), r"scalar"),
        (scalar(b"cbuiltins\nint\n", LETTER), r"scalar"),
        (b"cnumpy\ndtype\n)R", r"numpy\.dtype"),
        (b"cnumpy._core.multiarray\nscalar\n" + dtype("i8") + b"\x85R", r"scalar"),
        (b"cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85\x86R", r"_reconstruct"),
        (b"ctest_makers\nColor\ncdecimal\nDecimal\n" + text("1") + b"\x85R)b\x85R", r"test_makers\.Color"),
        (b"cfractions\nFraction\n" + text("1e4000000") + b"\x85R", r"fractions\.Fraction"),
        (b"cfractions\nFraction\n" + text("1E4000000") + b"\x85\x81", r"fractions\.Fraction"),
        (b"clogging\ngetLogger\n" + text("a." * 20000) + b"\x85R", r"logging\.getLogger"),
        (b"clogging\ngetLogger\n" + text("a." * 21) + b"\x85R", r"logging\.getLogger"),
        (b"ctest_makers\nColor\n" + BOMB + b"\x85\x81", r"test_makers\.Color"),
        (b"ctest_makers\nColor\n" + BOMB + b"\x85R", r"test_makers\.Color"),
        (b"ccollections\ndeque\n" + RANGE + b"\x85R", r"collections\.deque"),
        (b"ccollections\ndeque\n)cbuiltins\nint\n\x86R", r"collections\.deque"),
        (b"ccollections\ndeque\n)K\x01K\x01\x87R", r"collections\.deque"),
        (b"cbuiltins\nbytes\n" + TEN + b"\x85R", r"builtins\.bytes"),
    ],
)
def test_a_call_that_is_no_data(tmp_path, code, words):
    with pytest.raises(TrustError, match=rf"it wants to call [\w.]*{words}, which is no data; nothing of it ran"):
        load_model(holding(tmp_path / "m.pt", code), trust=__name__)


@pytest.mark.parametrize(
    "code, words",
    [
        (b"cbuiltins\nfrozenset\n" + RANGE + b"\x85R", "damaged"),
        (b"cbuiltins\nfrozenset\n(](" + BOMB + b"etR", "a tuple as a key"),
        (b"}" + BOMB + b"K\x01s", "a tuple as a key"),
        (b"}cbuiltins\nslice\n" + BOMB + b"NN\x87RK\x01s", r"<builtins\.slice> as a key"),
        (b"}ctest_makers\nPair\ncbuiltins\nslice\n" + BOMB + b"NN\x87RK\x01\x86\x81K\x01s", r"Pair> as a key"),
        (b"ccollections\ndefaultdict\nN}" + BOMB + b"K\x01s\x86R", "a tuple as a key"),
        *[
            (MANY + b"0(" + (kind + b"h\xfe\x85" + made) * 100 + b"t", "copies the same values over and over")
            for kind, made in [
                (b"cbuiltins\nfrozenset\n", b"R"),
                (b"cbuiltins\nset\n", b"R"),
                (b"ccollections\ndeque\n", b"R"),
                (b"ctest_makers\nRow\n", b"\x81"),
            ]
        ],
        (b"cre\n_compile\nK\x01R", "calls re._compile with 1, not with a tuple"),
        (b"}ctest_makers\nPair\n" + BOMB + b"K\x01\x86\x81K\x01s", r"<test_makers\.Pair> as a key"),
        (dtype("i8", b"Nb" + 2 * (b"(K\x03" + text("<") + b"NNNJ\xff\xff\xff\xff" * 2 + b"K\x00tb")), "damaged|twice"),
        (array(b"K\x00\x85") + 2 * b")b", r"fills <numpy\._core\.multiarray\._reconstruct> twice"),
    ],
)
def test_what_would_never_end_or_hides_something(tmp_path, code, words):
    with pytest.raises(FormatError, match=words):
        load_model(holding(tmp_path / "m.pt", code), trust=__name__)


@pytest.mark.parametrize(
    "code, value",
    [
        (b"ctest_makers\nPair\nK\x01" + RANGE + b"\x86\x81", Pair(1, range(1 << 40))),
        (b"ctest_makers\nRow\n(K\x01K\x02t\x85\x81", Row((1, 2))),
        (b"ctest_makers\nRaw\n" + LETTER + b"\x85\x81", Raw(b"b")),
        (scalar(dtype("i1"), LETTER), numpy.int8(98)),
        (b"}" + scalar(dtype("i1"), LETTER) + b"K\x01s", {numpy.int8(98): 1}),
        (b"}ctest_makers\nPair\nK\x01K\x02\x86\x81K\x01s", {Pair(1, 2): 1}),
        (b"ctest_makers\nColor\nK\x01K\x02\x86\x85R", Color.RED),
        (b"ctest_makers\nColor\nK\x01K\x02\x86\x85\x81", Color.RED),
        (b"ccollections\ndeque\n](K\x01K\x02eK\x01\x86R", collections.deque([2], 1)),
        (b"ccollections\ndefaultdict\nN}K\x01K\x02s\x86R", collections.defaultdict(None, {1: 2})),
        (b"cfractions\nFraction\n" + text("1/3") + b"\x85R", fractions.Fraction(1, 3)),
        (b"cbuiltins\nfrozenset\n](K\x01K\x02e\x85R", frozenset({1, 2})),
    ],
)
def test_a_plain_value(tmp_path, code, value):
    back = load_model(holding(tmp_path / "m.pt", code), trust=__name__).extra
    assert back == value
    assert type(back) is type(value)


def test_a_wrong_value_is_not_told_whole(tmp_path):
    code = b"ctest_makers\nColor\n" + text("a" * 9999) + b"\x85R"
    with pytest.raises(FormatError, match="a{200}") as caught:
        load_model(holding(tmp_path / "m.pt", code), trust=__name__)
    assert len(str(caught.value)) < 1000


def test_classes_of_numbers():
    assert {type(numpy.dtype("float64")), type(numpy.dtype("int8"))} < set(classes_of_numbers())
    assert type(numpy.dtype("O")) not in classes_of_numbers()
