"""Pictures with predictions."""

import pytest
import torch

from modsurg.training.sketches import are_pictures, pictures


def test_each_picture_says_what_was_predicted_and_what_it_is():
    pytest.importorskip("matplotlib")
    scores = torch.tensor([[9.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    figure = pictures(torch.rand(3, 3, 8, 8), scores, torch.tensor([0, 1, 1]), ["cat"])
    assert [axis.get_title() for axis in figure.axes[:4]] == ["cat 100%", "cat 100%, is 1", "1 100%", ""]
    assert [axis.title.get_color() for axis in figure.axes[:3]] == ["green", "red", "green"]
    assert [len(axis.images) for axis in figure.axes[:4]] == [1, 1, 1, 0]


def test_what_can_be_shown():
    images, scores, labels = torch.rand(2, 1, 4, 4), torch.rand(2, 3), torch.tensor([0, 1])
    assert are_pictures(images, scores, labels)
    assert not are_pictures(images.expand(2, 5, 4, 4), scores, labels)
    assert not are_pictures(images, scores, labels.float())
    assert not are_pictures(images, (scores,), labels)
