"""Models and optimizers, edits by hand, and what to look at afterwards."""

import copy

import torch
from torch import nn

from modsurg.surgery.changes import Change
from modsurg.surgery.journal import Journal
from modsurg.surgery.optimizers.groups import first_entries
from modsurg.surgery.optimizers.state import OptimizerJournal
from modsurg.surgery.optimizers.sync import follow_changes, named_parameters
from modsurg.surgery.resize.resize import resize_modules
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


def moving(model, change, optimizers, journals=None, changes=()):
    """Make a change by hand and let the optimizers follow it."""
    before = named_parameters(walk(model))
    replaced = change(model)
    pairs = replaced if isinstance(replaced, list) else []
    changes = [*changes, *(Change("replace", (path,), old=old, new=new) for old, new, path in pairs)]
    made = [OptimizerJournal(each) for each in optimizers]
    if journals is not None:
        journals += made
    return follow_changes(made, before, named_parameters(walk(model)), changes)


def resizing(model, path, **sizes):
    """Resize a layer by hand; returns the changes."""
    reports = resize_modules(walk(model), [(path, model.get_submodule(path))], sizes, Journal())
    return [Change("resize", (each.path,), old=each.module, new=each.module, detail=each) for each in reports]


def undo(model, journals):
    for journal in reversed(journals):
        journal.undo(first_entries(named_parameters(walk(model))))


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


def split(model, **options):
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    return torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], **options)
