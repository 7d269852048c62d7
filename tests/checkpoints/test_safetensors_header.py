"""A header from a stranger: whatever is wrong with it is one clear error, in bounded time and memory."""

import json
import subprocess
import sys
import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file

from modsurg import save_state
from modsurg.checkpoints.formats.safetensors.header import HEADER_LIMIT, encode_header, read_header
from modsurg.errors import FormatError


@pytest.fixture
def good(tmp_path):
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, dtype=torch.uint8), "c": torch.zeros(0, 2)}
    return save_state(state, tmp_path / "good.safetensors")


def write(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def u8(start, stop, **changes):
    return {"dtype": "U8", "shape": [stop - start], "data_offsets": [start, stop], **changes}


def test_what_the_header_says(good):
    header = read_header(good)
    assert list(header.records) == ["a", "b", "c"]
    assert header.records["a"].dtype == "F32"
    assert header.records["a"].shape == (2, 3)
    assert header.metadata["format"] == "pt"


def test_cut_off_at_every_byte(good, tmp_path):
    raw = good.read_bytes()
    path = tmp_path / "cut.safetensors"
    for length in range(len(raw)):
        path.write_bytes(raw[:length])
        with pytest.raises(FormatError, match=r"cut\.safetensors.*cut off"):
            read_header(path)


def test_something_after_the_end(good):
    good.write_bytes(good.read_bytes() + b"\0")
    with pytest.raises(FormatError, match="bytes that belong to no tensor"):
        read_header(good)


@pytest.mark.parametrize(
    "header, data, message",
    [
        ({"a": u8(0, 3), "b": u8(2, 5)}, b"12345", "'b' overlaps another tensor"),
        ({"a": u8(0, 3), "b": u8(4, 5)}, b"12345", "'b' leaves a hole before it"),
        ({"a": u8(1, 3)}, b"123", "'a' leaves a hole before it"),
        ({"a": u8(0, 3), "b": u8(0, 3)}, b"123", "overlaps another tensor"),
        ({"a": u8(0, 4)}, b"123", "cut off"),
        ({"a": u8(0, 3, shape=[2])}, b"123", "does not take 3 bytes"),
        ({"a": u8(0, 3, data_offsets=[3, 0])}, b"123", "does not take -3 bytes"),
        ({"a": u8(0, 3, data_offsets=[0])}, b"123", "not lists of whole numbers"),
        ({"a": u8(0, 3, data_offsets=[-1, 2])}, b"123", "not lists of whole numbers"),
        ({"a": u8(0, 3, shape=[-3])}, b"123", "not lists of whole numbers"),
        ({"a": u8(0, 3, shape=[True])}, b"1", "not lists of whole numbers"),
        ({"a": u8(0, 3, shape="3")}, b"123", "not lists of whole numbers"),
        ({"a": u8(0, 3, shape=[1] * 65)}, b"123", "not lists of whole numbers"),
        ({"a": u8(0, 3, dtype="U9")}, b"123", "unknown dtype 'U9'"),
        ({"a": u8(0, 3, dtype=["U8"])}, b"123", "unknown dtype"),
        ({"a": u8(0, 0, shape=[0, 2**62, 4])}, b"", "more elements than any memory"),
        ({"a": u8(0, 0, shape=[2**64])}, b"", "more elements than any memory"),
        ({"a": {"dtype": "U8", "shape": [0]}}, b"", "has no dtype, shape and data_offsets"),
        ({"a": 3}, b"", "has no dtype, shape and data_offsets"),
        ({"__metadata__": {"a": 1}}, b"", "object of strings"),
        ({"__metadata__": ["a"]}, b"", "object of strings"),
        (b'{"a":{"dtype":"U8","shape":[1.0],"data_offsets":[0,1]}}', b"1", "not lists of whole numbers"),
        (b'{"a":{"dtype":"U8","shape":[1e400],"data_offsets":[0,1]}}', b"1", "not lists of whole numbers"),
        (b'{"a":NaN}', b"", "NaN, which is not a number of JSON"),
        (b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,1]}}', b"1", "does not parse"),
        (b'{"a":' + json.dumps(u8(0, 1)).encode() + b',"a":' + json.dumps(u8(0, 1)).encode() + b"}", b"1", "'a' twice"),
        (b'{"a":' + b"[" * 200_000, b"", "nested far too deeply"),
        (b'{"a":' + b'{"b":' * 200_000, b"", "nested far too deeply"),
        (b'{"\\ud800":' + json.dumps(u8(0, 1)).encode() + b"}", b"1", "not valid text"),
        (b'{"\xff":1}', b"", "not UTF-8 text"),
        (b'{"a":1', b"", "does not parse"),
        (b"[]", b"", "where a JSON object has to be"),
        (b" {}", b"", "where a JSON object has to be"),
        (b"{}{}", b"", "does not parse"),
        (b"{}\0", b"", "does not parse"),
        (b"", b"", "where a JSON object has to be"),
    ],
)
def test_a_lying_header(header, data, message, tmp_path):
    with pytest.raises(FormatError, match=rf"x\.safetensors.*{message}"):
        read_header(write(tmp_path / "x.safetensors", header, data))


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, HEADER_LIMIT + 1])
def test_a_header_that_claims_too_much_is_not_read(length, tmp_path):
    tracemalloc.start()
    with pytest.raises(FormatError, match="claims a header of"):
        read_header(write(tmp_path / "x.safetensors", b"{}", length=length))
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    "content, message",
    [
        (b"<!DOCTYPE html>\n<html><head><title>Sign in</title>", "is an HTML page.*get the file again"),
        (b"\n\n<html lang='en'>", "is an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:aaaa\nsize 12\n", "git-LFS pointer.*git lfs pull"),
        (b"PK\x03\x04" + bytes(100), r"zip archive, as torch\.save writes: rename it to x\.pt"),
        (b"", "cut off: 0 bytes"),
        (b"1234567", "cut off: 7 bytes"),
    ],
)
def test_something_else_under_the_name(content, message, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(FormatError, match=message):
        read_header(tmp_path / "x.safetensors")


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 255)), min_size=1, max_size=3))
def test_any_change_is_an_error_or_another_valid_header(tmp_path_factory, changes):
    """We refuse at least what the format's own library refuses."""
    path = tmp_path_factory.mktemp("change") / "x.safetensors"
    save_state({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, dtype=torch.uint8)}, path)
    raw = bytearray(path.read_bytes())
    for place, byte in changes:
        raw[place % len(raw)] = byte
    path.write_bytes(raw)
    try:
        read_header(path)
    except FormatError:
        return
    try:
        load_file(path)
    except (SafetensorError, KeyError) as error:
        pytest.fail(f"opened what the library refuses: {error}")


def test_a_terabyte_is_opened_without_reading_it(tmp_path):
    path = tmp_path / "x.safetensors"
    size = 1 << 40
    text = json.dumps({"a": u8(0, size)}).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)
    assert read_header(path).records["a"].nbytes == size


def test_no_torch_is_needed(good):
    code = (
        "import sys; from modsurg.checkpoints.formats.safetensors.header import read_header; "
        f"assert len(read_header({str(good)!r}).records) == 3; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_encoding_is_padded_to_the_alignment():
    for length in range(70):
        assert len(encode_header({}, {"x": "y" * length})) % 64 == 0
