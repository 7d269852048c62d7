"""Columns keep to the width that is there."""

import pytest
from printed import resnet
from torch import nn

from modsurg import summary
from modsurg.views.text import cells


@pytest.mark.parametrize("width", [24, 30, 40, 60, 79, 80, 100, 120, 300])
def test_no_line_is_wider_than_asked(width):
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module("卷积层" * 12, nn.Conv2d(3, 8, 3).half())
            self.tied = nn.Sequential(*[nn.Sequential(nn.Linear(1000, 1000))] * 3)

        def forward(self, x):
            return x

    for found in (summary(Wide(), (1, 3, 9, 9)), summary(Wide()), resnet()):
        lines = found.render(width, bars=True).splitlines()
        assert max(map(cells, lines)) <= width


def test_the_name_of_a_layer_deep_in_the_tree_is_there_at_every_width():
    model = nn.Linear(4, 4)
    for _ in range(30):
        model = nn.Sequential(model)
    for width in (40, 80):
        rows = summary(model).render(width).splitlines()[2 + (width < 80) : -1]
        assert all(row.split()[0] == "0" for row in rows[:-1])
