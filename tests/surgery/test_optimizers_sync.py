import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizing import OPTIMIZERS, equal, grouped, moving, net, replacing, resizing, split, state_of, step, undo
from torch import nn
from torch.optim import lr_scheduler

import modsurg
from modsurg.errors import OptimizerError
from modsurg.surgery.optimizers.sync import gather_optimizers, sync


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_new_head_trains_and_the_rest_goes_on(name):
    model = net()
    optimizer = OPTIMIZERS[name](model.parameters())
    step(model, optimizer)
    kept = {p: entry for p, entry in optimizer.state.items() if p in set(model[:3].parameters())}
    old, head = model[3], nn.Linear(4, 7)
    (done,) = moving(model, replacing("3", head), [optimizer])
    assert grouped(optimizer, model) == [[name for name, _ in model.named_parameters()]]
    assert not set(old.parameters()) & set(optimizer.state)
    if name != "LBFGS":
        assert all(optimizer.state[p] is entry for p, entry in kept.items())
        assert str(done) == f"{type(optimizer).__name__}: 2 parameters left it; 3.weight, 3.bias entered group 0"
    else:
        assert "the history over all parameters does not match the new ones, so it was reset" in str(done)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    step(model, optimizer)
    step(model, optimizer)
    assert not [key for key, p in model.named_parameters() if torch.equal(p, before[key])]
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_emptied_group_stays_and_steps(name):
    model = net()
    optimizer = OPTIMIZERS[name](model[3].parameters())
    step(model, optimizer)
    moving(model, lambda m: setattr(m, "3", nn.Identity()), [optimizer])
    assert [group["params"] for group in optimizer.param_groups] == [[]]
    try:
        step(model, optimizer)
    except IndexError:
        if name != "LBFGS":
            raise
        pytest.skip("LBFGS of this torch can't step without parameters")
    (done,) = moving(model, lambda m: setattr(m, "3", nn.Linear(4, 2)), [optimizer])
    assert dict(done.entered) == {"3.weight": 0, "3.bias": 0}
    step(model, optimizer)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rollback_is_exact(name):
    model = net()
    optimizer = OPTIMIZERS[name](model.parameters())
    step(model, optimizer)
    states, order = state_of(optimizer), list(optimizer.state)
    lists = [group["params"] for group in optimizer.param_groups]
    params = [list(each) for each in lists]
    attributes = dict(vars(optimizer))
    journals, old = [], model[3]
    changes = resizing(model, "0", in_features=5, out_features=4)
    moving(model, replacing("3", nn.Linear(4, 7)), [optimizer], journals, changes)
    model[3] = old
    undo(model, journals)
    assert [id(p) for p in optimizer.state] == [id(p) for p in order]
    assert equal(state_of(optimizer), states)
    for group, kept, values in zip(optimizer.param_groups, lists, params, strict=True):
        assert group["params"] is kept
        assert [id(p) for p in kept] == [id(p) for p in values]
    assert {key: value for key, value in vars(optimizer).items() if key != "state"}.keys() == attributes.keys() - {
        "state"
    }
    if name == "LBFGS":
        assert optimizer._numel_cache == attributes["_numel_cache"]
        assert optimizer._params is optimizer.param_groups[0]["params"]


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 8),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.05),
}


def test_no_scheduler_is_forgotten():
    assert set(lr_scheduler.__all__) - {"LRScheduler"} <= set(SCHEDULERS)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_scheduler_goes_on(name):
    rates = []
    for edited in (False, True):
        model = net()
        optimizer = torch.optim.SGD(
            [{"params": model[:3].parameters()}, {"params": model[3].parameters(), "lr": 0.5}], lr=0.1, momentum=0.9
        )
        scheduler = SCHEDULERS[name](optimizer)
        assert gather_optimizers(None, scheduler) == [optimizer]
        assert gather_optimizers(optimizer, [scheduler]) == [optimizer]
        seen = []
        for epoch in range(8):
            if edited and epoch == 3:
                moving(model, replacing("3", nn.Linear(4, 7)), [optimizer])
            step(model, optimizer)
            scheduler.step(*[1.0] if name == "ReduceLROnPlateau" else [])
            seen.append([(group["lr"], group["momentum"]) for group in optimizer.param_groups])
        rates.append(seen)
    assert rates[0] == rates[1]


