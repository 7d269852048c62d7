import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modsurg.errors import PatternError
from modsurg.tree.patterns import matcher

segments = st.lists(st.text("abc123_-", min_size=1, max_size=4), min_size=1, max_size=5)


@pytest.mark.parametrize(
    ("where", "name", "holds"),
    [
        ("layer4.0.conv1", "layer4.0.conv1", True),
        ("layer4", "layer4.0", False),
        ("layer?.*.bn1", "layer3.1.bn1", True),
        ("layer?.*.bn1", "layer3.1.downsample.bn1", False),
        ("layer*", "layer3.1", False),
        ("**.relu", "relu", True),
        ("**.relu", "a.b.relu", True),
        ("**.relu", "a.b.relu2", False),
        ("**.relu", "a.prelu", False),
        ("layer4.**", "layer4", True),
        ("layer4.**", "layer4.0.conv1", True),
        ("layer4.**", "layer40.0", False),
        ("a.**.b.**.c", "a.x.y.b.c", True),
        ("a.**.b.**.c", "a.x.y.c", False),
        ("**", "", True),
        ("*", "", False),
        ("layer[34].0", "layer3.0", True),
        ("layer[!34].0", "layer3.0", False),
        ("layer[!34].0", "layer1.0", True),
        ("a+b.*", "a+b.c", True),
        (r"re:layer[34]\..*", "layer3.0", True),
        (r"re:layer[34]", "layer3.0", False),
    ],
)
def test_the_grammar(where, name, holds):
    assert matcher(where)(name) is holds


@given(segments)
def test_a_name_matches_itself_and_its_globs(parts):
    name = ".".join(parts)
    for where in (
        name,
        "**",
        ".".join("*" for _ in parts),
        f"**.{parts[-1]}",
        f"{parts[0]}.**",
        "re:" + re.escape(name),
    ):
        assert matcher(where)(name)
    assert not matcher(".".join(["*"] * (len(parts) + 1)))(name)


def test_many_stars_take_linear_time():
    assert not matcher(".".join(["**"] * 30) + ".x")(".".join("a" * 200))


@pytest.mark.parametrize("where", ["a[b", "re:(", "re:["])
def test_what_does_not_parse_says_where(where):
    with pytest.raises(PatternError, match="does not parse"):
        matcher(where)
