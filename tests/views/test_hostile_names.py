"""Names and texts of a stranger's file: they reach no terminal, page or Markdown as anything but text."""

import json
import re
import struct
import xml.etree.ElementTree as ET

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from torch import nn

from modsurg import diff, summary

PIECES = [
    "a@b.c",
    "#",
    "<script>",
    "</code>",
    "`",
    "```",
    "|",
    "\\",
    "*",
    "_",
    "[a](b)",
    "![](x)",
    "<http://a.b>",
    "~~~",
]
PIECES += [
    "&lt;",
    "\n",
    "\r",
    "\x00",
    "\x1b[2J",
    "\x9b31m",
    "\u202e",
    "\u2066",
    "http://a.b",
    "a@b.c",
    "#",
    "- ",
    "> ",
    "x",
    " ",
]
names = st.lists(st.sampled_from(PIECES), min_size=1, max_size=5).map("".join)
CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def check_markdown(text):
    """No tag but those of a table and of code, whatever the reader's settings are."""
    parser = MarkdownIt("commonmark", {"html": True}).enable("table")
    waiting = parser.parse(text)
    for token in waiting:
        waiting += token.children or []
        assert token.type not in ("html_inline", "html_block", "link_open", "image"), token
    assert "<script" not in parser.render(text)
    assert not CONTROL.search(text)


@given(names, names)
def test_a_model(name, kind):
    module = type(kind.replace("\0", "") or "x", (nn.ReLU,), {})()
    model = nn.Sequential()
    model._modules[name.replace(".", "")] = module
    found = summary(model)
    check_markdown(found.to_markdown())
    assert not CONTROL.search(found.render())
    ET.fromstring(found.to_svg())
    html = found._repr_html_()
    assert "<script" not in html
    assert not CONTROL.search(html)
    other = nn.Sequential()
    other._modules[name.replace(".", "")] = nn.GELU()
    changed = diff(model, other)
    check_markdown(changed.to_markdown())
    assert not CONTROL.search(changed.render())
    assert "<script" not in changed._repr_html_()


@given(names, names)
def test_a_state(first, second):
    one = {first: torch.ones(2), "epoch": first}
    two = {second: torch.zeros(3), f"{second}.a": torch.zeros(3), "epoch": second}
    changed = diff(one, two)
    check_markdown(changed.to_markdown())
    assert not CONTROL.search(changed.render())
    assert "<script" not in changed._repr_html_()


@given(names)
def test_a_file(tmp_path_factory, name):
    path = tmp_path_factory.getbasetemp() / "hostile.safetensors"
    header = {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "__metadata__": {"note": name}}
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(4))
    found = summary(path)
    check_markdown(found.to_markdown())
    assert not CONTROL.search(found.render())
    ET.fromstring(found.to_svg())


def test_a_name_of_backticks_does_not_end_the_block():
    text = diff({"```.a": torch.ones(1), "```.b": torch.ones(1)}, {}).to_markdown()
    assert text.startswith("````diff\n")
    assert MarkdownIt().parse(text)[0].type == "fence"


@pytest.mark.parametrize("text", ["\u202e", "\x9b", "\x1b", "\u2028"])
def test_what_can_not_be_seen_is_escaped(text):
    assert text not in str(diff({"a": 1.5, f"b{text}": 1}, {"a": 2.5}))
