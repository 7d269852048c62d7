"""The trainer as a user meets it: fit, evaluate, predict, and a run that goes on."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from modsurg import Trainer
from modsurg.errors import BatchError, DeviceError, ModsurgWarning, NonFiniteError, TrainingError


def data(n=50, features=6, classes=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, features, generator=generator)
    return TensorDataset(x, x[:, :classes].argmax(1))


def network(classes=3):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, classes))


def accuracy(output, target):
    return (output.argmax(1) == target).float().mean()


def make(model=None, **options):
    model = model or network()
    optimizer = options.pop("optimizer", None) or torch.optim.Adam(model.parameters(), lr=0.01)
    loss = options.pop("loss", nn.CrossEntropyLoss())
    return Trainer(model, optimizer, loss, **{"progress": False, **options})


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


class TestFit:
    def test_is_a_plain_loop_bit_for_bit(self):
        mine, plain = network(), network()
        torch.manual_seed(5)
        make(mine).fit(DataLoader(data(), batch_size=8, shuffle=True), epochs=3)
        torch.manual_seed(5)
        optimizer = torch.optim.Adam(plain.parameters(), lr=0.01)
        loader = DataLoader(data(), batch_size=8, shuffle=True)
        for _ in range(3):
            for x, y in loader:
                optimizer.zero_grad()
                nn.functional.cross_entropy(plain(x), y).backward()
                optimizer.step()
        assert same(mine, plain)

    def test_history_has_a_row_an_epoch_with_means_over_samples(self):
        model = network()
        trainer = make(model, metrics=[accuracy], optimizer=torch.optim.SGD(model.parameters(), lr=0.0))
        model.eval()
        loader = DataLoader(data(20), batch_size=8)
        history = trainer.fit(loader, loader, epochs=2)
        x, y = data(20).tensors
        assert [row["epoch"] for row in history] == [1, 2]
        assert history[-1]["step"] == 6
        model.eval()
        assert history[0]["val_loss"] == pytest.approx(float(nn.functional.cross_entropy(model(x), y)))
        assert history[0]["val_accuracy"] == pytest.approx(float(accuracy(model(x), y)))
        assert history["samples_per_second"][0] > 0

    def test_a_metric_may_give_a_value_for_each_sample(self):
        trainer = make(metrics={"right": lambda output, target: output.argmax(1) == target, "mean": accuracy})
        result = trainer.evaluate(DataLoader(data(20), batch_size=8))
        assert result["right"] == pytest.approx(result["mean"])

    def test_a_second_fit_goes_on_counting(self):
        trainer = make()
        loader = DataLoader(data(), batch_size=25)
        trainer.fit(loader, epochs=2)
        assert [row["epoch"] for row in trainer.fit(loader, epochs=1)] == [1, 2, 3]
        assert trainer.step == 6

    def test_functions_are_called_after_each_step_and_each_epoch(self):
        steps, epochs = [], []
        make(accumulate=2).fit(
            DataLoader(data(), batch_size=10),
            epochs=2,
            on_step=lambda trainer: steps.append(trainer.step),
            on_epoch=lambda trainer: epochs.append(trainer.history[-1]["epoch"]),
        )
        assert epochs == [1, 2]

    def test_a_model_in_evaluation_mode_trains_in_training_mode_and_frozen_parts_stay(self):
        model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
        model[1].eval()
        make(model).fit(DataLoader(data(), batch_size=10), DataLoader(data(), batch_size=10))
        assert [module.training for module in model] == [True, False, True]
        model.eval()
        make(model).fit(DataLoader(data(), batch_size=10))
        assert model[1].training
