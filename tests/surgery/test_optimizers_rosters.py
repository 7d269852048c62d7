import torch
from optimizing import grouped, moving, net, replacing
from torch import nn

from modsurg.surgery.journal import Journal


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
