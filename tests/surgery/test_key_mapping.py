import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from modsurg import edit, insert_after, remove, rename, replace, wrap
from modsurg.errors import OptimizerError


def test_inserted_layers_shift_the_numbers_both_ways():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    old = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    report = insert_after(model, nn.Linear, lambda _: nn.LayerNorm(2))
    carried = report.remap(old)
    assert list(carried) == ["0.weight", "0.bias", "2.weight", "2.bias", "4.0.weight", "4.0.bias"]
    missing, unexpected = model.load_state_dict(carried, strict=False)
    assert unexpected == []
    assert all(key.split(".")[-2] in ("1", "3") for key in missing)
    back = report.remap(model.state_dict(), inverse=True)
    assert list(back) == list(old)
    assert all(torch.equal(back[key], old[key]) for key in old)


def test_a_wrapped_module_is_found_inside_its_wrapper():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    old = model.state_dict()
    with edit(model) as e:
        e.wrap("0", lambda old: nn.ModuleDict({"base": old}))
        e.wrap("0", lambda old: nn.Sequential(nn.ReLU(), old))
        e.rename("0", "first")
    assert list(e.report.remap(old)) == ["first.1.base.weight", "first.1.base.bias"]


def test_what_is_gone_is_left_out_and_the_root_stays():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))
            self.blocks = nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])

    model = Net()
    old = model.state_dict()
    report = remove(model, "blocks.1")
    carried = report.remap(old)
    assert list(carried) == ["scale", "blocks.0.weight", "blocks.0.bias", "blocks.1.weight", "blocks.1.bias"]
    assert carried["blocks.1.weight"] is old["blocks.2.weight"]
    model.load_state_dict(carried)


def test_a_later_edit_does_not_change_the_answer():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    old = model.state_dict()
    first = insert_after(model, "0", nn.ReLU())
    second = insert_after(model, "0", nn.ReLU())
    assert list(first.remap(old)) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert list(second.remap(first.remap(old))) == ["0.weight", "0.bias", "3.weight", "3.bias"]


def test_a_module_that_stands_twice_keeps_both_names():
    shared = nn.Linear(2, 2)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    old = model.state_dict()
    report = insert_after(model, "1", nn.Tanh())
    assert list(report.remap(old)) == ["0.weight", "0.bias", "3.weight", "3.bias"]


def test_other_keys_pass():
    model = nn.Sequential(nn.Linear(2, 2))
    report = rename(model, "0", "first")
    assert report.remap({"0.weight": 1, "epoch": 3, "meta.step": 5}) == {"first.weight": 1, "epoch": 3, "meta.step": 5}


def test_the_state_of_an_optimizer_is_carried_over():
    def trained(model):
        optimizer = torch.optim.Adam(model.parameters(), 0.1)
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        return optimizer

    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = trained(model)
    old = copy.deepcopy(optimizer.state_dict())
    report = insert_after(model, "0", lambda _: nn.LayerNorm(2), optimizer=optimizer)
    carried = report.remap(old)
    optimizer.load_state_dict(carried)
    last = optimizer.state[model[2].weight]["exp_avg"]
    assert torch.equal(last, old["state"][2]["exp_avg"])
    back = report.remap(optimizer.state_dict(), inverse=True)
    assert back["param_groups"][0]["params"] == [0, 1, 2, 3]
    assert torch.equal(back["state"][2]["exp_avg"], old["state"][2]["exp_avg"])


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_random_edits_carry_every_weight(data):
    model = nn.Sequential(*(nn.Sequential(*(nn.Linear(2, 2) for _ in range(2))) for _ in range(3)))
    old = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    kept = {id(parameter) for parameter in model.parameters()}
    with edit(model) as e:
        for _ in range(data.draw(st.integers(1, 4))):
            paths = [path for path, _ in model.named_modules() if path]
            path = data.draw(st.sampled_from(paths))
            verb = data.draw(st.sampled_from(["insert", "wrap", "remove", "replace"]))
            if verb == "insert":
                e.insert_after(path, nn.Linear(3, 3))
            elif verb == "wrap":
                e.wrap(path, nn.Sequential)
            elif verb == "remove" and len(paths) > 3:
                e.remove(path)
            else:
                e.replace(path, lambda old: nn.Linear(3, 3))
    carried = e.report.remap(old)
    now = {key for key, parameter in model.named_parameters() if id(parameter) in kept}
    assert set(carried) == now
    own = dict(model.named_parameters())
    assert all(torch.equal(own[key], value) for key, value in carried.items())


