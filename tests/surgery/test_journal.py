from collections import OrderedDict

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from modsurg.surgery.journal import Journal


@given(before=st.lists(st.integers()), after=st.lists(st.integers()))
def test_a_list_comes_back_into_the_same_object(before, after):
    journal, values = Journal(), list(before)
    journal.keep_list(values)
    values[:] = after
    journal.keep_list(values)
    values.append(1)
    journal.rollback()
    assert values == before


@given(before=st.dictionaries(st.text(), st.integers()), after=st.dictionaries(st.text(), st.integers()))
def test_a_dict_comes_back_in_its_order(before, after):
    journal, mapping = Journal(), OrderedDict(before)
    journal.keep_dict(mapping)
    mapping.clear()
    mapping.update(after)
    journal.rollback()
    assert list(mapping.items()) == list(before.items())


def test_a_tensor_gets_its_memory_gradient_and_flag_back():
    journal, weight = Journal(), nn.Parameter(torch.ones(2))
    weight.sum().backward()
    memory, grad = weight.data_ptr(), weight.grad
    journal.keep_tensor(weight)
    weight.grad = None
    weight.data = torch.zeros(5)
    weight.requires_grad_(False)
    journal.rollback()
    assert (weight.data_ptr(), weight.grad is grad, weight.requires_grad) == (memory, True, True)


def test_an_attribute_that_was_not_there_goes_again():
    journal, module = Journal(), nn.ReLU()
    journal.keep_attr(module, "note")
    module.note = 1
    journal.keep_attr(module, "inplace")
    module.inplace = True
    journal.rollback()
    assert not hasattr(module, "note")
    assert module.inplace is False


def test_the_latest_goes_back_first():
    journal, later, order = Journal(), Journal(), []
    journal.on_undo(lambda: order.append("first"))
    journal.open(later)
    later.on_undo(lambda: order.append("second"))
    journal.absorb(later)
    journal.rollback()
    assert order == ["second", "first"]
