import importlib
import json
import os
import subprocess
import sys
import threading

import pytest
import safetensors.torch
import torch
import torchvision
from blueprints import Net, assert_same
from torch import nn

from modsurg import convert, diff, load_model, load_state, read_state, save_model, save_state, summary
from modsurg.checkpoints.formats.safetensors.header import read_header
from modsurg.errors import FormatError, SaveError, TrustError
from modsurg.structure.schema import KEY

SOURCE = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.GELU())
        self.head = nn.Linear(4, 2)
        self.activation = nn.functional.relu

    def forward(self, x):
        return self.head(self.activation(self.body(x)).mean((2, 3)))
"""


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A module of the user's own, with a class in it."""
    (tmp_path / "elsewhere.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("elsewhere")
    sys.modules.pop("elsewhere", None)


def tied():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 3), nn.Linear(3, 5, bias=False))
    model[2].weight = model[0].weight
    return model


def test_a_model_comes_back_in_another_process(tmp_path, elsewhere):
    model, x = elsewhere.Net().eval(), torch.randn(2, 1, 8, 8)
    for suffix in (".safetensors", ".pt"):
        save_model(model, tmp_path / f"net{suffix}")
    torch.save([x, model(x).detach()], tmp_path / "outputs.pt")
    code = (
        "import torch\nfrom modsurg import load_model\nx, y = torch.load('outputs.pt')\n"
        "for suffix in ('safetensors', 'pt'):\n"
        "    model = load_model(f'net.{suffix}', trust='elsewhere')\n"
        "    print(torch.equal(model(x), y), model.training)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "True False\n" * 2


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin"])
def test_ties_modes_and_order_are_kept(tmp_path, suffix):
    model = tied().eval()
    model[1].bias.requires_grad_(False)
    save_model(model, tmp_path / f"m{suffix}")
    back = load_model(tmp_path / f"m{suffix}")
    assert_same(model, back)
    assert back[2].weight is back[0].weight


def test_every_other_reader_opens_the_file(tmp_path):
    path = tmp_path / "m.safetensors"
    model = torchvision.models.mobilenet_v3_small()
    save_model(model, path)
    state = safetensors.torch.load_file(path)
    assert state.keys() == model.state_dict().keys()
    torchvision.models.mobilenet_v3_small().load_state_dict(state)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert b"cos\nsystem" not in path.read_bytes()


def test_a_model_file_is_a_state_too(tmp_path):
    for suffix in (".safetensors", ".pt"):
        path = tmp_path / f"m{suffix}"
        model, other = tied(), tied()
        save_model(model, path)
        assert list(read_state(path)) == list(model.state_dict())
        load_state(other, path)
        assert torch.equal(other[0].weight, model[0].weight)
        assert other[2].weight is other[0].weight


def test_buffers_outside_the_state_do_not_disturb_other_readers(tmp_path):
    model = nn.Linear(2, 2)
    model.register_buffer("frequencies", torch.randn(64), persistent=False)
    model.register_buffer("mask", torch.ones(500, 500, dtype=torch.bool).tril(), persistent=False)
    save_model(model, tmp_path / "m.safetensors")
    nn.Linear(2, 2).load_state_dict(safetensors.torch.load_file(tmp_path / "m.safetensors"))
    back = load_model(tmp_path / "m.safetensors")
    assert torch.equal(back.frequencies, model.frequencies)
    assert torch.equal(back.mask, model.mask)


def test_extra_state_is_kept(tmp_path):
    class Counting(nn.Linear):
        def get_extra_state(self):
            return {"seen": 3}

        def set_extra_state(self, state):
            self.seen = state["seen"]

    model = Counting(2, 2)
    model.seen = 3
    save_model(model, tmp_path / "m.safetensors")
    assert load_model(tmp_path / "m.safetensors", trust=Counting).seen == 3
    other = Counting(2, 2)
    load_state(other, tmp_path / "m.safetensors")
    assert other.seen == 3


def test_compiled_models_are_looked_through(tmp_path):
    model = torch.compile(nn.Sequential(nn.Linear(2, 2)))
    for suffix in (".safetensors", ".pt"):
        save_model(model, tmp_path / f"m{suffix}")
        back = load_model(tmp_path / f"m{suffix}")
        assert type(back) is nn.Sequential
        assert list(back.state_dict()) == ["0.weight", "0.bias"]


def test_same_model_same_bytes(tmp_path):
    model = torchvision.models.squeezenet1_1()
    for suffix in (".safetensors", ".pt"):
        for name in ("a", "b"):
            save_model(model, tmp_path / f"{name}{suffix}")
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


def test_the_weights_are_nobody_elses(tmp_path):
    path = tmp_path / "m.safetensors"
    save_model(nn.Linear(300, 300), path)
    before = path.read_bytes()
    first, second = load_model(path), load_model(path)
    old = second.weight.clone()
    optimizer = torch.optim.SGD(first.parameters(), lr=1.0)
    first(torch.ones(1, 300)).sum().backward()
    optimizer.step()
    assert not torch.equal(first.weight, old)
    assert torch.equal(second.weight, old)
    assert path.read_bytes() == before


def test_a_loaded_model_outlives_its_file(tmp_path):
    path = tmp_path / "m.safetensors"
    model = nn.Linear(300, 300)
    save_model(model, path)
    back, gone = load_model(path), load_model(path)
    save_model(nn.Linear(4, 4), path)
    assert torch.equal(back.weight, model.weight)
    path.unlink()
    assert torch.equal(gone.weight, model.weight)


def test_a_loaded_model_can_be_saved_over_its_own_file(tmp_path):
    path = tmp_path / "m.safetensors"
    save_model(nn.Linear(300, 300), path)
    first = path.read_bytes()
    save_model(load_model(path), path)
    assert path.read_bytes() == first
    state = load_model(path).state_dict()
    torch.save(state["bias"], tmp_path / "bias.pt")
    assert os.path.getsize(tmp_path / "bias.pt") < 10_000


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_what_is_refused_leaves_the_old_file(tmp_path, suffix):
    path = tmp_path / f"m{suffix}"
    save_model(nn.Linear(2, 2), path)
    before = path.read_bytes()
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model[1].lock = threading.Lock()
    model[0].act = lambda x: x
    with pytest.raises(SaveError) as caught:
        save_model(model, path)
    assert str(caught.value).startswith(f"{path}: 2 things can't be kept; nothing was written.\n  0.act  a lambda")
    assert "1.lock  a _thread.lock" in str(caught.value)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_wrapped_model_is_refused_with_the_fix(tmp_path, suffix):
    with pytest.raises(SaveError, match=r"DataParallel[^:]*: save the module inside it"):
        save_model(nn.DataParallel(nn.Linear(2, 2)), tmp_path / f"m{suffix}")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["m.safetensors"])
