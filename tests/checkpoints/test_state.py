"""save_state, load_state and read_state, as a user meets them."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from modsurg import (
    convert,
    load_checkpoint,
    load_model,
    load_state,
    read_state,
    save_checkpoint,
    save_model,
    save_state,
    verify,
)
from modsurg.errors import FormatError, LoadError, ModsurgWarning, SaveError


def net(width=4, classes=3):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Flatten(), nn.Linear(width, classes))


def same_state(a, b):
    a, b = (each.state_dict() if isinstance(each, nn.Module) else each for each in (a, b))
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


class Tied(nn.Module):
    def __init__(self, tied=True):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        if tied:
            self.head.weight = self.embedding.weight


class Counting(nn.Module):
    """Keeps extra state."""

    def __init__(self, extra):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))
        self.extra = extra

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, extra):
        if extra == "poison":
            raise RuntimeError("not this")
        self.extra = extra


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin", ".safetensors.index.json"])
def test_there_and_back(suffix, tmp_path):
    old, new = net(), net()
    path = save_state(old, tmp_path / f"net{suffix}")
    before = dict(new.named_parameters())
    report = load_state(new, path)
    assert same_state(old, new)
    assert report
    assert list(report.loaded) == list(old.state_dict())
    assert str(report) == "loaded 9 of 9 keys"
    assert all(parameter is before[name] for name, parameter in new.named_parameters())


def test_the_parameters_keep_their_memory_and_tell_autograd(tmp_path):
    old, new = net(), net()
    path = save_state(old, tmp_path / "net.safetensors")
    places = [parameter.data_ptr() for parameter in new.parameters()]
    loss = (new[3].weight ** 2).sum()
    load_state(new, path)
    assert places == [parameter.data_ptr() for parameter in new.parameters()]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_model_in_any_layout_is_filled(suffix, tmp_path):
    old = net(width=8)
    path = save_state(old, tmp_path / f"net{suffix}")
    for new in (
        net(width=8).to(memory_format=torch.channels_last),
        net(width=8).double(),
        net(width=8).bfloat16(),
        net(width=8).requires_grad_(False),
    ):
        strides = new[0].weight.stride()
        load_state(new, path)
        assert new[0].weight.stride() == strides
        for key, value in new.state_dict().items():
            assert torch.equal(value, old.state_dict()[key].to(value.dtype)), key
    assert new[0].weight.requires_grad is False


def test_a_state_in_memory(tmp_path):
    old, new = net(), net()
    assert load_state(new, old.state_dict())
    assert same_state(old, new)
    new[3].weight.data.zero_()
    assert old[3].weight.abs().sum() > 0


def test_a_state_that_lies_in_the_memory_of_the_model():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    first, second = (layer.weight.detach().clone() for layer in model)
    load_state(model, model.state_dict(), rename={"0": "1", "1": "0"})
    assert torch.equal(model[0].weight, second)
    assert torch.equal(model[1].weight, first)
    load_state(model, {"0.weight": model[0].weight.t()}, only="0.weight")
    assert torch.equal(model[0].weight, second.t())


def test_modules_with_loading_code_get_a_state_that_lies_in_their_memory():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    model[0].register_load_state_dict_post_hook(lambda module, keys: None)
    model[0].weight.data.fill_(2)
    load_state(model, model.state_dict(), rename={"0": "1", "1": "0"})
    assert model[0].weight.sum() == 3
    assert model[1].weight.sum() == 6


def test_a_state_that_was_read(tmp_path):
    old, new = net(), net()
    with read_state(save_state(old, tmp_path / "net.safetensors")) as state:
        load_state(new, state)
        save_state(state, tmp_path / "copy.safetensors")
    assert same_state(old, new)
    assert (tmp_path / "copy.safetensors").read_bytes() == (tmp_path / "net.safetensors").read_bytes()


def test_something_that_is_no_state():
    with pytest.raises(LoadError, match=r"can't be loaded: model is itself a state .*: give state\['model'\]"):
        load_state(net(), {"model": net().state_dict(), "epoch": 3})
    with pytest.raises(LoadError, match="can't be loaded: epoch is of type int.*: leave it out"):
        load_state(net(), {"epoch": 3})
    with pytest.raises(LoadError, match=r"weight is of type ndarray.*: give torch\.as_tensor of it"):
        load_state(net(), {"weight": np.zeros(3)})
    with pytest.raises(SaveError, match="state is of type dict"):
        save_state(torch.optim.SGD(net().parameters()).state_dict(), "a.pt")


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "directory"])
def test_a_default_device_is_not_where_files_are_read(tmp_path, name):
    """As after torch.set_default_device("cuda"): everything is read to the CPU all the same."""
    state = {"turned": torch.randn(3, 2).T, "none": torch.empty(0, 2), "_extra_state": [torch.ones(2), torch.empty(0)]}
    torch.save(state, tmp_path / "given.pt")
    model, tied = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tied[1].weight = nn.Parameter(tied[0].weight.T)
    with torch.device("meta"):
        convert(tmp_path / "given.pt", tmp_path / name)
        read = read_state(tmp_path / name)
        assert torch.equal(read["turned"], state["turned"])
        assert read["none"].device.type == "cpu"
        assert read["_extra_state"][0].tolist() == [1, 1]
        assert read["_extra_state"][1].device.type == "cpu"
        empty = nn.Sequential(nn.Linear(2, 2))
        load_state(empty, model.state_dict())
        load_state(tied, tied.state_dict())
        saved = load_model(save_model(model, tmp_path / "model.safetensors"))
        load_checkpoint(save_checkpoint(tmp_path / "run.safetensors", model=model), model=saved)
    for each in (empty, saved):
        assert all(map(torch.equal, each.parameters(), model.parameters()))


BLOCKS = [getattr(torch, name) for name in ("float8_e8m0fnu", "float4_e2m1fn_x2") if hasattr(torch, name)]


def test_what_is_quantised_in_blocks_keeps_its_dtype(tmp_path):
    state = {str(dtype): torch.full((4,), 0x7F, dtype=torch.uint8).view(dtype) for dtype in BLOCKS}
    for path in (save_state(state, tmp_path / "a.safetensors"), save_state(state, tmp_path / "a.pt")):
        with pytest.warns(ModsurgWarning, match="its own dtype was kept"):
            again = save_state(state, path, dtype=torch.float16)
        for read in (read_state(path, dtype=torch.float16), read_state(again)):
            assert [tensor.dtype for tensor in read.values()] == BLOCKS
            assert all(tensor.view(torch.uint8).tolist() == [0x7F] * 4 for tensor in read.values())
    for dtype in BLOCKS:
        place = nn.Module()
        place.register_buffer("x", torch.zeros(4, dtype=torch.uint8).view(dtype))
        with pytest.raises(LoadError, match=r"x  file float32, model float\w+, which loses values"):
            load_state(place, {"x": torch.full((4,), -1.0)})
        load_state(place, {"x": state[str(dtype)]})
        assert place.x.view(torch.uint8).tolist() == [0x7F] * 4


def test_a_dtype_that_loses_what_floating_tensors_hold(tmp_path):
    path = save_state(net(), tmp_path / "a.pt")
    for dtype in (torch.int8, torch.complex64):
        with pytest.raises(SaveError, match=f"dtype={dtype} would lose what floating tensors hold: take torch.float16"):
            save_state(net(), path, dtype=dtype)
        with pytest.raises(LoadError, match=f"dtype={dtype} would lose"):
            read_state(path, dtype=dtype)
    for dtype in BLOCKS:
        with pytest.raises(SaveError, match=f"dtype={dtype} would lose what floating tensors hold: take torch.float16"):
            save_state(net(), path, dtype=dtype)
    with pytest.raises(SaveError, match="dtype='float16' is not a dtype of torch: take torch.float16"):
        save_state(net(), path, dtype="float16")


def test_arguments_of_another_kind(tmp_path):
    with pytest.raises(LoadError, match=r"has a Sequential where the path should be.*other\.state_dict\(\)"):
        load_state(net(), net())
    with pytest.raises(LoadError, match="has a str where the model should be"):
        load_state("a.pt", net())
    with pytest.raises(SaveError, match="a SGD is neither a model nor a state_dict.*save_checkpoint"):
        save_state(torch.optim.SGD(net().parameters()), tmp_path / "a.pt")


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*a\.safetensors"):
        load_state(net(), tmp_path / "a.safetensors")
    (tmp_path / "a.npz").touch()
    with pytest.raises(FormatError, match=r"neither its name nor its first bytes say which format.*name\.safetensors"):
        read_state(tmp_path / "a.npz")
    with pytest.raises(SaveError, match="does not say which format to write"):
        save_state(net(), tmp_path / "a.npz")
    with pytest.raises(FormatError, match="is a directory, not a checkpoint"):
        load_state(net(), tmp_path)


def test_the_order_of_metadata_does_not_change_a_byte(tmp_path):
    for suffix in ("safetensors", "pt"):
        a = save_state({"w": torch.ones(1)}, tmp_path / f"a.{suffix}", metadata={"a": "1", "b": "2"})
        b = save_state({"w": torch.ones(1)}, tmp_path / f"b.{suffix}", metadata={"b": "2", "a": "1"})
        assert a.read_bytes() == b.read_bytes()


def test_metadata(tmp_path):
    path = save_state(net(), tmp_path / "net.safetensors", metadata={"epoch": "3"})
    assert read_state(path).metadata == {"epoch": "3"}
    with pytest.raises(SaveError, match=r"metadata\['a'\] is not valid text .*repr\(\)"):
        save_state(net(), tmp_path / "b.safetensors", metadata={"a": "\ud800"})
    with pytest.raises(SaveError, match=r"metadata is of type list: give names and texts"):
        save_state(net(), tmp_path / "b.safetensors", metadata=["a"])
    with pytest.raises(SaveError, match=r"metadata\['epoch'\] is of type int.*str"):
        save_state(net(), tmp_path / "b.safetensors", metadata={"epoch": 3})
    with pytest.raises(SaveError, match=r"begin with 'modsurg\.' are taken"):
        save_state(net(), tmp_path / "b.safetensors", metadata={"modsurg.hashes": ""})


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_half_the_size(suffix, tmp_path):
    model = net()
    path = save_state(model, tmp_path / f"net{suffix}", dtype=torch.float16)
    with read_state(path) as state:
        assert state["0.weight"].dtype == torch.float16
        assert state["1.num_batches_tracked"].dtype == torch.int64
    new = net()
    load_state(new, path)
    assert torch.allclose(new[3].weight, model[3].weight, atol=1e-3)


class TestReadState:
    def test_reads_only_what_is_asked(self, tmp_path):
        path = save_state(net(), tmp_path / "net.safetensors")
        with read_state(path, "1") as state:
            assert list(state) == [f"1.{name}" for name in ("weight", "bias", "running_mean", "running_var")] + [
                "1.num_batches_tracked"
            ]
            assert "0.weight" not in state
            with pytest.raises(KeyError, match=r"0\.weight"):
                state["0.weight"]
            assert len(state) == 5
            assert repr(state).startswith("<State of 5 keys, 72 bytes, ")
            assert repr(state.source).startswith("<SafetensorsSource of ")
            assert repr(state.source).endswith(f" tensors, {state.source.path}>")
            state.source.read = None
            assert state.source["1.weight"].shape == (4,)

    @pytest.mark.parametrize(
        "where, count",
        [("0.weight", 1), ("*.weight", 3), (["0", "3"], 4), ("re:.*running.*", 2), (lambda key: "bias" in key, 3)],
    )
    def test_where(self, where, count, tmp_path):
        assert len(read_state(save_state(net(), tmp_path / "net.safetensors"), where)) == count

    def test_where_fits_nothing(self, tmp_path):
        path = save_state(net(), tmp_path / "net.safetensors")
        with pytest.raises(LoadError, match=r"'encoder' matches no key of .*The keys are like 0\.weight, 0\.bias"):
            read_state(path, "encoder")

    def test_device_and_dtype(self, tmp_path):
        path = save_state(net(), tmp_path / "net.safetensors")
        state = read_state(path, device="meta", dtype=torch.float64)
        assert state["0.weight"].is_meta
        assert state["0.weight"].dtype == torch.float64
        assert state["1.num_batches_tracked"].dtype == torch.int64

    def test_what_was_tied_shares_memory(self, tmp_path):
        state = dict(read_state(save_state(Tied(), tmp_path / "net.safetensors")))
        assert state["embedding.weight"].data_ptr() == state["head.weight"].data_ptr()

    def test_tensors_are_the_users_own(self, tmp_path):
        path = save_state(net(), tmp_path / "net.safetensors")
        with read_state(path) as state:
            first = state["0.weight"]
            first.zero_()
            assert state["0.weight"].abs().sum() > 0
        assert verify(path)


class TestTies:
    @pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".safetensors.index.json"])
    def test_tied_to_tied_and_untied(self, suffix, tmp_path):
        old = Tied()
        path = save_state(old, tmp_path / f"net{suffix}")
        for new in (Tied(), Tied(tied=False)):
            assert load_state(new, path)
            assert torch.equal(new.head.weight, old.embedding.weight)
            assert torch.equal(new.embedding.weight, old.embedding.weight)
        assert new.head.weight is not new.embedding.weight

    @pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".safetensors.index.json"])
    def test_untied_with_equal_values_to_tied(self, suffix, tmp_path):
        old = Tied(tied=False)
        old.head.weight.data.copy_(old.embedding.weight)
        new = Tied()
        assert load_state(new, save_state(old, tmp_path / f"net{suffix}"))
        assert torch.equal(new.head.weight, old.embedding.weight)
        assert new.head.weight is new.embedding.weight

    @pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
    def test_untied_with_other_values_to_tied_is_an_error(self, suffix, tmp_path):
        path = save_state(Tied(tied=False), tmp_path / f"net{suffix}")
        new = Tied()
        before = new.head.weight.clone()
        message = r'head\.weight  shares memory with embedding\.weight.*differing.*"head\.weight": None'
        with pytest.raises(LoadError, match=message):
            load_state(new, path)
        assert torch.equal(new.head.weight, before)
        load_state(new, path, rename={"head.weight": None})
        assert torch.equal(new.head.weight, read_state(path)["embedding.weight"])

    def test_one_key_is_enough_for_a_tied_model(self):
        old, new = Tied(), Tied()
        assert load_state(new, {"head.weight": old.head.weight.detach()})
        assert torch.equal(new.embedding.weight, old.embedding.weight)

    def test_nan_is_equal_to_itself(self):
        values = torch.full((5, 4), float("nan"))
        assert load_state(Tied(), {"embedding.weight": values, "head.weight": values.clone()})

    def test_tied_and_sliced(self):
        old, new = Tied(), Tied()
        old.embedding.weight = old.head.weight = nn.Parameter(torch.randn(7, 4))
        load_state(new, old.state_dict(), on_mismatch="slice")
        assert torch.equal(new.head.weight, old.head.weight[:5])
        old.head.weight = nn.Parameter(torch.randn(7, 4))
        with pytest.raises(LoadError, match=r"head\.weight  shares memory"):
            load_state(new, old.state_dict(), on_mismatch="slice")


class TestExtraState:
    @pytest.mark.parametrize("suffix", [".safetensors", ".safetensors.index.json"])
    def test_plain_data(self, suffix, tmp_path):
        old = nn.Sequential(Counting({"steps": (1, 2), "scale": 0.1}), nn.Linear(2, 2))
        new = nn.Sequential(Counting(None), nn.Linear(2, 2))
        path = save_state(old, tmp_path / f"net{suffix}")
        assert load_state(new, path, verify=True)
        assert new[0].extra == {"steps": (1, 2), "scale": 0.1}
        assert list(read_state(path)) == list(old.state_dict())
        assert read_state(path)["0._extra_state"]["steps"] == (1, 2)

    @pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
    def test_a_tensor(self, suffix, tmp_path):
        new = Counting(None)
        load_state(new, save_state(Counting(torch.arange(3)), tmp_path / f"net{suffix}"))
        assert torch.equal(new.extra, torch.arange(3))

    def test_refused_by_the_module(self):
        new = Counting("mine")
        before = new.weight.clone()
        with pytest.raises(LoadError, match=r"_extra_state: Counting refused it \(not this\); nothing was loaded"):
            load_state(new, Counting("poison").state_dict())
        assert new.extra == "mine"
        assert torch.equal(new.weight, before)

    def test_missing_and_too_much(self):
        with pytest.raises(LoadError, match="_extra_state  not in the file"):
            load_state(Counting(1), {"weight": torch.zeros(3)})
        with pytest.raises(LoadError, match="_extra_state  not in the model"):
            load_state(nn.LayerNorm(3, bias=False), Counting(1).state_dict())

    def test_an_object_is_refused_by_name(self, tmp_path):
        with pytest.raises(SaveError, match=r"1\._extra_state.*can't be kept without pickle"):
            save_state(nn.Sequential(nn.ReLU(), Counting({"f": print})), tmp_path / "net.safetensors")


class TestMeta:
    @pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
    def test_filled_and_tied(self, suffix, tmp_path):
        old = nn.Sequential(Tied(), net(), nn.LSTM(3, 3))
        path = save_state(old, tmp_path / f"net{suffix}")
        with torch.device("meta"):
            new = nn.Sequential(Tied(), net(), nn.LSTM(3, 3))
        new[1][0].weight.requires_grad_(False)
        assert load_state(new, path)
        assert same_state(old, new)
        assert not any(tensor.is_meta for tensor in [*new.parameters(), *new.buffers()])
        assert new[0].head.weight is new[0].embedding.weight
        assert new[1][0].weight.requires_grad is False
        assert all(isinstance(parameter, nn.Parameter) for parameter in new.parameters())
        assert torch.equal(new[2](torch.ones(1, 3))[0], old[2](torch.ones(1, 3))[0])
        assert new[1][1].running_mean is dict(new[1][1].named_buffers())["running_mean"]

    def test_a_view_stays_a_view(self):
        class Viewed(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.randn(3, 2))
                self.register_buffer("turned", self.weight.detach().t())

        old = Viewed()
        with torch.device("meta"):
            new = Viewed()
        load_state(new, old.state_dict())
        assert torch.equal(new.turned, old.turned)
        new.weight.data.zero_()
        assert new.turned.sum() == 0

    def test_a_failing_load_leaves_it_on_meta(self, tmp_path):
        path = save_state(nn.Sequential(Counting("poison"), nn.Linear(2, 2)), tmp_path / "net.safetensors")
        with torch.device("meta"):
            new = nn.Sequential(Counting(1), nn.Linear(2, 2))
        parameters = list(new.parameters())
        with pytest.raises(LoadError, match="refused it"):
            load_state(new, path)
        assert all(a is b and a.is_meta for a, b in zip(parameters, new.parameters(), strict=True))

    def test_what_no_file_holds_is_named(self):
        class Rotary(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.randn(3))
                self.register_buffer("frequencies", torch.arange(3.0), persistent=False)

        old = nn.Sequential(Rotary())
        with torch.device("meta"):
            new = nn.Sequential(Rotary())
        with pytest.raises(LoadError, match=r'0\.frequencies is on the meta device.*\("0"\)\.frequencies = ...'):
            load_state(new, old.state_dict())
        new[0].frequencies = torch.arange(3.0)
        assert load_state(new, old.state_dict())

    def test_partly_on_purpose(self):
        old = net()
        with torch.device("meta"):
            new = net()
        load_state(new, old.state_dict(), only="3")
        assert torch.equal(new[3].weight, old[3].weight)
        assert new[0].weight.is_meta
        load_state(new, old.state_dict(), only=["0", "1"])
        assert same_state(old, new)


def test_a_compiled_or_wrapped_model(tmp_path):
    old = net()
    compiled = torch.compile(copy.deepcopy(old))
    wrapped = nn.DataParallel(nn.Sequential(compiled))
    path = save_state(wrapped, tmp_path / "net.safetensors")
    new = nn.Sequential(net())
    load_state(new, path)
    assert same_state(new[0], old)
    wrapped_new = nn.DataParallel(nn.Sequential(torch.compile(net())))
    load_state(wrapped_new, save_state(new, tmp_path / "plain.safetensors"))
    assert same_state(wrapped_new.module[0]._orig_mod, old)


def test_a_scripted_model(tmp_path):
    old, new = torch.jit.script(nn.Linear(2, 2)), torch.jit.script(nn.Linear(2, 2))
    load_state(new, save_state(old, tmp_path / "net.safetensors"))
    assert same_state(old, new)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "a.safetensors.index.json"])
def test_a_tilde_is_no_home_outside_a_shell(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SaveError, match=r"there is no directory .*~: Path\('~.*'\)\.expanduser\(\) is in your home"):
        save_state(net(), f"~/{name}")
    with pytest.raises(FileNotFoundError, match=r"there is no file ~/.*: Path\('~/.*'\)\.expanduser"):
        load_state(net(), f"~/{name}")
    assert list(tmp_path.iterdir()) == []


def test_a_state_that_is_read_lazily_is_not_pickled(tmp_path):
    with read_state(save_state(net(), tmp_path / "a.safetensors")) as state:
        for keep in (pickle.dumps, copy.deepcopy):
            with pytest.raises(SaveError, match=r"a State reads from .*a\.safetensors, which is open.*dict\(state\)"):
                keep(state)
        assert pickle.loads(pickle.dumps(dict(state))).keys() == state.keys()
