"""What a batch weighs."""

import collections
import dataclasses

import numpy
import pytest
import torch
from torch import nn

from modsurg import Trainer
from modsurg.errors import BatchError, TrainingError
from modsurg.training.samples import batch_lengths, count_samples

Named = collections.namedtuple("Named", "image label")


@dataclasses.dataclass
class Graph:
    x: torch.Tensor
    edges: torch.Tensor


class Opaque:
    """A batch of which nothing can be seen."""

    def to(self, device):
        return self


def ones(*sizes):
    return torch.ones(sizes)


def detection(boxes):
    return {"boxes": ones(boxes, 4), "labels": ones(boxes)}


@pytest.mark.parametrize(
    ("batch", "output", "samples"),
    [
        ((ones(4, 3), ones(4)), ones(4, 2), 4),
        ((ones(4, 3), ones(4)), None, 4),
        (Named(ones(3, 2), ones(3)), ones(3), 3),
        ((ones(4, 3), ones(4, 2), ones(4)), ones(4), 4),
        (((ones(8, 2), ones(8, 3)), (ones(8), ones(8))), (ones(8), ones(8)), 8),
        ([[ones(8, 2), ones(8, 3)], ones(8)], ones(8), 8),
        ({"x": ones(5, 3), "name": "a", "scale": torch.tensor(2.0)}, ones(5), 5),
        ({"x": ones(5, 3)}, {"loss": torch.tensor(1.0), "logits": ones(5, 2), "state": [ones(2, 5, 1)]}, 5),
        (([ones(3, 8, 8), ones(3, 9, 7)], ones(2)), ones(2, 5), 2),
        (([ones(3, 8, 8), ones(3, 8, 8)], [detection(3), detection(3)]), None, 2),
        (([ones(16), ones(16)], [0, 1]), None, 2),  # waveforms and their labels
        ({"wave": [ones(16), ones(16)], "word": ["a", "b"]}, None, 2),
        (([ones(16), ones(16)], None), ones(2, 5), 2),
        ({"images": [ones(3, 8, 8)] * 4, "targets": [detection(n) for n in (1, 1, 1, 1)]}, {"a": torch.tensor(1.0)}, 4),
        ([[ones(3, 8, 8)] * 2, [ones(3, 4), ones(3, 4)]], None, 2),
        ((numpy.ones((6, 2)), ones(6)), None, 6),
        (ones(7, 2), ones(7, 2), 7),
        ((ones(4, 2), 3.0), (ones(4), ones(1, 4, 6)), 4),
        ((Opaque(), ones(3)), ones(3), 3),
        (Opaque(), ones(3, 2), 3),
        (Opaque(), None, 1),
        ("text", torch.tensor(1.0), 1),
    ],
)
def test_what_agrees_is_counted(batch, output, samples):
    assert count_samples(batch, output) == samples


@pytest.mark.parametrize(
    ("batch", "output", "fix"),
    [
        ((ones(7, 4, 3), ones(4)), ones(4, 2), r"len\(batch\[1\]\)"),  # time first
        ((ones(7, 4), ones(7)), ones(4, 2), r"len\(batch\[1\]\)"),
        ({"lengths": ones(2), "x": ones(5, 3)}, ones(5), r"len\(batch\['x'\]\)"),
        (Graph(ones(5, 3), ones(2, 9)), ones(5), r"len\(batch.x\)"),
        ((ones(5, 3), ones(2, 9), ones(5)), ones(5), r"len\(batch\[2\]\)"),
        (([ones(3, 8, 8), ones(3, 8, 8)], ones(5)), None, r"len\(batch\[1\]\)"),
        (ones(8, 2), ones(4, 2), r"len\(batch\)"),
        (Opaque(), (ones(3, 2), ones(5)), "1"),
    ],
)
def test_what_disagrees_is_refused_with_a_line_that_works(batch, output, fix):
    with pytest.raises(
        BatchError, match=rf"lengths differ, .* Try: Trainer\(..., samples=lambda batch: {fix}"
    ) as caught:
        count_samples(batch, output)
    line = str(caught.value).partition("samples=")[2].partition("), or")[0]
    line = line.removesuffix(").") if "), or" not in str(caught.value) else line
    assert count_samples(batch, output, eval(line)) > 0


def test_what_is_said_must_be_a_number():
    batch = (ones(4, 3), ones(4))
    assert count_samples(batch, None, torch.tensor(2.5)) == 2.5
    assert count_samples(batch, None, lambda batch: (batch[1] > 0).sum()) == 4
    for said, message in (
        (lambda batch: None, r"gave None for \(float32\[4, 3\], float32\[4\]\): it must be a number"),
        (-1, "gave -1 for"),
        (float("nan"), "gave nan"),
        (lambda batch: batch[1], "samples= failed on .*RuntimeError"),
        (lambda batch: batch["x"], "samples= failed on .*"),
    ):
        with pytest.raises(BatchError, match=message):
            count_samples(batch, None, said)
    with pytest.raises(
        TrainingError, match=r"samples is a int, not a function .*: samples=lambda batch: len\(batch\[1"
    ):
        make(nn.Linear(1, 1), samples=4)


