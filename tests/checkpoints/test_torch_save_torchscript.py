"""The state of a TorchScript archive, taken out of it without compiling it."""

import pytest
import torch
from torch import nn

from modsurg import load_state
from modsurg.checkpoints.formats.torch_save.reader import TorchSource
from modsurg.errors import FormatError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


class Scripted(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("shift", torch.zeros(1))
        self.seen = torch.ones(4)

    def forward(self, x):
        return self.inner(x) * self.scale + self.shift


def test_torchscript(tmp_path):
    model = torch.jit.script(Scripted())
    torch.jit.save(model, str(tmp_path / "net.pt"))
    source = TorchSource(tmp_path / "net.pt")
    assert sorted(source) == sorted(model.state_dict())
    assert all(torch.equal(source.read(key), tensor) for key, tensor in model.state_dict().items())
    fresh = Scripted()
    assert load_state(fresh, tmp_path / "net.pt")


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(2, 2)
        self.b = self.a

    def forward(self, x):
        return self.b(self.a(x))


def test_traced_and_shared(tmp_path):
    model = torch.jit.trace(Shared(), torch.ones(1, 2))
    torch.jit.save(model, str(tmp_path / "net.pt"))
    source = TorchSource(tmp_path / "net.pt")
    assert sorted(source) == ["a.bias", "a.weight", "b.bias", "b.weight"]
    assert source.notes.ties == {"b.weight": "a.weight", "b.bias": "a.bias"}


def test_a_packed_module_is_refused(tmp_path):
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(2, 2)), {nn.Linear}, dtype=torch.qint8)
    torch.jit.save(torch.jit.script(model), str(tmp_path / "net.pt"))
    with pytest.raises(FormatError, match=r"keeps its state in a way of its own: save_state\(torch\.jit\.load\(path\)"):
        TorchSource(tmp_path / "net.pt")
