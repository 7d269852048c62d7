import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler

from modsurg.errors import OptimizerError
from modsurg.surgery.journal import Journal
from modsurg.surgery.optimizers import Moved, follow, gather, named_parameters, sync
from modsurg.surgery.resizing import resize_modules
from modsurg.tree.walk import walk

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1),
    "SGD, fused": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, amsgrad=True),
    "Adam, foreach": lambda p: torch.optim.Adam(p, foreach=True),
    "Adam, tensor lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01), capturable=False),
    "AdamW": lambda p: torch.optim.AdamW(p),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, fused=True),
    "Adafactor": lambda p: torch.optim.Adafactor(p),
    "RMSprop": lambda p: torch.optim.RMSprop(p, centered=True, momentum=0.9),
    "Adagrad": lambda p: torch.optim.Adagrad(p, initial_accumulator_value=0.1),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "Adamax": lambda p: torch.optim.Adamax(p),
    "NAdam": lambda p: torch.optim.NAdam(p),
    "RAdam": lambda p: torch.optim.RAdam(p),
    "Rprop": lambda p: torch.optim.Rprop(p),
    "ASGD": lambda p: torch.optim.ASGD(p, t0=0),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2))


def step(model, *optimizers, inputs=3):
    def closure():
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = model(torch.randn(5, inputs, generator=torch.Generator().manual_seed(1))).square().sum()
        loss.backward()
        return loss

    for optimizer in optimizers:
        optimizer.step(closure)


def moving(model, change, optimizers, journal=None, **facts):
    """Make a change by hand and let the optimizers follow it."""
    before = named_parameters(model)
    replaced = change(model)
    pairs = replaced if isinstance(replaced, list) else []
    moved = Moved(before, named_parameters(model), replaced=pairs, **facts)
    return follow(optimizers, moved, journal or Journal())


def replacing(path, new):
    def change(model):
        parent, _, name = path.rpartition(".")
        owner = model.get_submodule(parent)
        old = getattr(owner, name)
        setattr(owner, name, new)
        return [(old, new, path)]

    return change


def grouped(optimizer, model):
    names = {id(p): name for name, p in model.named_parameters()}
    return [[names.get(id(p), "?") for p in group["params"]] for group in optimizer.param_groups]


def state_of(optimizer):
    return {
        id(p): [
            (key, value.clone() if torch.is_tensor(value) else copy.deepcopy(value)) for key, value in entry.items()
        ]
        for p, entry in optimizer.state.items()
    }


def equal(a, b):
    if torch.is_tensor(a):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    return a == b


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
        assert str(done) == f"{type(optimizer).__name__}: 2 parameters left; 3.weight, 3.bias entered group 0"
    else:
        assert "the history over all parameters no longer fits, so it begins anew" in str(done)
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
    step(model, optimizer)
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
    journal = Journal()
    reports = resize_modules(walk(model), [("0", model[0])], {"in_features": 5, "out_features": 4}, journal)
    moving(model, replacing("3", nn.Linear(4, 7)), [optimizer], journal, resized=reports)
    journal.rollback()
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


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resized_state_keeps_what_overlaps(name):
    model = net()
    optimizer = OPTIMIZERS[name](model.parameters())
    step(model, optimizer)
    step(model, optimizer)
    weight = model[3].weight
    before = dict(optimizer.state.get(weight, {}))
    named = named_parameters(model)
    reports = resize_modules(walk(model), [("3", model[3])], {"out_features": 5}, Journal())
    (done,) = follow([optimizer], Moved(named, named, resized=reports), Journal())
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
        named = named_parameters(model)
        reports = resize_modules(walk(model), [("3", model[3])], {"out_features": 3}, Journal())
        follow([optimizer], Moved(named, named, resized=reports), Journal())
        return optimizer.state[model[3].weight][key][2:], model[3].weight[2:]

    assert (begins(lambda p: torch.optim.Adam(p), "exp_avg_sq")[0] == 0).all()
    assert (begins(lambda p: torch.optim.Rprop(p, lr=0.25), "step_size")[0] == 0.25).all()
    assert (begins(lambda p: torch.optim.Adagrad(p, initial_accumulator_value=0.5), "sum")[0] == 0.5).all()
    assert torch.equal(*begins(lambda p: torch.optim.ASGD(p, t0=0), "ax"))


def test_state_that_is_not_understood_begins_anew():
    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    step(model, optimizer)
    optimizer.state[model[3].weight]["blocks"] = torch.zeros(7)
    named = named_parameters(model)
    reports = resize_modules(walk(model), [("3", model[3])], {"out_features": 3}, Journal())
    journal = Journal()
    entry = optimizer.state[model[3].weight]
    (done,) = follow([optimizer], Moved(named, named, resized=reports), journal)
    assert done.notes == ("3.weight: blocks is (7,), which is not understood, so its state begins anew",)
    assert model[3].weight not in optimizer.state
    step(model, optimizer)
    journal.rollback()
    assert optimizer.state[model[3].weight] is entry


