"""Bytes and binary files in the place of a path; tensors that can't be read beside those that can; ties of others."""

import io

import numpy
import pytest
import safetensors.torch
import torch
from torch import nn

from modsurg import convert, diff, load_state, read_state, save_state, summary
from modsurg.errors import FormatError, SaveError


def net():
    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))


@pytest.mark.parametrize("kind", ["torch", "safetensors"])
@pytest.mark.parametrize("form", ["file", "at its end", "bytes"])
def test_bytes_are_read_wherever_a_path_is(kind, form):
    model = net()
    content = io.BytesIO()
    if kind == "torch":
        torch.save(model.state_dict(), content)
    else:
        content.write(safetensors.torch.save(model.state_dict()))
    if form == "file":
        content.seek(0)
    given = content.getvalue() if form == "bytes" else content
    other = net()
    assert load_state(other, given)
    assert torch.equal(other[0].weight, model[0].weight)
    assert set(read_state(given)) == set(model.state_dict())
    assert "2x3" in str(summary(given))
    assert not diff(given, model)
    if form != "bytes":
        assert given.tell() == (0 if form == "file" else len(content.getvalue()))


def test_files_are_written(tmp_path):
    model, target = net(), io.BytesIO()
    save_state(model, target)
    assert set(safetensors.torch.load(target.getvalue())) == set(model.state_dict())
    with open(tmp_path / "a.pt", "wb") as file:
        save_state(model, file)
    assert torch.equal(torch.load(tmp_path / "a.pt")["1.bias"], model[1].bias)
    again = io.BytesIO()
    convert(tmp_path / "a.pt", again)
    assert again.getvalue() == target.getvalue()
    with pytest.raises(SaveError, match="bytes can't be written to"):
        save_state(model, b"")
    with open(tmp_path / "a.pt") as file, pytest.raises((FormatError, UnicodeDecodeError), match="as text|utf-8"):
        read_state(file)


def test_one_sparse_tensor_does_not_hide_the_others(tmp_path):
    model = nn.Linear(2, 2)
    torch.save({"adj": torch.eye(3).to_sparse(), **model.state_dict()}, tmp_path / "a.pt")
    path = tmp_path / "a.pt"
    for read in (lambda: load_state(nn.Linear(2, 2), path), lambda: read_state(path), lambda: read_state(path, "adj")):
        with pytest.raises(FormatError, match=r"adj is a sparse tensor.*Try: only="):
            read()
    other = nn.Linear(2, 2)
    assert load_state(other, path, strict=False).left == ["adj"]
    assert torch.equal(other.weight, model.weight)
    assert load_state(other, path, only=["weight", "bias"], strict=False)
    assert list(read_state(path, "weight")) == ["weight"]
    with pytest.raises(SaveError, match="tensors outside of the state, in adj"):
        convert(path, tmp_path / "b.safetensors")
    assert convert(path, tmp_path / "b.safetensors", only=["weight", "bias"]).left == ("adj",)
    assert "adj" in str(summary(path))


def test_ties_as_safetensors_notes_them(tmp_path):
    class Tied(nn.Module):
        def __init__(self, tied=True):
            super().__init__()
            self.a = nn.Linear(3, 3)
            self.b = self.a if tied else nn.Linear(3, 3)

    model = Tied()
    safetensors.torch.save_model(model, tmp_path / "theirs.safetensors")
    untied = Tied(False)
    assert len(load_state(untied, tmp_path / "theirs.safetensors").loaded) == 4
    assert torch.equal(untied.b.weight, model.a.weight)
    save_state(model, tmp_path / "ours.safetensors")
    with safetensors.safe_open(tmp_path / "ours.safetensors", "pt") as file:
        assert file.metadata()["b.weight"] == "a.weight"
    safetensors.torch.load_model(Tied(), tmp_path / "ours.safetensors")
    assert read_state(tmp_path / "ours.safetensors").source.notes.metadata == {}


def test_files_of_others_are_named(tmp_path):
    numpy.savez(tmp_path / "a.npz", a=numpy.ones(3))
    with pytest.raises(FormatError, match="archive of numpy: open it with numpy.load"):
        read_state(tmp_path / "a.npz")
    torch.export.save(torch.export.export(nn.Linear(2, 2).eval(), (torch.ones(1, 2),)), tmp_path / "e.pt2")
    (tmp_path / "e.pt2").rename(tmp_path / "e.pt")
    with pytest.raises(FormatError, match=r"it is a program of torch\.export"):
        read_state(tmp_path / "e.pt")