def test_gathering():
    one, two = (torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1) for _ in range(2))
    assert gather_optimizers(None, None) == []
    assert gather_optimizers([one, two], lr_scheduler.StepLR(one, 1)) == [one, two]
    assert gather_optimizers(None, [lr_scheduler.StepLR(one, 1), lr_scheduler.StepLR(two, 1)]) == [one, two]
    with pytest.raises(
        OptimizerError, match="the scheduler belongs to another SGD than the optimizer given; leave opt"
    ):
        gather_optimizers(one, lr_scheduler.StepLR(two, 1))
    with pytest.raises(
        OptimizerError, match=r"scheduler= is a str without an optimizer; give one of torch\.optim\.lr_sch"
    ):
        gather_optimizers(None, "cosine")
    with pytest.raises(OptimizerError, match="optimizer= is a Linear without the param_groups and state of a torch"):
        gather_optimizers(nn.Linear(1, 1), None)


def test_wrapped_optimizers():
    class Around:
        def __init__(self, inner, groups):
            self.inner, self.param_groups, self.state = inner, groups, {}

    model = net()
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step(model, inner)
    old = model[3].weight
    around = Around(inner, inner.param_groups)
    assert gather_optimizers(around, lr_scheduler.StepLR(inner, 1)) == [around]
    moving(model, replacing("3", nn.Linear(4, 7)), [around])
    assert old not in inner.state
    with pytest.raises(
        OptimizerError, match="Around holds a SGD with groups of its own, which would not follow; edit fi"
    ):
        gather_optimizers(Around(inner, copy.copy(inner.param_groups)), None)


def test_the_optimizer_of_another_model_is_refused():
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    with pytest.raises(
        OptimizerError, match="no parameter of this model is in SGD; give the optimizer that trains this"
    ):
        moving(net(), lambda m: None, [optimizer])