def test_factored_state_of_other_libraries():
    model = nn.Sequential(nn.Linear(3, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = optimizer.state[model[0].weight]
    state.update(exp_avg_sq_row=torch.ones(3), exp_avg_sq_col=torch.ones(3), step=4, RMS=0.5)
    named = named_parameters(model)
    reports = resize_modules(walk(model), [("0", model[0])], {"out_features": 5, "in_features": 2}, Journal())
    follow([optimizer], Moved(named, named, resized=reports), Journal())
    assert state["exp_avg_sq_row"].tolist() == [1, 1, 1, 0, 0]
    assert state["exp_avg_sq_col"].tolist() == [1, 1]
    assert state["step"] == 4


def split(model, **options):
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    return torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], **options)


def test_weights_and_biases_go_to_their_own_groups():
    model = net()
    optimizer = split(model)
    moving(model, replacing("3", nn.Linear(4, 7)), [optimizer])
    assert grouped(optimizer, model) == [["0.weight", "3.weight"], ["0.bias", "1.weight", "1.bias", "3.bias"]]
    moving(model, lambda m: m.append(nn.Linear(7, 7)), [optimizer])
    assert grouped(optimizer, model)[0][-1] == "4.weight"
    assert grouped(optimizer, model)[1][-1] == "4.bias"
    moving(model, lambda m: m.insert(1, nn.BatchNorm1d(4)), [optimizer])
    assert grouped(optimizer, model)[1][:3] == ["0.bias", "1.weight", "1.bias"]


class Lora(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.zeros(2, base.in_features))
        self.b = nn.Parameter(torch.zeros(base.out_features, 2))
        self.scale = nn.Parameter(torch.ones(1))


def test_adapters_enter_the_group_of_what_they_wrap():
    model = net()
    optimizer = torch.optim.AdamW(
        [
            {"params": [model[0].weight]},
            {"params": [model[3].weight], "lr": 0.1},
            {"params": [p for p in model.parameters() if p.ndim < 2], "lr": 0.2},
        ]
    )
    for path in ("0", "3"):
        moving(model, replacing(path, Lora(model[int(path)])), [optimizer])
    assert grouped(optimizer, model) == [
        ["0.a", "0.b", "0.base.weight"],
        ["3.a", "3.b", "3.base.weight"],
        ["0.scale", "0.base.bias", "1.weight", "1.bias", "3.scale", "3.base.bias"],
    ]


def test_a_chain_of_replacements_leads_back_to_the_first():
    model = net()
    optimizer = torch.optim.SGD(
        [{"params": model[:3].parameters()}, {"params": model[3].parameters(), "lr": 1.0}], lr=0.1
    )
    first, second, third = model[3], nn.Linear(4, 3), nn.Linear(4, 5)

    def change(m):
        m[3] = third
        return [(first, second, "3"), (second, third, "3")]

    moving(model, change, [optimizer])
    assert grouped(optimizer, model)[1] == ["3.weight", "3.bias"]
    assert len(optimizer.param_groups[0]["params"]) == 4


def test_replaced_under_another_number():
    model = net()
    optimizer = torch.optim.SGD(
        [{"params": model[:3].parameters()}, {"params": model[3].parameters(), "lr": 1.0}], lr=0.1
    )
    new = nn.Linear(4, 2)

    def change(m):
        old = m[3]
        m[3] = new
        m.insert(0, nn.Linear(3, 3))
        return [(old, new, "3")]

    moving(model, change, [optimizer])
    assert grouped(optimizer, model) == [
        ["0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias"],
        ["4.weight", "4.bias"],
    ]


def test_removed_and_added_at_the_same_name():
    model = net()
    optimizer = torch.optim.SGD(
        [{"params": model[:3].parameters()}, {"params": model[3].parameters(), "lr": 1.0}], lr=0.1
    )

    def change(m):
        m[3] = nn.Linear(4, 9)

    moving(model, change, [optimizer])
    assert grouped(optimizer, model)[1] == ["3.weight", "3.bias"]


def test_a_new_head_on_a_frozen_body():
    model = net().requires_grad_(False)
    optimizer = torch.optim.Adam([{"params": model[0].parameters()}, {"params": model[1].parameters()}])
    moving(model, replacing("3", nn.Linear(4, 2)), [optimizer])
    assert grouped(optimizer, model) == [["0.weight", "0.bias", "3.weight"], ["1.weight", "1.bias", "3.bias"]]
    body = [p.detach().clone() for p in model[:3].parameters()]
    step(model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(model[:3].parameters(), body, strict=True))


