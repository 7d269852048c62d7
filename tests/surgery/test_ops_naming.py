import pytest
import torch
from torch import nn

from modsurg import add, remove, rename
from modsurg.errors import ContainerError, EditError, ModsurgWarning, NameTakenError, NoMatchError


class Net(nn.Module):
    kind = "net"

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.second = nn.ReLU()
        self.register_buffer("scale", None)
        self.width = 2
        self.downsample = None
        self.register_module("empty", None)

    @property
    def size(self):
        raise RuntimeError("never asked")

    def forward(self, x):
        return self.second(self.first(x))


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("first", "a child"),
        ("scale", "a buffer"),
        ("width", "an attribute"),
        ("size", "a property"),
        ("kind", "a class attribute or method"),
        ("forward", "a class attribute or method"),
        ("training", "an attribute"),
    ],
)
def test_a_name_that_is_taken_is_refused(name, what):
    model = Net()
    before = dict(model.__dict__), list(model._modules)
    with pytest.raises(NameTakenError, match=f"Net already has {what} called '{name}'; nothing was changed"):
        add(model, name, nn.ReLU())
    assert (dict(model.__dict__), list(model._modules)) == before
    if name != "first":
        with pytest.raises(NameTakenError, match=f"already has {what}"):
            rename(model, "first", name)


def test_a_parameter_of_that_name_is_refused():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(NameTakenError, match=r'"0" \(Linear\) already has a parameter called \'bias\''):
        add(model, "0.bias", nn.ReLU())


@pytest.mark.parametrize("slot", ["downsample", "empty"])
def test_an_empty_slot_can_be_filled(slot):
    model = Net()
    child = nn.Identity()
    report = add(model, slot, child)
    assert getattr(model, slot) is child
    assert slot in dict(model.named_children())
    report.undo()
    assert getattr(model, slot) is None


def test_add_beside_a_sibling():
    model = Net()
    add(model, "middle", nn.Identity(), after="first")
    add(model, "start", nn.Identity(), before="first")
    assert [name for name, _ in model.named_children()] == ["start", "first", "middle", "second"]
    with pytest.raises(NoMatchError, match='no child "third" in Net; its children: start, first'):
        add(model, "x", nn.Identity(), before="third")
    with pytest.raises(EditError, match="before= or after=, not both"):
        add(model, "x", nn.Identity(), before="first", after="first")


def test_add_continues_the_numbers():
    model = nn.Sequential(nn.ReLU(), nn.ReLU())
    add(model, "2", nn.Linear(2, 2))
    with pytest.raises(ContainerError, match='numbered up to 2, so that the next child is "3", not "7"'):
        add(model, "7", nn.ReLU())
    with pytest.raises(EditError, match="use insert_before or insert_after"):
        add(model, "3", nn.ReLU(), before="0")
    with pytest.raises(ContainerError, match="a ModuleList, whose children are numbered"):
        add(nn.ModuleList([nn.ReLU()]), "head", nn.ReLU())


def test_the_parent_must_exist():
    with pytest.raises(NoMatchError, match='the parent must exist before "x" can be added: .* Nearest: "first"'):
        add(Net(), "frst.x", nn.ReLU())


@pytest.mark.parametrize("path", ["", "first.", 3])
def test_no_path(path):
    with pytest.raises(EditError, match="can't be the path of a child"):
        add(Net(), path, nn.ReLU())


def test_a_class_is_no_module():
    with pytest.raises(EditError, match=r"a class is called first: nn.ReLU\(\)"):
        add(Net(), "x", nn.ReLU)


def test_rename_keeps_the_order():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    rename(model, "1", "activation")
    assert list(model._modules) == ["0", "activation", "2"]


def test_rename_warns_where_the_code_speaks_of_the_name():
    model = Net()
    with pytest.warns(ModsurgWarning, match='"first": the code of Net references self.first'):
        rename(model, "first", "input")
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    with pytest.warns(ModsurgWarning, match=r'"0": the code of Sequential references self\.0'):
        rename(traced, "0", "input")


@pytest.mark.parametrize("kept", [{"first": "out"}, ["first", "second"], "first"])
def test_rename_warns_where_the_parent_lists_the_name(kept):
    model = nn.ModuleDict({"first": nn.ReLU(), "second": nn.ReLU()})
    model.wanted = kept
    with pytest.warns(ModsurgWarning, match='"first": ModuleDict has the name "first" in its wanted, .* under "input"'):
        rename(model, "first", "input")
    model.wanted = {"input"}
    with pytest.warns(ModsurgWarning, match='"input": ModuleDict has the name "input" in its wanted, .* any more'):
        remove(model, "input", delete=True)


def test_a_name_that_stays_changes_nothing():
    assert str(rename(Net(), "first", "first")) == "nothing changed"


@pytest.mark.parametrize("name", ["", "a.b", 3])
def test_names_that_are_none(name):
    with pytest.raises(EditError, match="needs a string without dots"):
        rename(nn.Sequential(nn.ReLU()), "0", name)


def test_rename_names_one_child():
    with pytest.raises(EditError, match="2 match; give one exact path"):
        rename(nn.Sequential(nn.ReLU(), nn.ReLU()), "*", "act")
