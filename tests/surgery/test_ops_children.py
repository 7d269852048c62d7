import copy
import functools
import types
from collections import OrderedDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from modsurg import add, edit, insert_after, insert_before, remove, rename, replace
from modsurg.errors import ContainerError, EditError, ModsurgWarning, NoMatchError
from modsurg.surgery.ops import bytecode


def linears(count):
    return nn.Sequential(*(nn.Linear(2, 2) for _ in range(count)))


@given(count=st.integers(1, 6), data=st.data())
def test_insert_at_every_position_is_what_a_list_does(count, data):
    model = linears(count)
    place = data.draw(st.integers(-count, count - 1))
    children = list(model)
    new = nn.ReLU()
    if data.draw(st.booleans()):
        insert_before(model, str(place), new)
        children.insert(place % count, new)
    else:
        insert_after(model, str(place), new)
        children.insert(place % count + 1, new)
    assert list(model) == children
    assert list(model._modules) == [str(i) for i in range(count + 1)]


@given(count=st.integers(1, 6), data=st.data())
def test_remove_at_every_position_is_what_a_list_does(count, data):
    model = nn.ModuleList(linears(count))
    place = data.draw(st.integers(-count, count - 1))
    children = list(model)
    del children[place]
    remove(model, str(place))
    assert list(model) == children
    assert list(model._modules) == [str(i) for i in range(count - 1)]


def test_past_the_end_is_refused_and_says_what_there_is():
    model = linears(3)
    for place in ("3", "-4"):
        with pytest.raises(NoMatchError, match="it has 3 children, 0 to 2"):
            insert_after(model, place, nn.ReLU())
    assert len(model) == 3


def test_a_slice_keeps_its_first_number():
    model = linears(4)[2:]
    assert list(model._modules) == ["2", "3"]
    insert_before(model, "2", nn.ReLU())
    assert list(model._modules) == ["2", "3", "4"]
    insert_after(model, "4", nn.GELU())
    assert [type(child).__name__ for child in model] == ["ReLU", "Linear", "Linear", "GELU"]
    assert list(model._modules) == ["2", "3", "4", "5"]
    remove(model, "2")
    assert list(model._modules) == ["2", "3", "4"]


def test_numbers_with_gaps_move_only_where_they_must():
    model = nn.Sequential()
    for name in ("0", "2", "5"):
        model.add_module(name, nn.Linear(2, 2))
    insert_after(model, "0", nn.ReLU())
    assert list(model._modules) == ["0", "1", "2", "5"]
    insert_after(model, "1", nn.ReLU())
    assert list(model._modules) == ["0", "1", "2", "3", "5"]


def test_names_are_kept_and_the_new_child_is_called_by_its_class():
    model = nn.Sequential()
    for name in ("conv", "act", "norm"):
        model.add_module(name, nn.Identity())
    insert_after(model, "conv", nn.ReLU())
    insert_before(model, "norm", nn.ReLU())
    assert list(model._modules) == ["conv", "relu", "act", "relu_2", "norm"]
    remove(model, "act")
    assert list(model._modules) == ["conv", "relu", "relu_2", "norm"]


def test_a_subclass_of_sequential_is_one():
    class Block(nn.Sequential):
        pass

    model = Block(nn.Linear(2, 2), nn.ReLU())
    insert_after(model, nn.Linear, nn.GELU())
    assert type(model) is Block
    assert [type(child).__name__ for child in model] == ["Linear", "GELU", "ReLU"]


def test_many_neighbours_at_once():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)), nn.Conv2d(4, 4, 3))
    report = insert_after(model, nn.Conv2d, lambda old: nn.BatchNorm2d(old.out_channels))
    assert [change.paths for change in report.changes] == [("1",), ("2.1",), ("2.3",), ("4",)]
    assert model(torch.ones(2, 3, 16, 16)).shape == (2, 4, 8, 8)


def test_a_tied_anchor_gets_the_same_neighbour_everywhere():
    shared = nn.Linear(2, 2)
    model = nn.Sequential(shared, nn.Sequential(shared))
    report = insert_after(model, nn.Linear, lambda old: nn.LayerNorm(2))
    assert model[1] is model[2][1]
    assert report.changes[0].paths == ("1", "2.1")