def test_an_empty_batch_has_no_samples():
    assert batch_lengths((ones(0, 3), ones(0))) == (0,)


def make(model, loss=None, lr=0.0, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    return Trainer(model, optimizer, loss or nn.CrossEntropyLoss(ignore_index=-1), progress=False, **options)


class Recurrent(nn.Module):
    """Takes (time, batch, 3), gives (batch, 2)."""

    def __init__(self):
        super().__init__()
        self.cell = nn.RNN(3, 2)

    def forward(self, x):
        return self.cell(x)[0][-1]


def test_time_first_is_said_or_refused_before_the_weights_move():
    batches = [(torch.randn(7, 4, 3), torch.tensor([0, 1, 0, 1])), (torch.randn(9, 2, 3), torch.tensor([0, 1]))]
    trainer = make(Recurrent(), lr=0.1)
    before = [p.clone() for p in trainer.model.parameters()]
    for call in (trainer.fit, trainer.evaluate):
        with pytest.raises(BatchError, match=r"batch 1.*lengths differ.*samples=lambda batch: len\(batch\[1\]\)"):
            call(batches)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    trainer = make(trainer.model, samples=lambda batch: len(batch[1]))
    each = [trainer.evaluate([batch])["loss"] for batch in batches]
    expected = (4 * each[0] + 2 * each[1]) / 6
    assert trainer.evaluate(batches)["loss"] == pytest.approx(expected)
    assert trainer.fit(batches, batches)[0]["val_loss"] == pytest.approx(expected)
    assert trainer.history[0]["loss"] == pytest.approx(expected)


def tokens(batch):
    return (batch[1] != -1).sum()


def test_a_mean_over_something_else_is_weighted_by_it():
    """Two batches of 4 with 4 and 1 counted labels: the mean over 5, in the loss, the step, the metrics and `best`."""
    torch.manual_seed(0)
    x = torch.randn(8, 3)
    y = torch.tensor([0, 1, 0, 1, -1, -1, -1, 1])
    batches = list(zip(x.split(4), y.split(4), strict=True))
    whole, parts = nn.Linear(3, 2), nn.Linear(3, 2)
    parts.load_state_dict(whole.state_dict())
    metrics = {"counted": lambda output, target: 4.0 if (target >= 0).all() else 1.0}
    trainer = make(parts, lr=0.5, samples=tokens, accumulate=2, metrics=metrics)
    loss = nn.functional.cross_entropy(whole(x), y, ignore_index=-1)
    assert trainer.evaluate(batches)["loss"] == pytest.approx(float(loss))
    history = trainer.fit(batches, batches)
    loss.backward()
    torch.optim.SGD(whole.parameters(), lr=0.5).step()
    torch.testing.assert_close(parts.weight, whole.weight)
    assert history[0]["loss"] == pytest.approx(float(loss))
    assert history[0]["counted"] == pytest.approx((4 * 4 + 1) / 5)
    assert trainer.state.progress.record == history[0]["val_loss"]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_batch_that_weighs_nothing(accumulate):
    """All of its labels are ignored, so that its mean loss is NaN."""
    x, y = torch.randn(4, 3), torch.tensor([0, 1, -1, -1])
    model = nn.Linear(3, 2)
    trainer = make(model, lr=0.1, samples=tokens, accumulate=accumulate)
    alone = trainer.evaluate([(x, y)])["loss"]
    assert trainer.evaluate([(x, y), (x, y * 0 - 1)])["loss"] == alone
    expected = nn.Linear(3, 2)
    expected.load_state_dict(model.state_dict())
    nn.functional.cross_entropy(expected(x), y, ignore_index=-1).backward()
    torch.optim.SGD(expected.parameters(), lr=0.1).step()
    history = trainer.fit([(x, y * 0 - 1), (x, y)])
    torch.testing.assert_close(model.weight, expected.weight)
    assert (trainer.step, history[0]["loss"]) == (2 // accumulate, pytest.approx(alone))


def test_a_loop_of_ones_own_says_it_with_the_step():
    trainer = make(Recurrent())
    batches = [(torch.randn(7, n, 3), torch.zeros(n).long()) for n in (4, 2)]
    losses = []
    for epoch in trainer.epochs(batches):
        for x, y in epoch:
            losses.append(trainer.loss(trainer.model(x), y))
            with pytest.raises(BatchError, match=r"epoch 1, batch .*or epoch.step\(loss, samples=...\)"):
                epoch.step(losses[-1])
            epoch.step(losses[-1], samples=len(y))
    assert trainer.history[0]["loss"] == pytest.approx(float(4 * losses[0] + 2 * losses[1]) / 6)
