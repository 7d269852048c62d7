"""Parameters and buffers of a model that are views of one memory."""

import torch
from loads import refused
from torch import nn

from modsurg import load_state


def module(**views):
    model = nn.Module()
    for name, view in views.items():
        model.register_buffer(name, view)
    return model


def test_two_names_of_one_view():
    base = torch.zeros(2, 3)
    model = module(w=base, same=base)
    values = torch.randn(2, 3)
    assert load_state(model, {"w": values, "same": values.clone()})
    assert torch.equal(model.w, values)
    assert load_state(model, {"same": values + 1})
    assert torch.equal(model.w, values + 1)
    refused(model, {"w": values, "same": values + 1}, r"same  shares memory with w in the model.*differing values")


def test_a_matrix_and_its_transpose():
    base = torch.zeros(2, 3)
    model = module(w=base, t=base.t())
    values = torch.randn(2, 3)
    assert load_state(model, {"w": values, "t": values.t().clone()})
    assert torch.equal(model.w, values)
    assert load_state(model, {"t": values.t() + 1})
    assert torch.equal(model.w, values + 1)
    refused(model, {"w": values, "t": values.t() + 1}, r"t  shares memory with w in the model.*differing")


def test_chained_overlaps():
    base = torch.zeros(6)
    model = module(a=base[:3], b=base[2:5], c=base[4:])
    values = torch.arange(6.0)
    assert load_state(model, {"a": values[:3], "b": values[2:5].clone(), "c": values[4:].clone()})
    assert torch.equal(base, values)
    refused(model, {"a": values[:3], "b": values[2:5], "c": values[4:] + 1}, "c  shares memory with b")


def test_views_of_another_dtype():
    base = torch.zeros(4)
    model = module(f=base, i=base.view(torch.int32))
    values = torch.randn(4)
    assert load_state(model, {"f": values, "i": values.view(torch.int32)})
    assert torch.equal(base, values)
    refused(model, {"f": values, "i": values.view(torch.int32) + 1}, "i  shares memory with f")


def test_neighbours_in_one_memory_do_not_share():
    base = torch.zeros(6)
    model = module(a=base[:3], b=base[3:])
    assert load_state(model, {"a": torch.ones(3), "b": torch.full((3,), 2.0)})
    assert base.tolist() == [1, 1, 1, 2, 2, 2]


def test_expanded():
    model = module(e=torch.zeros(1, 3).expand(4, 3))
    refused(model, {"e": torch.randn(1, 3).expand(4, 3)}, "e  has one element at several indices.*clone")


def test_conjugate_and_negative_places():
    base = torch.zeros(3, dtype=torch.complex64)
    model = module(c=base.conj(), n=torch.zeros(3, dtype=torch.complex64).conj().imag)
    state = {"c": torch.randn(3, dtype=torch.complex64), "n": torch.randn(3)}
    assert load_state(model, state)
    assert torch.equal(model.c, state["c"])
    assert torch.equal(model.n, state["n"])
