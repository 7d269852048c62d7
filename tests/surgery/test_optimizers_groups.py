import pytest
import torch
from optimizing import grouped, moving, net, replacing, split, step
from torch import nn

from modsurg import freeze, unfreeze, wrap
from modsurg.errors import OptimizerError


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
    freeze(model, "0")
    unfreeze(model, "0", optimizer=optimizer)
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
    wrap(model, "table", lambda old: nn.Sequential(old, nn.Linear(3, 3)), optimizer=[sparse, dense])
    assert grouped(sparse, model) == [["table.0.weight"]]
    model["out"](model["table"](torch.tensor([1, 2]))).sum().backward()
    sparse.step()


def test_optimizers_that_cannot_be_told_apart():
    model = net()
    a, b = torch.optim.SGD(model[0].parameters(), lr=0.1), torch.optim.SGD(model[1:].parameters(), lr=0.1)
    moving(model, lambda m: m._modules.update({name: nn.Identity() for name in "013"}), [a, b])
    with pytest.raises(
        OptimizerError, match=r"can't tell which optimizer is for 0.weight, since none has a parameter yet"
    ):
        moving(model, lambda m: setattr(m, "0", nn.Linear(3, 4)), [a, b])


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

    def change(m):
        m.insert(0, nn.Linear(3, 3))

    moving(model, change, [optimizer])
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
