"""What is refused before the first step."""

import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

from modsurg import Trainer, freeze
from modsurg.errors import BatchError, ModsurgWarning, NoMatchError, TrainingError
from modsurg.training.validation import named_metrics

BATCHES = [(torch.ones(4, 3), torch.tensor([0, 1, 0, 1]))]


def make(**options):
    model = options.pop("model", None) or nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    optimizer = options.pop("optimizer", None) or torch.optim.SGD(model.parameters(), lr=0.1)
    return Trainer(model, optimizer, options.pop("loss", nn.CrossEntropyLoss()), **{"progress": False, **options})


def lbfgs():
    return torch.optim.LBFGS([torch.zeros(1, requires_grad=True)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "resnet"}, r"model is a str: pass the nn.Module"),
        ({"optimizer": torch.optim.SGD}, r"optimizer is the class SGD, not made yet: .*AdamW\(model.parameters\(\)\)"),
        ({"optimizer": lbfgs()}, "LBFGS needs a closure, .*: LBFGS in a loop of your own"),
        ({"loss": nn.MSELoss}, r"loss is the class MSELoss, not made yet: loss=nn.CrossEntropyLoss\(\)"),
        ({"loss": "mse"}, "loss is a str"),
        ({"accumulate": 1.5}, "accumulate=1.5: a step takes at least one batch"),
        ({"keep": -1}, "keep=-1: how many files, keep=0 for none"),
        ({"save_every": 0}, "save_every=0: how many steps, save_every=None for none"),
        ({"clip_norm": -1.0}, "clip_norm=-1.0: a norm is greater than 0"),
        ({"scheduler": "cosine"}, r"scheduler is a str: .*StepLR\(optimizer, 10\)"),
        ({"average": nn.Linear(3, 2)}, r"not an AveragedModel of this model: AveragedModel\(model\)"),
        ({"average": AveragedModel(nn.Linear(3, 2))}, r"not an AveragedModel of this model: AveragedModel\(model\)"),
        ({"metrics": {"loss": nn.L1Loss()}}, r"metrics are called loss: each needs a name of its own"),
        ({"metrics": [lambda o, t: 1, lambda o, t: 2]}, "metrics are called <lambda>, <lambda>: each needs a name"),
        ({"model": nn.Linear(3, 2).half(), "precision": "fp16"}, r"weights of float32, .*float16: model.float\(\)"),
    ],
)
def test_options_that_cannot_work(options, message):
    if isinstance(options.get("model"), str):
        options = {"optimizer": lbfgs(), **options}
    with pytest.raises(TrainingError, match=message):
        make(**options)


def test_schedulers_that_would_not_schedule():
    model = nn.Linear(3, 2)
    optimizer, other = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    with pytest.raises(TrainingError, match="StepLR is of another optimizer: make it from this trainer's"):
        make(model=model, optimizer=optimizer, scheduler=StepLR(other, 1))
    with pytest.raises(TrainingError, match=r'waits for an epoch\'s value: scheduler=\{"epoch": ...\}'):
        make(model=model, optimizer=optimizer, scheduler={"step": ReduceLROnPlateau(optimizer)})


class Wrapper:
    """An optimizer around another, as Lookahead is."""

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.inner, name)


def test_an_optimizer_around_another_goes_with_a_scheduler_of_the_inner_one():
    model = nn.Linear(3, 2)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = make(model=model, optimizer=Wrapper(inner), scheduler=StepLR(inner, 1, gamma=0.5))
    trainer.fit(BATCHES, epochs=2)
    assert (trainer.step, inner.param_groups[0]["lr"]) == (2, 0.025)
    with pytest.raises(TrainingError, match="Wrapper needs a closure"):
        make(optimizer=Wrapper(lbfgs()))


class Counting(LambdaLR):
    total_steps = 1