def test_frozen_newcomers_enter_only_for_what_they_replace():
    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    moving(model, lambda m: m.append(nn.Linear(2, 2).requires_grad_(False)), [optimizer])
    assert "4.weight" not in grouped(optimizer, model)[0]
    moving(model, replacing("3", nn.Linear(4, 2).requires_grad_(False)), [optimizer])
    assert grouped(optimizer, model)[0][-2:] == ["3.weight", "3.bias"]


def test_thawed_parameters_enter():
    model = net()
    optimizer = torch.optim.Adam(model[3].parameters())
    moving(model, lambda m: None, [optimizer], thawed={id(p) for p in model[0].parameters()})
    assert grouped(optimizer, model) == [["0.weight", "0.bias", "3.weight", "3.bias"]]


def test_several_optimizers():
    model = net()
    body, head = torch.optim.SGD(model[:3].parameters(), lr=0.1), torch.optim.Adam(model[3].parameters())
    moving(model, replacing("3", nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))), [body, head])
    assert grouped(head, model) == [["3.0.weight", "3.0.bias", "3.1.weight", "3.1.bias"]]
    moving(model, replacing("0", nn.Linear(3, 4)), [body, head])
    assert grouped(body, model) == [["0.weight", "0.bias", "1.weight", "1.bias"]]
    step(model, body, head)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_gets_matrices_only():
    model = net()
    muon = torch.optim.Muon([p for p in model.parameters() if p.ndim == 2])
    rest = torch.optim.AdamW([p for p in model.parameters() if p.ndim != 2])
    moving(model, replacing("3", nn.Linear(4, 5)), [muon, rest])
    assert grouped(muon, model) == [["0.weight", "3.weight"]]
    moving(model, lambda m: m.append(nn.Conv1d(2, 2, 1)), [muon, rest])
    assert grouped(rest, model)[0][-2:] == ["4.weight", "4.bias"]
    with pytest.raises(
        OptimizerError, match=r"Muon takes matrices only, and 5.weight is \(2, 2, 1\); give the optimizer"
    ):
        moving(model, lambda m: m.append(nn.Conv1d(2, 2, 1)), [muon])


def test_sparse_adam_is_nobodys_neighbour():
    model = nn.ModuleDict({"table": nn.Embedding(5, 3, sparse=True), "out": nn.Linear(3, 2)})
    sparse, dense = torch.optim.SparseAdam(model["table"].parameters()), torch.optim.Adam(model["out"].parameters())
    moving(model, lambda m: m.update({"extra": nn.Linear(2, 2)}), [sparse, dense])
    moving(model, replacing("table", nn.Embedding(7, 3, sparse=True)), [sparse, dense])
    assert grouped(sparse, model) == [["table.weight"]]


def test_parameters_of_other_models_stay_where_they_are():
    model, other = net(), nn.Linear(2, 2)
    optimizer = torch.optim.SGD([*model[0].parameters(), *other.parameters(), *model[1:].parameters()], lr=0.1)
    moving(model, replacing("0", nn.Linear(3, 4)), [optimizer])
    assert grouped(optimizer, model) == [["0.weight", "0.bias", "?", "?", "1.weight", "1.bias", "3.weight", "3.bias"]]


def test_an_order_of_the_users_own_is_kept():
    model = net()
    optimizer = torch.optim.SGD(reversed(list(model.parameters())), lr=0.1)
    moving(model, replacing("0", nn.Linear(3, 4)), [optimizer])
    assert grouped(optimizer, model) == [["3.bias", "3.weight", "1.bias", "1.weight", "0.weight", "0.bias"]]


def test_names_in_the_groups_follow():
    model = net()
    named = ((f"net.{name}", p) for name, p in model.named_parameters())
    optimizer = torch.optim.SGD(named, lr=0.1)
    journal = Journal()

    def change(m):
        m.insert(0, nn.Linear(3, 3))

    moving(model, change, [optimizer], journal)
    names = optimizer.param_groups[0]["param_names"]
    assert names == [f"net.{name}" for name, _ in model.named_parameters()]
    moving(model, lambda m: m.pop(0), [optimizer])
    assert names == [f"net.{name}" for name, _ in model.named_parameters()]
    optimizer.load_state_dict(optimizer.state_dict())


