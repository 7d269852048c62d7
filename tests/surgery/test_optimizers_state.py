import copy
import re

import pytest
import torch
from optimizing import OPTIMIZERS, grouped, moving, net, replacing, resizing, step, undo
from torch import nn

import modsurg


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resized_state_keeps_what_overlaps(name):
    model = net()
    optimizer = OPTIMIZERS[name](model.parameters())
    step(model, optimizer)
    step(model, optimizer)
    weight = model[3].weight
    before = dict(optimizer.state.get(weight, {}))
    (done,) = moving(model, lambda m: None, [optimizer], changes=resizing(model, "3", out_features=5))
    for key, value in optimizer.state.get(weight, {}).items():
        if torch.is_tensor(value) and value.ndim:
            assert value.shape in ((5, 4), (5, 1), (1, 4))
            smaller = tuple(slice(size) for size in before[key].shape)
            assert torch.equal(value[smaller], before[key])
        else:
            assert value is before[key]
    assert bool(done.notes) == (name == "LBFGS")
    old = weight.detach().clone()
    step(model, optimizer)
    step(model, optimizer)
    assert (weight != old).all()
    assert torch.isfinite(weight).all()


def test_what_new_places_begin_with():
    def begins(optimizer, key):
        model = net()
        optimizer = optimizer(model.parameters())
        step(model, optimizer)
        moving(model, lambda m: None, [optimizer], changes=resizing(model, "3", out_features=3))
        return optimizer.state[model[3].weight][key][2:], model[3].weight[2:]

    assert (begins(lambda p: torch.optim.Adam(p), "exp_avg_sq")[0] == 0).all()
    assert (begins(lambda p: torch.optim.Rprop(p, lr=0.25), "step_size")[0] == 0.25).all()
    assert (begins(lambda p: torch.optim.Adagrad(p, initial_accumulator_value=0.5), "sum")[0] == 0.5).all()
    assert torch.equal(*begins(lambda p: torch.optim.ASGD(p, t0=0), "ax"))


@pytest.mark.parametrize(
    "odd, what", [(torch.zeros(7), r"odd is \(7,\)"), ([torch.zeros(2, 2)], "odd is a list"), ({}, "odd is a dict")]
)
def test_state_that_is_not_understood_begins_anew(odd, what):
    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    step(model, optimizer)
    optimizer.state[model[3].weight]["odd"] = odd
    changes, journals = resizing(model, "3", out_features=3), []
    entry = optimizer.state[model[3].weight]
    (done,) = moving(model, lambda m: None, [optimizer], journals, changes)
    assert re.fullmatch(f"3.weight: {what}, which can't be resized, so its state was reset", *done.notes)
    assert model[3].weight not in optimizer.state
    undo(model, journals)
    assert optimizer.state[model[3].weight] is entry


def test_factored_state_of_other_libraries():
    model = nn.Sequential(nn.Linear(3, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = optimizer.state[model[0].weight]
    state.update(exp_avg_sq_row=torch.ones(3), exp_avg_sq_col=torch.ones(3), step=4, RMS=0.5)
    moving(model, lambda m: None, [optimizer], changes=resizing(model, "0", out_features=5, in_features=2))
    assert state["exp_avg_sq_row"].tolist() == [1, 1, 1, 0, 0]
    assert state["exp_avg_sq_col"].tolist() == [1, 1]
    assert state["step"] == 4


def test_lbfgs_forgets_directions_through_frozen_weights():
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    step(model, optimizer)
    modsurg.freeze(model, "0", optimizer=optimizer)
    frozen, head = model[0].weight.clone(), model[3].weight.clone()
    for _ in range(3):
        step(model, optimizer)
    assert torch.equal(model[0].weight, frozen)
    assert not torch.equal(model[3].weight, head)


def test_undo_after_training_keeps_what_was_learned():
    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    journals, old = [], model[3]
    moving(model, replacing("3", nn.Linear(4, 7)), [optimizer], journals)
    step(model, optimizer)
    model[3] = old
    undo(model, journals)
    assert set(optimizer.state) == set(model[:3].parameters())
    assert grouped(optimizer, model) == [[name for name, _ in model.named_parameters()]]
    step(model, optimizer)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resized_twice_in_one_edit(name):
    model = net()
    optimizer = OPTIMIZERS[name](model.parameters())
    step(model, optimizer)
    changes = [change for size in (1, 3) for change in resizing(model, "3", out_features=size)]
    moving(model, lambda m: None, [optimizer], changes=changes)
    step(model, optimizer)
    step(model, optimizer)
    assert torch.isfinite(model[3].weight).all()


@pytest.mark.parametrize("change", [lambda m: {"out_features": 7}, lambda m: None])
def test_undo_after_the_optimizer_was_loaded(change):
    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    step(model, optimizer)
    sizes = change(model)
    if sizes:
        report = modsurg.resize(model, "3", optimizer=optimizer, **sizes)
    else:
        report = modsurg.replace(model, "3", lambda old: nn.Linear(4, 7), optimizer=optimizer)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(model, optimizer)
    report.undo()
    assert {id(p) for p in optimizer.state} == {id(p) for p in model.parameters()}
    assert all(entry["exp_avg"].shape == p.shape for p, entry in optimizer.state.items())
    optimizer.load_state_dict(optimizer.state_dict())
    step(model, optimizer)