def test_the_steps_of_a_one_cycle_schedule_are_counted_wherever_it_is():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    parts = [LinearLR(optimizer), OneCycleLR(optimizer, 0.1, total_steps=7)]
    for scheduler in (SequentialLR(optimizer, parts, [4]), {"step": Counting(optimizer, lambda step: 1.0)}):
        trainer = make(model=model, optimizer=optimizer, scheduler=scheduler)
        trainer.fit(BATCHES * 10)
        assert trainer.step == 10
    scheduler = OneCycleLR(optimizer, 0.1, total_steps=7)
    with pytest.raises(TrainingError, match=r"7 steps, 0 of them done, and 10 are .*, total_steps=10"):
        make(model=model, optimizer=optimizer, scheduler=scheduler).fit(BATCHES * 10)
    parts = [LinearLR(optimizer), OneCycleLR(optimizer, 0.1, total_steps=5)]
    scheduler = {"step": SequentialLR(optimizer, parts, [4])}
    with pytest.raises(TrainingError, match=r"has 5 steps, 0 of them done, and 6 are to come: .*total_steps=6"):
        make(model=model, optimizer=optimizer, scheduler=scheduler).fit(BATCHES * 10)
    trainer = make(model=model, optimizer=optimizer, scheduler=scheduler)
    trainer.fit(BATCHES * 9)
    assert (trainer.step, parts[1].last_epoch) == (9, 5)
    scheduler = ChainedScheduler([StepLR(optimizer, 3), OneCycleLR(optimizer, 0.1, total_steps=5)], optimizer)
    with pytest.raises(TrainingError, match=r"has 5 steps, 0 of them done, and 6 are to come: .*total_steps=6"):
        make(model=model, optimizer=optimizer, scheduler=scheduler).fit(BATCHES * 6)


def test_a_one_cycle_schedule_that_counts_batches_for_steps():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer = make(model=model, optimizer=optimizer, accumulate=3)
    trainer.scheduler = OneCycleLR(optimizer, 0.1, total_steps=2 * 10)
    told = r"20 steps, .* each batch, and accumulate=3 makes 8 of them, .*: total_steps=8, which is epochs \* ceil"
    with pytest.warns(ModsurgWarning, match=told):
        trainer.fit(BATCHES * 10, epochs=2)
    trainer.scheduler = OneCycleLR(optimizer, 0.1, total_steps=8)
    trainer.fit(BATCHES * 10, epochs=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 1.5}, "epochs=1.5: train for at least one epoch"),
        ({"min_delta": -1}, "min_delta=-1: it must be a number, 0 or more"),
        ({"min_delta": "a"}, "min_delta='a': it must be a number"),
        ({"patience": 0}, "patience=0: how many epochs to wait, patience=None for no end"),
        ({"thaw": ["0"]}, r"thaw=\['0'\]: epoch -> what, thaw=\{2: \"layer4.\*\*\"\}"),
        ({"thaw": {"1": "0"}}, r"thaw=\{'1': '0'\}: epoch -> what"),
    ],
)
def test_a_run_that_cannot_work(options, message):
    with pytest.raises(TrainingError, match=message):
        make().fit(BATCHES, **options)


@pytest.mark.parametrize(
    ("mode", "best", "message"),
    [
        ("min", "val_accuracy", r'"min"\) gets val_accuracy, which is better when higher: .*mode="max"'),
        ("max", "val_loss", r'"max"\) gets val_loss, which is better when lower: .*mode="min"'),
        ("max", "min:val_accuracy", r'"max"\) gets val_accuracy, which is better when lower'),
    ],
)
def test_a_plateau_that_looks_the_wrong_way(mode, best, message):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plateau, metrics = ReduceLROnPlateau(optimizer, mode), {"accuracy": lambda o, t: o.argmax(1) == t}
    trainer = make(model=model, optimizer=optimizer, scheduler=plateau, metrics=metrics, best=best)
    with pytest.raises(TrainingError, match=message):
        trainer.fit(BATCHES, BATCHES)
    plateau.mode = {"min": "max", "max": "min"}[mode]
    trainer.fit(BATCHES, BATCHES)


def test_one_metric_needs_no_list():
    assert list(named_metrics(nn.functional.l1_loss)) == ["l1_loss"]