def test_replaced_modules_have_no_old_weights():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    old = model.state_dict()
    assert list(replace(model, "1", nn.Linear(2, 3)).remap(old)) == ["0.weight", "0.bias"]
    assert list(wrap(model, "0", nn.Sequential).remap(old))[:2] == ["0.0.weight", "0.0.bias"]


def stepped(model, *optimizers):
    model(torch.ones(3, 2)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    return [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers]


def momenta(state, kind="exp_avg"):
    return {number: tuple(entry[kind].shape) for number, entry in state["state"].items()}


def test_the_state_of_each_of_several_optimizers_is_found_by_what_it_held():
    model = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 3), nn.Linear(3, 5))
    one, two = torch.optim.Adam(model[0].parameters()), torch.optim.Adam(model[2].parameters())
    old = stepped(model, one, two)
    with edit(model, optimizer=[one, two]) as e:
        e.insert_before("0", nn.Linear(2, 2))
        e.resize("3", out_features=6)
    assert momenta(e.report.remap(old[0])) == {2: (4, 2), 3: (4,)}
    assert momenta(e.report.remap(old[1])) == {0: (5, 3), 1: (5,)}
    one.load_state_dict(e.report.remap(old[0]))
    assert torch.equal(one.state[model[1].weight]["exp_avg"], old[0]["state"][0]["exp_avg"])
    assert momenta(e.report.remap(two.state_dict(), inverse=True)) == {0: (6, 3), 1: (6,)}


def test_optimizers_of_two_kinds_are_told_apart_before_their_first_step():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    one, two = torch.optim.Adam(model[0].parameters()), torch.optim.SGD(model[1].parameters(), 0.1)
    states = [copy.deepcopy(one.state_dict()), copy.deepcopy(two.state_dict())]
    report = insert_after(model, "1", nn.Linear(2, 2), optimizer=[one, two])
    assert report.remap(states[0])["param_groups"][0]["params"] == [0, 1]
    assert report.remap(states[1])["param_groups"][0]["params"] == [0, 1, 2, 3]


def test_the_state_of_an_optimizer_that_cannot_be_told_is_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    one, two = (torch.optim.Adam(layer.parameters()) for layer in model)
    old = stepped(model, one, two)
    report = insert_after(model, "1", nn.Linear(2, 2), optimizer=[one, two])
    with pytest.raises(OptimizerError, match="can't tell whether this is the state of Adam or Adam: both had parame"):
        report.remap(old[0])
    other = torch.optim.Adam(nn.Linear(7, 2).parameters())
    with pytest.raises(OptimizerError, match="this is not the state of Adam, Adam from before the edit"):
        report.remap(torch.optim.Adam(model.parameters()).state_dict())
    with pytest.raises(OptimizerError, match="this edit had no optimizer, so the state of one can't be remapped"):
        replace(model, "0", nn.Linear(2, 2)).remap(other.state_dict())


def test_optimizers_with_names_are_told_apart_as_the_error_says():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    named = [[(f"{i}.{name}", p) for name, p in layer.named_parameters()] for i, layer in enumerate(model)]
    one, two = (torch.optim.Adam(each) for each in named)
    old = stepped(model, one, two)
    report = insert_after(model, "0", nn.Linear(2, 2), optimizer=[one, two])
    carried = report.remap(old[1])
    assert carried["param_groups"][0]["param_names"] == two.param_groups[0]["param_names"] == ["2.weight", "2.bias"]
    assert report.remap(old[0])["param_groups"][0]["param_names"] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert report.remap(carried, inverse=True)["param_groups"] == old[1]["param_groups"]


def test_the_versions_of_modules_are_kept():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Sequential(nn.BatchNorm1d(2)))
    old = model.state_dict()
    report = insert_after(model, "0", nn.Linear(2, 2))
    new = report.remap(old)
    assert type(new) is type(old)
    assert {path: entry["version"] for path, entry in new._metadata.items()} == {"": 1, "0": 2, "2": 1, "2.0": 2}
    back = report.remap(new, inverse=True)
    assert back._metadata == old._metadata
    assert list(back) == list(old)
    gone = remove(model, "0").remap(new)
    assert set(gone._metadata) == {"", "1", "1.0"}
    assert not hasattr(report.remap(dict(old)), "_metadata")


class Versioned(nn.Module):
    _version = 2

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.migrated = 0

    def _load_from_state_dict(self, state, prefix, metadata, *rest):
        self.migrated += metadata.get("version", 0) < 2
        super()._load_from_state_dict(state, prefix, metadata, *rest)


def test_a_module_is_not_migrated_twice():
    model = nn.Sequential(Versioned(), nn.ReLU())
    old = model.state_dict()
    model.load_state_dict(rename(model, "0", "first").remap(old))
    assert model.first.migrated == 0
