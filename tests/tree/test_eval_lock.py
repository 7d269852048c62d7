import copy

import torch
from torch import nn

from modsurg.tree.eval_lock import held, hold, mode, release


def test_held_until_released():
    norm = nn.BatchNorm1d(2)
    model = nn.Sequential(norm)
    hold(norm)
    assert not model.train()[0].training
    assert mode(norm)
    model.eval()
    assert not mode(norm)
    model.train()
    release(norm)
    assert norm.training
    assert held(norm) is None
    release(norm)
    assert mode(norm)


def test_holding_twice_is_holding_once():
    norm = nn.BatchNorm1d(2)
    hold(norm)
    first = held(norm)
    hold(norm)
    assert held(norm) is first
    assert first.mode


def test_children_of_a_held_module_get_the_mode():
    class Norm(nn.BatchNorm1d):
        def __init__(self):
            super().__init__(2)
            self.drop = nn.Dropout()

    norm = Norm().eval()
    hold(norm)
    assert norm.train() is norm
    assert (norm.training, norm.drop.training) == (False, True)


def test_statistics_and_counts_stay():
    norm = nn.BatchNorm1d(2)
    hold(norm)
    norm.train()(torch.randn(5, 2))
    assert norm.num_batches_tracked == 0
    assert norm.running_mean.tolist() == [0, 0]
    assert repr(held(norm)) == "held in evaluation mode (modsurg.unfreeze lets it go)"


def test_a_shallow_copy_does_not_hold_the_original_back():
    norm = nn.BatchNorm1d(2)
    hold(norm)
    shallow = copy.copy(norm)
    release(norm)
    shallow.train()
    assert (norm.training, shallow.training) == (True, False)
    hold(norm)
    release(shallow)
    assert (norm.train().training, shallow.train().training) == (False, True)
