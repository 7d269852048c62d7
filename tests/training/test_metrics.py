"""Metrics: functions, and objects with a state."""

import pytest
import torch
from torch import nn

from modsurg import Trainer
from modsurg.errors import BatchError, ModsurgWarning, TrainingError
from modsurg.training import metrics as under_test

X = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
Y = X.argmax(1)
BATCHES = list(zip(X.split(4), Y.split(4), strict=True))


class Share:
    """A metric that is not a mean over batches: of what was predicted as class 0, how much is right."""

    def __init__(self):
        self.right = self.called = 0
        self.resets = 0

    def update(self, output, target):
        chosen = output.argmax(1) == 0
        self.right += int((target[chosen] == 0).sum())
        self.called += int(chosen.sum())

    def compute(self):
        return self.right / max(self.called, 1)

    def reset(self):
        self.right = self.called = 0
        self.resets += 1


class Pair(Share):
    """A collection: several values by name."""

    def compute(self):
        return {"share": torch.tensor(super().compute()), "called": self.called}


class Callable(Share):
    """As those of torchmetrics are: called, it gives the value of a batch, and adds it."""

    def __call__(self, output, target):
        self.update(output, target)
        return super().compute()


def make(**options):
    torch.manual_seed(1)
    model = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=options.pop("lr", 0.0))
    return Trainer(model, optimizer, nn.CrossEntropyLoss(), progress=False, **options)


def expected(model, x=X, y=Y):
    share = Share()
    share.update(model(x), y)
    return share.compute()


@pytest.mark.parametrize("kind", [Share, Callable])
@pytest.mark.parametrize("given", [lambda m: m, lambda m: [m], lambda m: {"share": m}], ids=["bare", "list", "dict"])
def test_an_object_is_updated_computed_and_reset(kind, given):
    trainer = make(metrics=given(kind()))
    name = next(iter(trainer.named_metrics))
    share = expected(trainer.model)
    history = trainer.fit(BATCHES, BATCHES[:2], epochs=2)
    assert history[name] == [pytest.approx(share)] * 2
    assert history[f"val_{name}"] == [pytest.approx(expected(trainer.model, X[:8], Y[:8]))] * 2
    assert trainer.evaluate(BATCHES)[name] == pytest.approx(share)
    assert trainer.named_metrics[name].compute() == pytest.approx(share)  # the object is the user's, and has the last


def test_entries_of_a_dict_become_columns_and_best_may_be_one():
    trainer = make(metrics={"pair": Pair()}, best="val_called")
    history = trainer.fit(BATCHES, BATCHES)
    assert history[0]["val_share"] == pytest.approx(expected(trainer.model))
    assert history[0]["called"] == history[0]["val_called"]
    assert trainer.state.progress.record == -history[0]["val_called"]
    with pytest.raises(TrainingError, match="epoch 1: no val_f1: .*; there are loss, .*val_share, val_called"):
        make(metrics=Pair(), best="val_f1").fit(BATCHES, BATCHES)


def test_an_evaluation_within_an_epoch_leaves_its_metric_alone():
    trainer = make(metrics=Share())
    within = []
    history = trainer.fit(BATCHES, on_step=lambda t: within.append(t.evaluate(BATCHES[:1])["share"]))
    assert history[0]["share"] == pytest.approx(expected(trainer.model))
    assert within == [pytest.approx(expected(trainer.model, X[:4], Y[:4]))] * 3


def test_a_module_with_a_state_is_used_by_its_protocol():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def update(self, output, target):
            self.seen += len(target)

        def compute(self):
            return self.seen

        def reset(self):
            self.seen.zero_()

        def forward(self, output, target):
            raise AssertionError("called as a function")

    assert make(metrics=[Counting()]).fit(BATCHES, epochs=2)["counting"] == [10, 10]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(3, 3), r"compute\(\) gave float32\[3, 3\]: it must be a number"),
        (None, r"compute\(\) gave a NoneType"),
        ({"a": 1.0, "b": [1, 2]}, r"compute\(\) gave a list for b: it must be a number"),
        ({"loss": 1.0}, r"compute\(\) gave a second value 'loss': each needs a name of its own"),
    ],
)
def test_what_is_not_a_number_is_refused(value, message):
    class Odd(Share):
        def compute(self):
            return value

    with pytest.raises(TrainingError, match=f"metric odd: {message}"):
        make(metrics=Odd()).evaluate(BATCHES)


def test_an_object_that_cannot_take_a_batch_names_it():
    class Strict(Share):
        def update(self, output, target):
            raise KeyError("label")

    with pytest.raises(BatchError, match=r"batch 1 \(step 1\): metric strict can't take output float32\[4, 3\]"):
        make(metrics=Strict()).fit(BATCHES)


@pytest.mark.parametrize("size", [3, 5])
def test_a_function_that_gives_a_matrix_is_refused(size):
    """Also where its first size happens to be the batch, as that of a confusion matrix of 3 classes is here."""

    def confusion(output, target):
        return torch.zeros(3, 3).index_put_((target, output.argmax(1)), torch.ones(len(target)), accumulate=True)

    with pytest.raises(BatchError, match=r"metric confusion gave shape \(3, 3\): give one number, or one for each"):
        make(metrics=confusion).evaluate([(X[:size], Y[:size])])
    column = make(metrics={"right": lambda output, target: (output.argmax(1) == target)[:, None]})
    assert 0 <= column.evaluate(BATCHES)["right"] <= 1


class Stored(Share):
    """Its state is not plain, so it says itself what a file holds."""

    def __init__(self):
        super().__init__()
        self.function = max

    def state_dict(self):
        return {"right": torch.tensor(self.right), "called": torch.tensor(self.called)}

    def load_state_dict(self, state):
        self.right, self.called = int(state["right"]), int(state["called"])


@pytest.mark.parametrize("kind", [Share, Stored])
def test_a_run_that_goes_on_within_an_epoch_has_the_values_of_the_whole_epoch(tmp_path, kind):
    whole = make(metrics=kind(), lr=0.1)
    whole.fit(BATCHES)
    make(metrics=kind(), lr=0.1, checkpoint_dir=tmp_path).fit(
        BATCHES, on_step=lambda t: t.stop() if t.step == 2 else None
    )
    again = make(metrics=kind(), lr=0.1, checkpoint_dir=tmp_path)
    name = kind.__name__.lower()
    assert again.fit(BATCHES, resume=True)[name] == whole.history[name]


def test_a_state_that_no_file_can_hold_is_named(tmp_path):
    class Odd(Share):
        def __init__(self):
            super().__init__()
            self.function = max

    make(metrics=Odd(), checkpoint_dir=tmp_path).fit(BATCHES, on_step=lambda t: t.stop() if t.step == 2 else None)
    with pytest.warns(ModsurgWarning, match="epoch 1: the state of metric odd is not in the file"):
        make(metrics=Odd(), checkpoint_dir=tmp_path).fit(BATCHES, resume=True)


def test_processes_that_compute_different_values_are_named(monkeypatch):
    monkeypatch.setattr(under_test, "gathered", lambda value: [value, value + 1] if value is not True else [True])
    with pytest.warns(ModsurgWarning, match="metric share computes another value in each process, shown is their mean"):
        make(metrics=Share()).evaluate(BATCHES)
