"""Header, totals and pictures."""

import re
import xml.etree.ElementTree as ET

from torch import nn

from modsurg import summary


def test_the_header_breaks_in_two_where_it_must():
    model = nn.Sequential(nn.Linear(4, 4))
    lines = summary(model, (1, 4)).render(30).splitlines()
    assert lines[:2] == ["Sequential   1x4 -> 1x4", "cpu, float32, train"]


def test_colour_is_the_same_text():
    found = summary(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), (1, 4))
    assert re.sub(r"\x1b\[[0-9]+m", "", found.render(80, color=True, bars=False)) == found.render(80)


def test_bars_only_where_they_are_asked_for():
    found = summary(nn.Sequential(nn.Linear(4, 4)), (1, 4))
    assert "█" not in found.render(120)
    assert "█" * 12 in found.render(120, bars=True)


def test_a_picture_is_well_formed_and_follows_the_theme():
    odd = type("A<&>", (nn.ReLU,), {})
    text = summary(nn.Sequential(odd())).to_svg()
    assert "A<&>" in "".join(ET.fromstring(text).itertext())
    assert "prefers-color-scheme: dark" in text
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