def test_a_parent_that_calls_by_attribute_is_refused_with_the_way_to_go():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Linear(2, 2)

    model = Net()
    with pytest.raises(ContainerError, match=r'wrap\(model, "conv", lambda old: nn.Sequential\(old, new\)\)'):
        insert_after(model, "conv", nn.ReLU())
    assert list(model._modules) == ["conv"]


def test_a_parametrization_list_is_no_container():
    model = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    with pytest.raises(EditError, match=r'remove_parametrizations\(model, "weight"\)'):
        insert_after(model, "parametrizations.weight.0", nn.Identity())


class ByName(nn.Sequential):
    def __init__(self):
        super().__init__(OrderedDict(conv=nn.Linear(3, 3), act=nn.ReLU()))

    def forward(self, x):
        return self.act(self.conv(x))


class ByNumber(nn.Sequential):
    def forward(self, x):
        return self[1](self[0](x))


class Scaled(nn.Sequential):
    def forward(self, x):
        return super().forward(x.to(self[0].weight.dtype))


class Looping(nn.Sequential):
    def forward(self, x):
        for child in self:
            x = child(x)
        return x + self[0].bias


@pytest.mark.parametrize("model", [ByName(), ByNumber(nn.Linear(3, 3), nn.ReLU())])
def test_a_sequential_that_picks_its_children_is_no_container(model):
    first = next(iter(model._modules))
    with pytest.raises(
        ContainerError, match=f'"{first}" is a child of a By(Name|Number), which calls its children by attr'
    ):
        insert_after(model, first, nn.Tanh)
    x = torch.ones(1, 3)
    remove(model, nn.ReLU)
    assert torch.equal(model(x), next(iter(model._modules.values()))(x))


@pytest.mark.parametrize("kind", [Scaled, Looping])
def test_a_sequential_that_runs_all_of_its_children_is_a_container(kind):
    model = kind(nn.Linear(3, 3), nn.Tanh())
    insert_after(model, "0", nn.ReLU)
    assert [type(child) for child in model] == [nn.Linear, nn.ReLU, nn.Tanh]


def decorated(forward):
    @functools.wraps(forward)
    def outer(self, *args):
        return forward(self, *args)

    return outer


class Picking(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)])

    @decorated
    def forward(self, x):
        return self.layers[-1](self.layers[1](self.layers[0](x)))


def test_a_forward_that_picks_children_by_number_is_told_of():
    with pytest.warns(ModsurgWarning, match=r'"layers": the forward of Picking picks .* by number \(1\), where others'):
        insert_after(Picking(), "layers.0", nn.Tanh)
    with pytest.warns(ModsurgWarning, match=r"by number \(-1\), where others are now"):
        remove(Picking(), "layers.2")
    assert insert_after(Picking(), "layers.1", nn.Tanh).warnings == ()


def test_a_module_list_finds_its_children_by_their_numbers():
    with pytest.raises(ContainerError, match="ModuleList is a ModuleList, which finds its children by their numbers"):
        rename(nn.ModuleList([nn.ReLU()]), "0", "7")
    with pytest.raises(ContainerError, match="'-1' counts from the end of Sequential; \"1\" is next"):
        add(nn.Sequential(nn.ReLU()), "-1", nn.ReLU())


def test_a_forward_is_read_once_for_all_containers_of_a_name(monkeypatch):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(2, 2), nn.ReLU())

        def forward(self, x):
            return self.layers(x)

    read = []
    monkeypatch.setattr(bytecode, "numbers", lambda parent, name: read.append(name) or set())
    insert_after(nn.Sequential(*(Block() for _ in range(5))), nn.Linear, nn.Tanh)
    assert sorted(set(read)) == sorted(read)


