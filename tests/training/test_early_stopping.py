"""Patience, by how much a value must get better, and the weights of the best epoch."""

import pytest
import torch
from torch import nn

from modsurg import Trainer
from modsurg.errors import ModsurgWarning

BATCHES = [(torch.ones(2, 1), torch.zeros(2, 1))]


class Given(nn.Module):
    """A loss that has the given value in each epoch, and moves the weight by one a step."""

    def __init__(self, *values):
        super().__init__()
        self.values, self.epoch = values, 0

    def forward(self, output, target):
        value = self.values[self.epoch]
        return output.mean() - output.mean().detach() + value


def make(*values, **options):
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return Trainer(model, optimizer, Given(*values), progress=False, **options)


def fit(trainer, epochs=None, **options):
    def on_epoch(trainer):
        trainer.loss.epoch = trainer.epoch

    return trainer.fit(BATCHES, epochs=epochs or len(trainer.loss.values), on_epoch=on_epoch, **options)


def weight(trainer):
    return float(trainer.model.weight)


@pytest.mark.parametrize(("min_delta", "epochs"), [(0.0, 6), (0.1, 3), (0.04, 6), (0.06, 5)])
def test_by_how_much_it_must_get_better(min_delta, epochs):
    """Small steps add up: patience counts from the last value that was better by enough."""
    trainer = make(1.0, 0.95, 0.93, 0.90, 0.89, 0.88)
    history = fit(trainer, patience=2, min_delta=min_delta)
    assert len(history) == epochs
    assert bool(history.stopped) == (epochs < 6)
    assert trainer.state.progress.record == min(history["loss"])  # `best` is the best, by however little


@pytest.mark.parametrize("patience", [None, 2])
def test_the_weights_of_the_best_epoch_come_back(patience, tmp_path):
    for directory in (None, tmp_path):
        trainer = make(3.0, 1.0, 2.0, 2.5, checkpoint_dir=directory)
        fit(trainer, patience=patience, restore_best=True)
        assert (weight(trainer), trainer.epoch) == (-2.0, 4)
        trainer = make(3.0, 1.0, 2.0, 2.5, 9.0)
        fit(trainer, epochs=4, patience=patience)
        assert weight(trainer) == -4.0


def test_a_higher_value_may_be_the_best_and_the_average_comes_back(capsys):
    trainer = make(1.0, 3.0, 2.0, best="max:loss")
    trainer.average = torch.optim.swa_utils.AveragedModel(trainer.model)
    trainer.display.on = True
    fit(trainer, restore_best=True)
    assert weight(trainer) == -2.0
    assert float(trainer.average.module.weight) == -1.5
    assert "the weights are those of epoch 2, the best by loss" in capsys.readouterr().out


def test_in_a_loop_of_ones_own():
    trainer = make(3.0, 1.0, 2.0)
    for epoch in trainer.epochs(BATCHES, epochs=3, restore_best=True):
        for batch in epoch:
            epoch.step(*epoch.forward(batch))
        trainer.loss.epoch += 1
    assert weight(trainer) == -2.0


def test_a_run_that_was_stopped_keeps_its_weights_and_restores_when_it_is_through(tmp_path):
    values = (3.0, 1.0, 2.0, 2.5)
    first = make(*values, checkpoint_dir=tmp_path)

    def on_epoch(trainer):
        trainer.loss.epoch = trainer.epoch
        if trainer.epoch == 3:
            trainer.stop()

    first.fit(BATCHES, epochs=4, restore_best=True, on_epoch=on_epoch)
    assert weight(first) == -3.0
    again = make(*values, checkpoint_dir=tmp_path)
    again.loss.epoch = 3
    fit(again, resume=True, restore_best=True)
    assert weight(again) == -2.0
    last = make(*values, checkpoint_dir=tmp_path)
    fit(last, resume=True)  # nothing to do; the file has the end of the run
    assert weight(last) == -4.0


def test_what_cannot_come_back_is_said(tmp_path):
    first = make(1.0, 2.0, 3.0, checkpoint_dir=tmp_path)
    fit(first, epochs=2)
    (tmp_path / "best.safetensors").unlink()
    again = make(1.0, 2.0, 3.0, checkpoint_dir=tmp_path)
    again.loss.epoch = 2
    with pytest.warns(ModsurgWarning, match="can't be restored: no best.safetensors holds it. They stay"):
        fit(again, resume=True, restore_best=True)
    assert weight(again) == -3.0


def test_weights_from_before_an_edit_do_not_come_back():
    model = nn.Sequential(nn.Linear(1, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trainer = Trainer(model, optimizer, Given(1.0, 2.0), progress=False)

    def on_epoch(trainer):
        trainer.loss.epoch = trainer.epoch
        if trainer.epoch == 1:
            with trainer.edit() as e:
                e.wrap("0", nn.Sequential)

    with pytest.warns(ModsurgWarning, match="can't be restored: the model was edited since"):
        trainer.fit(BATCHES, epochs=2, restore_best=True, on_epoch=on_epoch)