def test_tied_parameters_enter_once_and_stay_while_one_name_is_left():
    model = nn.ModuleDict({"wte": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["wte"].weight
    optimizer = torch.optim.Adam(model.parameters())
    moving(model, lambda m: m.pop("head"), [optimizer])
    assert grouped(optimizer, model) == [["wte.weight"]]
    new = nn.Embedding(5, 3)

    def change(m):
        old, m["wte"] = m["wte"], new
        m["head"] = nn.Linear(3, 5, bias=False)
        m["head"].weight = new.weight
        return [(old, new, "wte")]

    moving(model, change, [optimizer])
    assert grouped(optimizer, model) == [["wte.weight"]]


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
        assert gather(None, scheduler) == [optimizer]
        assert gather(optimizer, [scheduler]) == [optimizer]
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
    assert gather(None, None) == []
    assert gather([one, two], lr_scheduler.StepLR(one, 1)) == [one, two]
    assert gather(None, [lr_scheduler.StepLR(one, 1), lr_scheduler.StepLR(two, 1)]) == [one, two]
    with pytest.raises(
        OptimizerError, match="the scheduler belongs to another SGD than the optimizer given; leave opt"
    ):
        gather(one, lr_scheduler.StepLR(two, 1))
    with pytest.raises(
        OptimizerError, match=r"scheduler= is a str without an optimizer; give one of torch\.optim\.lr_sch"
    ):
        gather(None, "cosine")
    with pytest.raises(OptimizerError, match="optimizer= is a Linear without the param_groups and state of a torch"):
        gather(nn.Linear(1, 1), None)


def test_wrapped_optimizers():
    class Around:
        def __init__(self, inner, groups):
            self.inner, self.param_groups, self.state = inner, groups, {}

    model = net()
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step(model, inner)
    old = model[3].weight
    around = Around(inner, inner.param_groups)
    assert gather(around, lr_scheduler.StepLR(inner, 1)) == [around]
    moving(model, replacing("3", nn.Linear(4, 7)), [around])
    assert old not in inner.state
    with pytest.raises(
        OptimizerError, match="Around holds a SGD with groups of its own, which would not follow; edit fi"
    ):
        gather(Around(inner, copy.copy(inner.param_groups)), None)


def test_the_optimizer_of_another_model_is_refused():
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    with pytest.raises(
        OptimizerError, match="no parameter of this model is in SGD; give the optimizer that trains this"
    ):
        moving(net(), lambda m: None, [optimizer])


def test_optimizers_that_cannot_be_told_apart():
    model = net()
    a, b = torch.optim.SGD(model[0].parameters(), lr=0.1), torch.optim.SGD(model[1:].parameters(), lr=0.1)
    moving(model, lambda m: m._modules.update({name: nn.Identity() for name in "013"}), [a, b])
    with pytest.raises(
        OptimizerError, match=r"can't tell which optimizer is for 0.weight, since none has a parameter yet"
    ):
        moving(model, lambda m: setattr(m, "0", nn.Linear(3, 4)), [a, b])


def test_lbfgs_forgets_directions_through_frozen_weights():
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    step(model, optimizer)
    for p in model[0].parameters():
        p.requires_grad_(False)
        p.grad = None
    moving(model, lambda m: None, [optimizer], restart=True)
    frozen, head = model[0].weight.clone(), model[3].weight.clone()
    for _ in range(3):
        step(model, optimizer)
    assert torch.equal(model[0].weight, frozen)
    assert not torch.equal(model[3].weight, head)


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


def test_undo_after_training_keeps_what_was_learned():
    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    journal, old = Journal(), model[3]
    moving(model, replacing("3", nn.Linear(4, 7)), [optimizer], journal)
    step(model, optimizer)
    journal.rollback()
    model[3] = old
    assert set(optimizer.state) == set(model[:3].parameters())
    assert grouped(optimizer, model) == [[name for name, _ in model.named_parameters()]]
    step(model, optimizer)


def test_sync():
    model = net()
    optimizer = split(model)
    step(model, optimizer)
    old = model[3].weight
    model[3] = nn.Linear(4, 7)
    model.append(nn.Linear(7, 7).requires_grad_(False))
    (done,) = sync(optimizer, model)
    assert str(done) == "AdamW: 2 parameters left; 3.weight entered group 0; 3.bias entered group 1"
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


def test_many_replacements():
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(800)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def change(m):
        pairs = [(old, nn.Linear(1, 1), str(i)) for i, old in enumerate(m)]
        m._modules.update((path, new) for _, new, path in pairs)
        return pairs

    moving(model, change, [optimizer])
    moving(model, lambda m: m.extend(nn.Linear(1, 1) for _ in range(800)), [optimizer])
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
        journals.append(Journal())
        children = list(model._modules.items())

        def back(children=children):
            model._modules.clear()
            model._modules.update(children)

        journals[-1].on_undo(back)
        moving(model, lambda m, k=kind, n=number: EDITS[k](m, n), optimizers, journals[-1])
        held = [id(p) for each in lists for p in each]
        assert sorted(held) == sorted(id(p) for p in model.parameters())
        assert all(set(o.state) <= set(model.parameters()) for o in optimizers)
    for journal in reversed(journals):
        journal.rollback()
    assert [list(map(id, each)) for each in lists] == before
    assert all(equal(state_of(o), states_of) for o, states_of in zip(optimizers, states, strict=True))
    assert math.isfinite(sum(p.sum().item() for p in model.parameters()))