def test_grad_scaler():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for _ in range(2):
        scaler.scale(model(torch.randn(2, 3)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        moving(model, replacing("3", nn.Linear(4, 7)), [optimizer])


def test_sync():
    model = net()
    optimizer = split(model)
    step(model, optimizer)
    old = model[3].weight
    model[3] = nn.Linear(4, 7)
    model.append(nn.Linear(7, 7).requires_grad_(False))
    (done,) = sync(optimizer, model)
    assert str(done) == "AdamW: 2 parameters left it; 3.weight entered group 0; 3.bias entered group 1"
    assert dict(done.entered) == {"3.weight": 0, "3.bias": 1}
    assert old not in optimizer.state
    step(model, optimizer)
    assert str(*sync(optimizer, model)) == "AdamW: nothing to do"
    assert sync(optimizer, torch.compile(model))[0].left == 0


def test_sync_knows_names():
    model = net()
    groups = [
        {"params": [(f"{i}.{n}", p) for i in (0, 1) for n, p in model[i].named_parameters()]},
        {"params": [(f"3.{n}", p) for n, p in model[3].named_parameters()], "lr": 1.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    model[3] = nn.Linear(4, 7)
    (done,) = sync(optimizer, model)
    assert dict(done.entered) == {"3.weight": 1, "3.bias": 1}
    assert optimizer.param_groups[1]["param_names"] == ["3.weight", "3.bias"]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_sync_changes_nothing_when_it_fails():
    model = net()
    muon = torch.optim.SGD(model.parameters(), lr=0.1)
    muon.__class__ = type("Muon", (torch.optim.Muon, torch.optim.SGD), {})
    model[0], model[3] = nn.Linear(3, 4), nn.Linear(4, 7)
    before = list(muon.param_groups[0]["params"])
    with pytest.raises(OptimizerError, match="Muon takes matrices only"):
        sync(muon, model)
    assert list(map(id, muon.param_groups[0]["params"])) == list(map(id, before))


def test_sync_of_several_models():
    models = nn.ModuleList([net(), net()])
    one, two = (torch.optim.SGD(model.parameters(), lr=0.1) for model in models)
    models[0][3], models[1][0] = nn.Linear(4, 7), nn.Linear(3, 4)
    assert [(dict(done.entered), done.left) for done in sync([one, two], models)] == [
        ({"0.3.weight": 0, "0.3.bias": 0}, 2),
        ({"1.0.weight": 0, "1.0.bias": 0}, 2),
    ]


def test_meta():
    with torch.device("meta"):
        model = net()
        optimizer = torch.optim.Adagrad(model.parameters())
        moving(model, replacing("3", nn.Linear(4, 7)), [optimizer])
    assert grouped(optimizer, model) == [[name for name, _ in model.named_parameters()]]


EDITS = {
    "replace": lambda m, i: m._modules.update({list(m._modules)[i % len(m)]: nn.Linear(3, 3)}),
    "append": lambda m, i: m.append(nn.Linear(3, 3)),
    "insert": lambda m, i: m.insert(i % (len(m) + 1), nn.BatchNorm1d(3)),
    "remove": lambda m, i: m.pop(i % len(m)) if len(m) > 1 else None,
    "tie": lambda m, i: m.append(m[i % len(m)]),
}


@given(st.lists(st.tuples(st.sampled_from(sorted(EDITS)), st.integers(0, 9)), max_size=8), st.booleans())
@settings(deadline=None, max_examples=30)
def test_any_sequence_of_edits(edits, two):
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(3)))
    optimizers = (
        [split(model[:2]), torch.optim.SGD(model[2].parameters(), lr=0.1, momentum=0.9)] if two else [split(model)]
    )
    step(model, *optimizers)
    lists = [group["params"] for o in optimizers for group in o.param_groups]
    before, journals = [list(map(id, each)) for each in lists], []
    states = [state_of(o) for o in optimizers]
    for kind, number in edits:
        journals.append((list(model._modules.items()), []))
        moving(model, lambda m, k=kind, n=number: EDITS[k](m, n), optimizers, journals[-1][1])
        held = [id(p) for each in lists for p in each]
        assert sorted(held) == sorted(id(p) for p in model.parameters())
        assert all(set(o.state) <= set(model.parameters()) for o in optimizers)
    for children, made in reversed(journals):
        model._modules.clear()
        model._modules.update(children)
        undo(model, made)
    assert [list(map(id, each)) for each in lists] == before
    assert all(equal(state_of(o), states_of) for o, states_of in zip(optimizers, states, strict=True))
    assert math.isfinite(sum(p.sum().item() for p in model.parameters()))


@pytest.mark.parametrize("name", ["SGD", "SGD, fused", "AdamW", "LBFGS"])
def test_what_was_learnt_after_an_edit_does_not_outlive_its_undo(name):
    for verb in (
        lambda model, optimizer: modsurg.resize(model, "3", out_features=5, optimizer=optimizer),
        lambda model, optimizer: modsurg.replace(model, "3", lambda old: nn.Linear(4, 5), optimizer=optimizer),
    ):
        model = net()
        optimizer = OPTIMIZERS[name](model.parameters())
        report = verb(model, optimizer)
        step(model, optimizer)
        report.undo()
        step(model, optimizer)
        assert model[3].weight.shape == (2, 4)


def test_fused_sgd_steps_what_is_thawed():
    model = net()
    modsurg.freeze(model, "0")
    optimizer = OPTIMIZERS["SGD, fused"](model.parameters())
    step(model, optimizer)
    before = model[0].weight.detach().clone()
    modsurg.unfreeze(model, "0", optimizer=optimizer)
    step(model, optimizer)
    assert not torch.equal(model[0].weight, before)


UNDONE = {
    "resize": lambda model, optimizer: modsurg.resize(model, "3", out_features=5, optimizer=optimizer),
    "remove": lambda model, optimizer: modsurg.remove(model, "1", optimizer=optimizer),
    "insert": lambda model, optimizer: modsurg.insert_after(model, "2", nn.Linear(4, 4), optimizer=optimizer),
    "freeze": lambda model, optimizer: modsurg.freeze(model, "0", optimizer=optimizer),
}


@pytest.mark.parametrize("verb", UNDONE)
@pytest.mark.parametrize("first", [True, False], ids=["before the first step", "after a step"])
def test_fused_sgd_goes_on_after_an_undo(verb, first):
    model = net()
    optimizer = torch.optim.SGD(
        [{"params": model[:2].parameters()}, {"params": model[2:].parameters()}], momentum=0.9, fused=True
    )
    if not first:
        step(model, optimizer)
    report = UNDONE[verb](model, optimizer)
    step(model, optimizer)
    learnt = {id(p): optimizer.state[p]["momentum_buffer"].clone() for p in optimizer.state}
    report.undo()
    for p, entry in optimizer.state.items():
        if id(p) in learnt and learnt[id(p)].shape == p.shape:
            assert torch.equal(entry["momentum_buffer"], learnt[id(p)])
    before = [p.detach().clone() for p in model.parameters()]
    step(model, optimizer)
    assert not any(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