def test_a_tensor_on_meta_that_no_state_holds(tmp_path, name):
    model = nn.ReLU()
    model.shape = torch.ones(2, 3, device="meta").t()
    model.register_buffer("mask", torch.ones(2, device="meta", dtype=torch.bool), persistent=False)
    save_model(model, tmp_path / name)
    back = load_model(tmp_path / name)
    assert back.shape.is_meta
    assert back.mask.is_meta
    assert (back.shape.shape, back.shape.stride(), back.mask.dtype) == ((3, 2), (1, 3), torch.bool)


def test_a_model_on_meta_has_nothing_to_keep(tmp_path):
    with pytest.raises(SaveError, match="weight is on the meta device"):
        save_model(nn.Linear(2, 2, device="meta"), tmp_path / "m.safetensors")


def test_names_that_say_nothing(tmp_path):
    with pytest.raises(SaveError, match="the suffix does not name a format"):
        save_model(nn.Linear(2, 2), tmp_path / "model")
    (tmp_path / "model").touch()
    with pytest.raises(FormatError, match="it is empty"):
        load_model(tmp_path / "model")
    for name in ("m.pt", "m.safetensors"):
        save_model(nn.Linear(2, 3), tmp_path / name)
        for other in ("model", "net.pkl", "net.PT", "swapped.pt"):
            (tmp_path / name).replace(tmp_path / other)
            assert load_model(tmp_path / other).out_features == 3
            (tmp_path / other).replace(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"no file .*gone\.safetensors"):
        load_model(tmp_path / "gone.safetensors")
    with pytest.raises(SaveError, match="a dict is not an nn"):
        save_model({}, tmp_path / "m.safetensors")


def test_a_directory_or_a_pipe_is_no_model(tmp_path):
    for suffix in (".safetensors", ".pt"):
        os.mkfifo(tmp_path / f"pipe{suffix}")
        (tmp_path / f"directory{suffix}").mkdir()
    for path in tmp_path.iterdir():
        with pytest.raises(FormatError, match=rf"{path.name} is a directory; a whole model is one file"):
            load_model(path)


