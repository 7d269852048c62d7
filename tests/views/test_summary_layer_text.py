"""The arguments that matter."""

import pytest
from torch import nn

from modsurg.views.summary.layer_text import detail


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Conv2d(3, 8, (3, 1), dilation=2, groups=1), "3->8 k3x1 d2"),
        (nn.ConvTranspose2d(8, 4, 2, stride=2), "8->4 k2 s2"),
        (nn.Conv2d(8, 8, 3, padding="same", groups=8), "8->8 k3 psame g8"),
        (nn.Bilinear(2, 3, 4), "2,3->4"),
        (nn.Embedding(100, 8), "100->8"),
        (nn.MultiheadAttention(8, 2), "8 h2"),
        (nn.LSTM(8, 16, 2, bidirectional=True), "8->16 x2 bidirectional"),
        (nn.LayerNorm((4, 8)), "4x8"),
        (nn.GroupNorm(2, 8), "8 g2"),
        (nn.BatchNorm2d(8), "8"),
        (nn.MaxPool2d(3, stride=2, padding=1), "3 s2 p1"),
        (nn.AdaptiveAvgPool2d((None, 3)), ""),
        (nn.Upsample(scale_factor=2), "x2"),
        (nn.LeakyReLU(0.1), "0.1"),
        (nn.Dropout(0.5), "0.5"),
        (nn.ReLU(), ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else value,
)
def test_labels(module, expected):
    assert detail(vars(module)) == expected


def test_attributes_of_strange_types_say_nothing():
    assert detail({"in_features": object(), "out_features": 3, "kernel_size": ()}) == ""