def test_what_will_be_thawed_is_looked_at_before_the_first_step():
    trainer = make()
    with pytest.raises(NoMatchError, match='nothing at "body"'):
        trainer.fit(BATCHES, epochs=3, thaw={2: "body"})
    assert trainer.step == 0
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    freeze(model, "0")
    trainer = make(model=model, optimizer=torch.optim.SGD(model[1].parameters(), lr=0.1))
    with pytest.warns(ModsurgWarning, match=r"0.weight, 0.bias are in no optimizer .*: make it of model.parameters"):
        trainer.fit(BATCHES, epochs=2, thaw={1: "0"})
    freeze(model, "0")
    before = model[0].weight.detach().clone()
    trainer = make(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    trainer.fit(BATCHES, epochs=1, thaw={1: "0"})
    assert torch.equal(model[0].weight, before)
    freeze(model, "0")
    trainer.fit(BATCHES, epochs=2, thaw={1: "0"})
    assert not torch.equal(model[0].weight, before)
    freeze(model, "**")
    trainer.fit(BATCHES, epochs=1, thaw={0: "**.bias"})
    assert [p.requires_grad for p in model.parameters()] == [False, True, False, True]


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="checkpoint_dir can't be made: .*File exists"):
        make(checkpoint_dir=tmp_path / "file").fit(BATCHES)


class Hook:
    """Not a function."""


@pytest.mark.parametrize("name", ["on_step", "on_epoch"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("x", "is a str, not a function. Try: {}=lambda trainer: print"),
        ([print, Hook()], "is a Hook, not a function"),
        (Hook, "is the class Hook, not made yet, not a function"),
        (lambda trainer, epoch: None, r"is called with the trainer alone, and <lambda> takes \(trainer, epoch\)"),
        ([lambda: None], r"is called with the trainer alone, and <lambda> takes \(\)"),
    ],
)
def test_what_cannot_be_called_is_seen_before_the_first_step(name, given, message):
    trainer = make()
    with pytest.raises(TrainingError, match=f"{name} {message.format(name)}"):
        trainer.fit(BATCHES, **{name: given})
    assert trainer.step == 0


def test_several_functions_are_called_in_order():
    seen = []
    functions = [lambda trainer, n=n: seen.append((n, trainer.step, trainer.epoch)) for n in (1, 2)]
    make().fit(BATCHES, on_step=functions, on_epoch=tuple(functions))
    assert seen == [(1, 1, 0), (2, 1, 0), (1, 1, 1), (2, 1, 1)]


X, Y = torch.randn(8, 3), torch.tensor([0, 1] * 4)


@pytest.mark.parametrize(
    "data",
    [X, (X, Y), (X, X), [X, Y], X.numpy(), (X.numpy(), Y.numpy()), [X.numpy(), Y.numpy()]],
    ids=["tensor", "pair", "equal pair", "list", "array", "arrays", "list of arrays"],
)
def test_data_are_not_a_loader(data):
    fix = r"Try: DataLoader\(TensorDataset\(x, y\), batch_size=32\)"
    for train, val in ((data, None), (BATCHES, data)):
        trainer = make()
        with pytest.raises(BatchError, match=rf"{'val' if val is data else 'train'}_loader is a .*{fix}"):
            trainer.fit(train, val)
        assert trainer.step == 0
    with pytest.raises(BatchError, match=fix):
        make().evaluate(data)
    make().fit(DataLoader(TensorDataset(X, Y), batch_size=32))


def test_a_table_or_a_text_is_not_a_loader():
    for data in ({"x": X, "y": Y}, "train"):
        with pytest.raises(BatchError, match=f"train_loader is a {type(data).__name__}, which gives its parts"):
            make().fit(data)
    make(model=nn.Linear(3, 3), loss=nn.MSELoss()).fit(list(X.split(4)))


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(reduction="sum"),
        nn.BCEWithLogitsLoss(reduction="sum"),
        partial(nn.functional.cross_entropy, reduction="sum"),
    ],
)
def test_a_loss_that_adds_up(loss):
    with pytest.raises(TrainingError, match=r'adds up its batch \(reduction="sum"\), .* Try: reduction="mean"'):
        make(loss=loss)


def schedule(kind, model, lr=0.1):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return optimizer, kind(optimizer)