def test_a_state_is_not_taken_for_a_model(tmp_path):
    for suffix in (".safetensors", ".pt"):
        save_state(nn.Linear(2, 2), tmp_path / f"s{suffix}")
        with pytest.raises(FormatError, match=r"load_state\(model, path\)"):
            load_model(tmp_path / f"s{suffix}")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_the_error_names_the_file_and_what_to_trust(tmp_path, suffix):
    path = tmp_path / f"m{suffix}"
    save_model(nn.Sequential(Net(), nn.Linear(2, 2)), path)
    with pytest.raises(TrustError) as caught:
        load_model(path)
    assert str(caught.value).startswith(f"{path}: 1 name is not trusted")
    assert 'load_model(path, trust=("blueprints",))' in str(caught.value)
    for trust in ("blueprints", ("blueprints",), [Net], Net, {"blueprints.Net"}):
        assert type(load_model(path, trust=trust)[0]) is Net


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_class_that_moved(tmp_path, elsewhere, suffix):
    path = tmp_path / f"m{suffix}"
    model = nn.Sequential(elsewhere.Net())
    save_model(model, path)
    del sys.modules["elsewhere"]
    (tmp_path / "elsewhere.py").unlink()
    with pytest.raises(TrustError, match=r"not trusted[\s\S]*elsewhere\.Net"):
        load_model(path)
    with pytest.raises(TrustError, match=r'No module named .elsewhere.[\s\S]*rename=\{"elsewhere\.Net": Net\}'):
        load_model(path, trust="elsewhere")
    assert type(load_model(path, rename={"elsewhere.Net": Net})[0]) is Net
    assert type(load_model(path, rename={"elsewhere.Net": "blueprints.Net"}, trust="blueprints")[0]) is Net
    assert type(load_model(path, rename={"elsewhere": "blueprints"}, trust="blueprints")[0]) is Net
    assert list(read_state(path)) == list(model.state_dict())
    assert "Net" in str(summary(path))
    other = nn.Sequential(nn.Linear(1, 1))
    assert str(diff(path, other))


@pytest.mark.parametrize("change", [lambda raw: raw[: len(raw) // 2], lambda raw: raw[:20], lambda raw: b""])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_file_that_is_cut_off(tmp_path, suffix, change):
    path = tmp_path / f"m{suffix}"
    save_model(nn.Sequential(nn.Linear(20, 20), nn.ReLU()), path)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(FormatError, match=str(path)):
        load_model(path)


def test_a_tree_that_does_not_fit_the_tensors(tmp_path):
    path = tmp_path / "m.safetensors"
    model = nn.Linear(2, 2)
    save_model(model, path)
    tree = read_header(path).metadata[KEY]
    for text, words in (
        (tree.replace("float32", "int32"), "int32"),
        (tree.replace('"weight"', '"wait"'), "no tensor 'wait'"),
        (tree[:-1], "the tree can't be read"),
        (json.dumps([]), "this is not a tree that modsurg wrote"),
    ):
        state = {key: value.clone() for key, value in model.state_dict().items()}
        safetensors.torch.save_file(state, path, {KEY: text})
        with pytest.raises(FormatError, match=words):
            load_model(path)


def test_a_converted_model_keeps_its_new_dtype(tmp_path):
    model = tied()
    save_model(model, tmp_path / "m.safetensors")
    convert(tmp_path / "m.safetensors", tmp_path / "half.safetensors", dtype=torch.bfloat16)
    half = load_model(tmp_path / "half.safetensors")
    assert {value.dtype for value in half.state_dict().values()} == {torch.bfloat16}
    assert half[2].weight is half[0].weight


def test_a_converted_pickle_is_a_whole_model(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    save_model(model, tmp_path / "m.pt")
    convert(tmp_path / "m.pt", tmp_path / "m.safetensors")
    assert_same(load_model(tmp_path / "m.safetensors"), model)
    model.register_buffer("mask", torch.ones(2), persistent=False)
    save_model(model, tmp_path / "m.pt")
    convert(tmp_path / "m.pt", tmp_path / "m.safetensors")
    assert "ReLU" in str(summary(tmp_path / "m.safetensors"))
    with pytest.raises(FormatError, match=r"comes from a pickle and is not complete"):
        load_model(tmp_path / "m.safetensors")


def test_a_version_that_is_no_number(tmp_path):
    class Versioned(nn.Linear):
        _version = "0.0.5"

    save_model(Versioned(1, 1), tmp_path / "m.safetensors")
    assert load_model(tmp_path / "m.safetensors", trust=Versioned).in_features == 1