def test_the_number_by_which_a_model_goes_is_told():
    model = nn.Transformer(8, 2, num_encoder_layers=3, num_decoder_layers=2, dim_feedforward=8)
    with edit(model) as e:
        e.remove("encoder.layers.2")
        e.remove("encoder.layers.1")
        e.insert_after("decoder.layers.0", nn.Identity())
    assert e.report.notes[-2:] == (
        'the model may go by its num_layers, which still says 3: model.get_submodule("encoder").num_layers = 1',
        'the model may go by its num_layers, which still says 2: model.get_submodule("decoder").num_layers = 3',
    )
    report = remove(model, "decoder.layers.1")
    assert not any("num_layers" in note for note in report.notes), "it said 2, and there were three"


@pytest.mark.parametrize("name", ["n_layers", "depth", "num_blocks"])
def test_other_names_of_that_number(name):
    model = nn.Module()
    model.blocks = nn.ModuleList(linears(3))
    setattr(model, name, 3)
    assert f"the model may go by its {name}, which still says 3: model.{name} = 2" in remove(model, "blocks.1").notes


def test_a_configuration_is_told_once():
    model = nn.Module()
    model.config = types.SimpleNamespace(num_hidden_layers=2, n_layer=2)
    model.h, model.head = nn.ModuleList(linears(2)), linears(2)
    (note,) = (note for note in remove(model, "h.0").notes if "go by" in note)
    assert note.endswith("its num_hidden_layers, which still says 2: model.config.num_hidden_layers = 1")
    assert not any("go by" in note for note in remove(model, "head.0").notes)


class Raising:
    @property
    def num_layers(self):
        raise RuntimeError("asked too early")


@pytest.mark.parametrize("said", [torch.tensor([3, 3]), {"num_layers": 3}, Raising()])
def test_a_configuration_that_says_no_number(said):
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.ReLU() for _ in range(3))
    model.num_layers, model.config = said, said
    assert remove(model, "blocks.2").notes == ()
    assert len(model.blocks) == 2


class Layer(nn.Module):
    def __init__(self, number):
        super().__init__()
        self.attention = nn.Linear(2, 2)
        self.attention.layer_idx = number

    def forward(self, x):
        return self.attention(x)


def numbered_layers():
    model = nn.Module()
    model.layers = nn.ModuleList(Layer(number) for number in range(4))
    return model


@pytest.mark.parametrize(
    "change",
    [
        lambda model: remove(model, "layers.1"),
        lambda model: insert_after(model, "layers.1", copy.deepcopy),
        lambda model: insert_after(model, "layers.3", copy.deepcopy),
        lambda model: replace(model, "layers.3", copy.deepcopy(model.layers[2])),
    ],
)
def test_layers_that_know_their_number_are_told(change):
    model = numbered_layers()
    (note,) = (note for note in change(model).notes if "number" in note and "renumbered" not in note)
    said, _, code = note.partition(": ")
    assert said == "layers hold their own number, which changed"
    exec(code.replace("): ", "):\n  "), {"model": model})
    assert [layer.attention.layer_idx for layer in model.layers] == list(range(len(model.layers)))


def test_numbers_that_still_hold_and_those_that_are_no_places_are_not_told():
    model = numbered_layers()
    reports = [remove(model, "layers.3"), replace(model, "layers.1", copy.deepcopy)]
    model.layers[0].attention.layer_idx = 7
    reports.append(remove(model, "layers.1"))
    assert not any("own number" in note for report in reports for note in report.notes)


def test_a_list_of_the_kinds_of_the_layers_is_told():
    model = numbered_layers()
    model.config = types.SimpleNamespace(num_hidden_layers=4, layer_types=["full"] * 4)
    model.config.layer_types[1] = "sliding"
    lines = [note for note in remove(model, "layers.2").notes if "layer_types" in note]
    said = "['full', 'sliding', 'full']"
    assert lines == [f"model.config.layer_types has an entry for each of 4 layers: model.config.layer_types = {said}"]
    exec(lines[0].partition(": ")[2], {"model": model})
    lines = [note for note in insert_after(model, "layers.1", copy.deepcopy).notes if "layer_types" in note]
    exec(lines[0].partition(": ")[2], {"model": model})
    assert model.config.layer_types == ["full", "sliding", "sliding", "full"]
