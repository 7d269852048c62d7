import copy

import pytest
import torch
from resizes import arrange, resize
from torch import nn


def test_channels_keep_their_group():
    layer = arrange(nn.Conv1d(4, 4, 1, groups=2, bias=True))
    old = copy.deepcopy(layer)
    (report,), _ = resize(layer, out_channels=6)
    x = torch.randn(2, 4, 5)
    torch.testing.assert_close(layer(x)[:, [0, 1, 3, 4]], old(x))
    assert report.notes == (
        "an output channel keeps its group and its place in it: the second group began at 2 and begins at 3",
    )
    resize(layer, in_channels=8)
    y = torch.zeros(2, 8, 5)
    y[:, [0, 1, 4, 5]] = x
    torch.testing.assert_close(layer(y)[:, [0, 1, 3, 4]], old(x))


@pytest.mark.parametrize("bias", [True, False])
def test_a_gray_picture_keeps_its_response(bias):
    layer = arrange(nn.Conv2d(3, 4, 3, bias=bias))
    old = copy.deepcopy(layer)
    (report,), _ = resize(layer, in_channels=1)
    picture = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(layer(picture), old(picture.expand(-1, 3, -1, -1)), rtol=1e-5, atol=1e-5)
    assert report.notes == ("the three input channels were summed: a gray picture keeps its response",)
    resize(layer, in_channels=3)
    colours = torch.cat([picture, torch.randn(2, 2, 8, 8)], 1)
    torch.testing.assert_close(layer(colours), old(picture.expand(-1, 3, -1, -1)), rtol=1e-5, atol=1e-5)