@pytest.mark.parametrize(
    "kind",
    [
        lambda optimizer: LambdaLR(optimizer, lambda step: min(1.0, step / 4)),
        lambda optimizer: SequentialLR(
            optimizer, [LambdaLR(optimizer, lambda step: step / 4), StepLR(optimizer, 9)], [4]
        ),
    ],
)
@pytest.mark.parametrize("given", [lambda s: s, lambda s: {"epoch": s}], ids=["bare", "epoch"])
def test_a_schedule_whose_first_epoch_would_train_nothing(kind, given):
    model = nn.Linear(3, 2)
    optimizer, scheduler = schedule(kind, model)
    trainer = make(model=model, optimizer=optimizer, scheduler=given(scheduler))
    with pytest.raises(TrainingError, match=r'learning rate of 0. Try: scheduler=\{"step": scheduler\}, if it counts'):
        trainer.fit(BATCHES * 4)
    assert trainer.step == 0
    make(model=model, optimizer=optimizer, scheduler={"step": scheduler}).fit(BATCHES * 4)
    assert optimizer.param_groups[0]["lr"] > 0


def test_a_rate_of_zero_that_the_user_set_and_one_of_several_groups_are_left_alone():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    make(model=model, optimizer=optimizer, scheduler=StepLR(optimizer, 1)).fit(BATCHES)
    groups = [{"params": [model.weight], "lr": 0.1}, {"params": [model.bias], "lr": 0.1}]
    optimizer = torch.optim.SGD(groups)
    scheduler = LambdaLR(optimizer, [lambda epoch: 1.0, lambda epoch: float(epoch > 0)])
    make(model=model, optimizer=optimizer, scheduler=scheduler).fit(BATCHES, epochs=2)


def cosine(current, *, num_training_steps):
    return 1 - current / num_training_steps / 2


@pytest.mark.parametrize(
    "kind",
    [
        lambda optimizer: CosineAnnealingLR(optimizer, T_max=12),
        lambda optimizer: LinearLR(optimizer, total_iters=12),
        lambda optimizer: LambdaLR(optimizer, partial(cosine, num_training_steps=12)),
    ],
)
def test_a_schedule_of_epochs_that_is_as_long_as_the_run_has_steps(kind):
    model = nn.Linear(3, 2)
    for epochs, given in ((3, lambda s: {"step": s}), (12, lambda s: s)):
        optimizer, scheduler = schedule(kind, model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            make(model=model, optimizer=optimizer, scheduler=given(scheduler)).fit(BATCHES * 4, epochs=epochs)
    optimizer, scheduler = schedule(kind, model)
    with pytest.warns(ModsurgWarning, match=r'once an epoch, 3 times, and has \w+=12, .* Try: scheduler=\{"step": sch'):
        make(model=model, optimizer=optimizer, scheduler=scheduler).fit(BATCHES * 4, epochs=3)


def test_a_one_cycle_schedule_of_epochs_and_one_behind_a_loader_without_length():
    model = nn.Linear(3, 2)
    optimizer, scheduler = schedule(lambda optimizer: OneCycleLR(optimizer, 0.1, total_steps=3), model)
    trainer = make(model=model, optimizer=optimizer, scheduler={"epoch": scheduler})
    with pytest.raises(TrainingError, match=r"OneCycleLR has 3 steps, 0 of them done, and 4 are to come: .*=4"):
        trainer.fit(BATCHES, epochs=4)
    assert trainer.step == 0
    trainer.fit(BATCHES, epochs=3)

    class NoLength:
        def __iter__(self):
            return iter(BATCHES * 9)

    optimizer, scheduler = schedule(lambda optimizer: OneCycleLR(optimizer, 0.1, total_steps=3), model)
    with pytest.raises(TrainingError, match=r"batch 4 .*OneCycleLR can't go on: .*total_steps=...\) with more than 4"):
        make(model=model, optimizer=optimizer, scheduler=scheduler).fit(NoLength())


def test_a_one_cycle_schedule_that_is_too_short_for_the_rest_of_a_run(tmp_path):
    def start(total):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer, scheduler = schedule(lambda optimizer: OneCycleLR(optimizer, 0.1, total_steps=total), model)
        return make(model=model, optimizer=optimizer, scheduler=scheduler, checkpoint_dir=tmp_path)

    start(8).fit(BATCHES * 4, epochs=2, on_step=lambda t: t.stop() if t.step == 2 else None)
    with pytest.raises(TrainingError, match="has 8 steps, 2 of them done, and 10 are to come"):
        start(8).fit(BATCHES * 4, epochs=3, resume=True)
    assert start(8).fit(BATCHES * 4, epochs=2, resume=True)[-1]["step"] == 8
