"""Small valid files, as bytes: where the fuzzer begins."""

import io
import json
import zipfile
from collections import OrderedDict
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

import modsurg
from modsurg import edit, save_checkpoint, save_model, save_state
from modsurg.checkpoints.convert import convert


class Net(nn.Module):
    """Attributes of many kinds, ties, a buffer, extra state."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleDict({"a": nn.Sequential(nn.Linear(3, 3), nn.ReLU()), "b": nn.BatchNorm1d(3)})
        self.head = nn.Linear(3, 3, bias=False)
        self.head.weight = self.blocks["a"][0].weight
        self.alias = [self.head, {"again": self.head, 1: torch.zeros(2)}]
        self.plain = {"size": torch.Size([1]), "set": {1, 2}, "bytes": b"ab", "nan": float("nan")}
        self.call = partial(nn.functional.relu, inplace=True)
        self.kind, self.device = torch.float32, torch.device("cpu")
        self.register_buffer("steps", torch.tensor(3), persistent=False)

    def get_extra_state(self):
        return {"t": torch.ones(2), "n": (1, "x", 2.5)}

    def set_extra_state(self, state):
        pass


def small():
    """A model of torch's own classes."""
    torch.manual_seed(0)
    return nn.Sequential(
        OrderedDict(a=nn.Linear(3, 3), act=nn.ReLU(), b=nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.1)))
    )


def states():
    """State dicts of several kinds."""
    base = torch.arange(12.0)
    yield Net().state_dict()
    yield OrderedDict(
        a=base, b=base, c=base[3:6], d=base.reshape(3, 4).t(), e=torch.zeros(0, 2), f=torch.tensor(1.0).half()
    )
    yield {"epoch": 3, "state_dict": small().state_dict(), "optimizer": {"lr": 0.1, "state": {0: {"m": torch.ones(2)}}}}


@cache
def folder(*names: str) -> dict[str, bytes]:
    """The files of that kind by name, each made once."""
    with TemporaryDirectory() as name:
        here = Path(name)
        for kind in names:
            _WRITERS[kind](here)
        return {str(path.relative_to(here)): path.read_bytes() for path in sorted(here.rglob("*")) if path.is_file()}


def pickles(*, model: bool) -> list[bytes]:
    """The pickles in files of torch.save."""
    found = []
    for data in folder("torch_model" if model else "torch").values():
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            found += [archive.read(each) for each in archive.namelist() if each.endswith("/data.pkl")]
    return found


def header(data: bytes) -> dict:
    """The JSON of a safetensors file."""
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def recipes() -> list[bytes]:
    """Recipes with every verb."""
    model = small()
    with edit(model) as e:
        e.replace(nn.ReLU, nn.GELU)
        e.wrap("a", lambda old: nn.Sequential(old, nn.Tanh()))
        e.insert_after("b.0", nn.LayerNorm(2))
        e.add("new", nn.Linear(2, 2), after="b")
        e.resize("new", out_features=5)
        e.freeze("a")
        e.unfreeze("a.0")
        e.rename("new", "last")
        e.remove("b.2")
    simple = modsurg.rename(small(), "act", "activation")
    return [e.report.recipe.to_json().encode(), simple.recipe.to_json().encode()]


def _safetensors(here):
    for number, state in enumerate(states()):
        save_state(state.get("state_dict", state), here / f"{number}.safetensors", metadata={"epoch": "3"})


def _torch(here):
    for number, state in enumerate(states()):
        torch.save(state, here / f"{number}.pt")
    save_state(small(), here / "ours.pt", metadata={"epoch": "3"})


def _legacy(here):
    for number, state in enumerate(states()):
        torch.save(state, here / f"{number}.pt", _use_new_zipfile_serialization=False)


def _torch_model(here):
    save_model(small(), here / "model.pt")
    torch.save(nn.TransformerEncoderLayer(4, 2, 4), here / "encoder.pt")


def _model(here):
    save_model(Net(), here / "net.safetensors")
    save_model(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), here / "norm.safetensors")


def _shards(here):
    save_state(Net(), here / "net.safetensors", shard_size=40)


def _distributed(here):
    with TemporaryDirectory() as name:
        convert(save_state(Net(), Path(name) / "net.safetensors"), here / "dcp")


def _run(here):
    model = small()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    things = {"a": (1, 2.5), "b": {1: b"x", "s": {1, 2}}, "c": [None, float("inf"), torch.int8, 1j]}
    save_checkpoint(here / "run.safetensors", step=3, model=model, optimizer=optimizer, things=things)


_WRITERS = {
    "safetensors": _safetensors,
    "torch": _torch,
    "legacy": _legacy,
    "torch_model": _torch_model,
    "model": _model,
    "shards": _shards,
    "distributed": _distributed,
    "run": _run,
}
