"""A page that folds without a script."""

from printed import resnet
from torch import nn

from modsurg import summary


def test_html_folds_and_takes_the_pages_colours():
    page = resnet()._repr_html_()
    assert page.count("<details") == page.count("</details>") > 10
    assert "<script" not in page
    assert "color: inherit" in page
    assert "&lt;lambda" in summary(nn.Sequential(type("<lambda", (nn.ReLU,), {})()))._repr_html_()
