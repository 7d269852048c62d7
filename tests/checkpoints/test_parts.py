"""The weights out of a run."""

import pytest
import torch
from torch import nn

from modsurg import convert, load_model, load_state, read_state, save_checkpoint, save_model, save_state
from modsurg.checkpoints.formats.derived import DerivedSource
from modsurg.checkpoints.formats.registry import open_source, write_source
from modsurg.errors import FormatError, LoadError


class Counting(nn.Module):
    def __init__(self, values):
        super().__init__()
        self.values = values

    def get_extra_state(self):
        return {"seen": self.values}

    def set_extra_state(self, state):
        self.values = state["seen"]


def network(seen=None):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3), Counting(seen))
    model[2].weight = model[0].weight
    return model


@pytest.fixture
def run(tmp_path):
    model = network([7, torch.ones(2)])
    optimizer = torch.optim.Adam(model.parameters())
    model[:3](torch.randn(4, 3)).sum().backward()
    optimizer.step()
    path = tmp_path / "best.safetensors"
    save_checkpoint(path, model=model, optimizer=optimizer, trainer={"history": [torch.ones(1)]})
    return model, path


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_a_run_is_loaded_like_a_state(run):
    model, path = run
    for state in (path, read_state(path), read_state(path, part="model"), read_state(path, "model")):
        fresh = network()
        report = load_state(fresh, state, verify=True)
        assert report
        assert report.taken == "model"
        assert str(report) == "loaded 10 of 10 keys from its 'model'"
        assert same(model, fresh)
        assert fresh[3].values[0] == 7
        assert torch.equal(fresh[3].values[1], torch.ones(2))


def test_a_part_is_a_state_with_its_own_keys_and_notes(run, tmp_path):
    model, path = run
    with read_state(path, part="model") as state:
        assert list(state) == list(model.state_dict())
        assert state["0.weight"] is state["2.weight"]
        assert state.source.left == ["optimizer", "trainer"]
        assert state.source.notes.versions == {"1": 2}
        saved = save_state(state, tmp_path / "net.safetensors")
    assert "modsurg.run" not in read_state(saved).metadata
    assert load_state(network(), saved)


def test_a_state_that_was_taken_out_of_a_run_is_none(run, tmp_path):
    convert(run[1], tmp_path / "net.safetensors", only="model", rename={"model": ""})
    report = load_state(network(), tmp_path / "net.safetensors", strict=False)
    assert len(report.loaded) == 9
    assert report.taken == ""


def test_which_of_several(run, tmp_path):
    path = tmp_path / "run.safetensors"
    ema = nn.Linear(2, 1)
    save_checkpoint(path, ema_of_it=ema, model=nn.Linear(3, 1))
    assert load_state(nn.Linear(3, 1), path).taken == "model"
    assert load_state(nn.Linear(2, 1), read_state(path, part="ema_of_it")).taken == "ema_of_it"
    save_checkpoint(path, one=ema, two=ema)
    with pytest.raises(FormatError, match=r'a run with one, two: choose one, read_state\(path, part="one"\)'):
        load_state(ema, path)


def test_parts_that_are_no_weights(run):
    with pytest.raises(FormatError, match="is a run with model, optimizer, trainer, and no 'mode'"):
        read_state(run[1], part="mode")
    with pytest.raises(FormatError, match=r"its 'optimizer' is not the state of a module\. Try: load_checkpoint"):
        read_state(run[1], part="optimizer")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_what_saves_gives_the_path_to_load(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    model = nn.Linear(2, 1)
    assert save_state(model, str(path)) == save_model(model, str(path)) == path
    assert save_checkpoint(str(tmp_path / "run.safetensors"), model=model) == tmp_path / "run.safetensors"


def test_a_run_is_no_whole_model(run):
    with pytest.raises(FormatError, match=r"it holds a run, not a whole model: build the model, then load_state"):
        load_model(run[1])


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "null",
        '{"states": {"model": {"weight": {"$tensor": []}}}}',
        '{"states": {"model": {"weight": {"$tensor": "model.weight"}, "_extra_state": {"$nope": 1}}}}',
    ],
)
def test_a_damaged_run(text, tmp_path):
    save_checkpoint(tmp_path / "run.safetensors", model=nn.Linear(2, 1))
    with open_source(tmp_path / "run.safetensors") as source:
        write_source(tmp_path / "bad.safetensors", DerivedSource(source, metadata={"modsurg.run": text}))
    for attempt in (lambda path: load_state(nn.Linear(2, 1), path), lambda path: read_state(path, part="model")):
        with pytest.raises(FormatError, match="its run metadata is corrupt"):
            attempt(tmp_path / "bad.safetensors")


def test_a_run_of_torchs_suffix_has_parts_too(tmp_path):
    model = nn.Linear(2, 2)
    path = save_checkpoint(tmp_path / "run.pt", model=model)
    assert torch.equal(read_state(path, part="model")["weight"], model.weight)
    with pytest.raises(FormatError, match="no part 'head' in it"):
        read_state(path, part="head")


def test_a_rule_with_the_name_of_the_run(run):
    model, path = run
    with pytest.raises(LoadError, match=r"'model\.' matches no key.*0\.weight.*, of its 'model'"):
        load_state(model, path, rename={"model.": ""})
