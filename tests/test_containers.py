import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from modsurg import insert_after, insert_before, remove
from modsurg.errors import ContainerError, NoMatchError


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
    with pytest.raises(ContainerError, match="ParametrizationList"):
        insert_after(model, "parametrizations.weight.0", nn.Identity())
