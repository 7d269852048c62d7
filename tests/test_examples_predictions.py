"""Pictures with predictions."""

import io

import pytest
import torch

pytest.importorskip("matplotlib")

from predictions import pictures


def test_each_picture_says_what_was_predicted_and_what_it_is():
    scores = torch.tensor([[9.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    figure = pictures(torch.rand(3, 3, 8, 8), scores, torch.tensor([0, 1, 1]), ["cat"])
    assert [axis.get_title() for axis in figure.axes] == ["cat, 100%\n", "cat, 100%\nis 1", "1, 100%\n", ""]
    right, wrong, also_right, _ = (axis.title.get_color() for axis in figure.axes)
    assert right == also_right != wrong
    assert [len(axis.images) for axis in figure.axes] == [1, 1, 1, 0]


def test_long_names_do_not_run_into_each_other():
    names = ["Mediterranean sea anemone", "golden retriever"]
    figure = pictures(torch.rand(16, 3, 8, 16), torch.tensor([[9.0, 0.0]] * 16), torch.arange(16) % 2, names)
    figure.savefig(io.BytesIO(), format="png")
    boxes = [axis.title.get_window_extent() for axis in figure.axes]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_few_pictures_leave_no_empty_rows():
    figure = pictures(torch.rand(5, 1, 8, 8), torch.rand(5, 2), torch.tensor([0] * 5), ())
    assert len(figure.axes) == 8
