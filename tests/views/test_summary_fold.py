"""Which rows are shown, and which stand for several."""

import pytest
from torch import nn

from modsurg import select, summary
from modsurg.errors import NoMatchError

torchvision = pytest.importorskip("torchvision")


def test_runs_of_equal_blocks():
    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(5)), nn.Linear(4, 2))
    assert "0-4   5 x Sequential" in str(summary(blocks))
    opened = str(summary(blocks, depth=2))
    assert "x Sequential" not in opened
    assert opened.count("ReLU") == 5
    assert "0-4   5 x Sequential" in str(summary(blocks, depth=1))
    blocks[2][0].weight.requires_grad_(False)
    assert "0-1  " in str(summary(blocks))
    assert "0-4" not in str(summary(blocks))


def test_where_opens_what_it_selects():
    model = torchvision.models.resnet18()
    text = str(summary(model, where="layer1.*.conv2"))
    assert [line.split()[0] for line in text.splitlines()[2:-1]] == ["layer1", "0", "conv2", "1", "conv2"]
    by_class = summary(model, where=nn.AdaptiveAvgPool2d).to_dict()["rows"]
    assert [row["path"] for row in by_class] == ["", "avgpool"]
    assert str(summary(model, where=select(model, "layer1.*.conv2"))) == text
    with pytest.raises(NoMatchError, match=r"layer4\.0\.conv1"):
        summary(model, where="layer4.0.con1")


def test_a_hundred_thousand_modules():
    model = nn.Sequential(*(nn.Sequential(*(nn.ReLU() for _ in range(99))) for _ in range(1000)))
    found = summary(model)
    assert found.to_dict()["total"]["modules"] == 100_001
    assert len(str(found).splitlines()) == 4
    assert len(found._repr_html_()) < 5_000_000
