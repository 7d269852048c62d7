"""Where the state is in a checkpoint, what is not a state, and that nothing in a file ever runs."""

import argparse
import collections
import datetime
import functools
import io
import os
import pathlib
import subprocess

import numpy
import pytest
import torch
from torch import nn

from modsurg import convert, diff, load_state, read_state, save_state, summary
from modsurg.checkpoints.formats.torch_save.reader import TorchSource
from modsurg.errors import FormatError, SaveError, TrustError


class Evil:
    """Pickles as a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class Config:
    """A plain object."""

    def __init__(self):
        self.depth = 3


def saved(tmp_path, value, **options):
    path = tmp_path / "file.pt"
    torch.save(value, path, **options)
    return path


@pytest.mark.parametrize(
    ("wrap", "taken"),
    [
        (lambda state: state, ""),
        (lambda state: {"state_dict": state, "epoch": 3}, "state_dict"),
        (lambda state: {"model": {"state_dict": state, "args": [1]}, "optimizer": {"state": {}}}, "model.state_dict"),
        (lambda state: {"net": state, "best": torch.tensor(0.5)}, "net"),
        (lambda state: {"ema": dict(state), "model": state}, "model"),
        (lambda state: {"generator": state, "optimizer": {"state": {0: {"m": torch.ones(1)}}}}, "generator"),
        (lambda state: {"state_dict": state, "config": argparse.Namespace(lr=0.1), "own": Config()}, "state_dict"),
        (lambda state: {"state_dict": state, "at": pathlib.Path("x"), "day": datetime.date(2020, 1, 2)}, "state_dict"),
        (lambda state: {"state_dict": state, "score": numpy.float64(0.9), "table": numpy.ones(3)}, "state_dict"),
        (lambda state: {"state_dict": state, "c": collections.Counter("aab"), "s": {1, 2}}, "state_dict"),
        (lambda state: {"state_dict": state, "d": collections.defaultdict(list), "z": 1j, "y": b"x"}, "state_dict"),
        (lambda state: {"state_dict": state, "none": b"", "text": bytearray(b"x"), "row": numpy.ones(0)}, "state_dict"),
    ],
)
def test_finds_the_state(tmp_path, wrap, taken):
    state = nn.Linear(2, 2).state_dict()
    path = saved(tmp_path, wrap(state))
    source = TorchSource(path)
    assert source.taken == taken
    assert list(source) == ["weight", "bias"]
    assert torch.equal(source.read("weight"), state["weight"])


def test_says_what_it_left(tmp_path):
    path = saved(tmp_path, {"model": {"state_dict": {"w": torch.ones(1)}, "args": 1}, "epoch": 3})
    source = TorchSource(path)
    assert source.left == ["epoch", "model.args"]


def test_a_load_says_what_it_took(tmp_path):
    report = load_state(nn.Linear(2, 2), saved(tmp_path, {"net": nn.Linear(2, 2).state_dict(), "epoch": 3}))
    assert report.taken == "net"
    assert str(report) == "loaded 2 of 2 keys from its 'net'"


STATE = {"w": torch.ones(1)}


@pytest.mark.parametrize(
    ("value", "left"),
    [
        ({"model": STATE, "ema": STATE, "epoch": 3, "args": {"lr": [0.1]}}, ["ema"]),
        ({"model": STATE, "cfg": {"a": [{"b": (torch.ones(1),)}]}, "loss": torch.tensor(1.0)}, ["cfg"]),
        ({**STATE, "packed": (torch.ones(1), 8), "name": "net"}, ["packed"]),
        ({"model": {**STATE, "packed": [torch.ones(1)]}, "optimizer": {}}, ["model.packed"]),
        ({"G": STATE, "D": STATE, "packed": (torch.ones(1),), "n": 3}, ["packed"]),
        ({"net": {"a": STATE, "b": STATE, "t": (torch.ones(1),)}}, ["net.t"]),
        ({"model": STATE, "x": collections.deque([torch.ones(1)])}, ["x"]),
        ({"model": STATE, "x": collections.OrderedDict(a=1), "y": {1, 2}}, []),
    ],
)
@pytest.mark.filterwarnings("ignore:no keys matched")
def test_tensors_that_are_left_are_named(tmp_path, value, left):
    path = saved(tmp_path, value)
    assert TorchSource(path).left_tensors == left
    report = load_state(nn.ParameterDict(STATE), path, strict=False)
    assert list(report.left) == left
    ending = f"left out: {', '.join(left)}" if left else ""
    assert str(report).splitlines()[0].endswith(ending)


@pytest.mark.parametrize(
    ("part", "keys"),
    [("0", ["w"]), ("1.0", ["w"]), ("1", ["0.w", "1"]), ("1.1", ["1.1"]), ("2.states.0", ["w"]), ("2", ["states.0.w"])],
)
def test_a_part_goes_through_lists_and_tuples(tmp_path, part, keys):
    path = saved(
        tmp_path, ({"w": torch.ones(1)}, [{"w": torch.ones(1)}, torch.ones(2)], {"states": [{"w": torch.ones(1)}]})
    )
    assert list(read_state(path, part=part)) == keys
    with pytest.raises(FormatError, match=r"there is no part '3' in it. It holds: 0, 1, 2"):
        read_state(path, part="3")


def test_several_states_keep_their_names(tmp_path):
    path = saved(tmp_path, {"generator": {"w": torch.ones(1)}, "critic": {"w": torch.zeros(2)}, "step": 3})
    source = TorchSource(path)
    assert {key: source[key].shape for key in source} == {"generator.w": (1,), "critic.w": (2,)}


def test_states_deeper_down(tmp_path):
    state = {"w": torch.ones(1)}
    path = saved(tmp_path, {"model": {"encoder": state, "decoder": {"a": state, "b": {"c": state}}, "size": 3}})
    source = TorchSource(path)
    assert source.taken == "model"
    assert list(source) == ["encoder.w", "decoder.a.w", "decoder.b.c.w"]


def test_numbers_beside_tensors_are_left(tmp_path):
    source = TorchSource(saved(tmp_path, {"w": torch.ones(1), "epoch": 3, "name": "net", "scale": numpy.float32(2)}))
    assert list(source) == ["w"]
    assert source.left == ["epoch", "name", "scale"]


def test_extra_state(tmp_path):
    value = {"steps": 3, "scale": torch.ones(2), "kinds": [torch.float16, (1, None)]}
    source = TorchSource(saved(tmp_path, {"a": torch.ones(1), "net._extra_state": value, "b": torch.ones(1)}))
    extra = source.notes.extra["net._extra_state"]
    assert extra["scale"].tolist() == [1, 1]
    assert extra["kinds"] == [torch.float16, (1, None)]
    assert source.keys_in_order == ["a", "net._extra_state", "b"]


def test_bytes_in_extra_state(tmp_path):
    value = [b"", b"x\xff", bytearray(), bytearray(b"x\xff")]
    source = TorchSource(saved(tmp_path, {"w": torch.ones(1), "_extra_state": value}))
    extra = source.notes.extra["_extra_state"]
    assert list(map(repr, extra)) == list(map(repr, value))


# What is not a state


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(1), r"it holds a tensor, not a state_dict: use torch\.load"),
        ([torch.ones(1)], "it holds a list, not a state_dict"),
        (3, "it holds the number 3, not a state_dict"),
        ({"epoch": 3, "lr": 0.1}, "there is no state_dict in it. It holds: epoch 3, lr 0\\.1"),
        ({0: torch.ones(1)}, "not a state_dict"),
        ({"w": torch.ones(2).to_sparse()}, r"w is a sparse tensor: only torch\.load"),
        ({"w": torch.empty(2, device="meta")}, "w is a tensor on meta, without values"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_no_state(tmp_path, value, message):
    path = saved(tmp_path, value)
    with pytest.raises(FormatError, match=message):
        TorchSource(path)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_quantised_tensor(tmp_path):
    path = saved(tmp_path, {"v": torch.ones(1), "w": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)})
    assert list(TorchSource(path)) == ["v"]
    with pytest.raises(FormatError, match="w is a quantised tensor"):
        read_state(path)


def test_the_state_of_a_whole_model(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model.register_buffer("passing", torch.ones(1), persistent=False)
    path = saved(tmp_path, model)
    assert list(TorchSource(path)) == list(model.state_dict())
    assert torch.equal(TorchSource(path).read("0.weight"), model[0].weight)
    path = saved(tmp_path, {"epoch": 1, "model": model})
    assert list(TorchSource(path)) == list(model.state_dict())
    assert TorchSource(path).taken == "model"


@pytest.mark.parametrize(
    "evil",
    [
        lambda mark: Evil(os.system, f"touch {mark}"),
        lambda mark: Evil(eval, f"open({str(mark)!r}, 'w')"),
        lambda mark: Evil(getattr, Config, "__init__"),
        lambda mark: Evil(subprocess.run, ["touch", str(mark)]),
        lambda mark: Evil(torch.hub.load, "owner/repository", "model"),
        lambda mark: Evil(torch.load, str(mark)),
        lambda mark: Evil(functools.partial, os.system, f"touch {mark}"),
        lambda mark: Evil(io.open, str(mark), "w"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
def test_a_hostile_pickle_does_not_run(tmp_path, evil, options):
    mark = tmp_path / "it_ran"
    for value in (
        evil(mark),
        {"w": torch.ones(1), "x": evil(mark)},
        {"state_dict": {"w": torch.ones(1)}, "x": evil(mark)},
    ):
        path = saved(tmp_path, value, **options)
        with pytest.raises(TrustError, match=r"file\.pt: refused: opening it would run .*\. Nothing ran\."):
            TorchSource(path)
        with pytest.raises(TrustError, match="would run"):
            load_state(nn.Linear(1, 1), path)
    assert not mark.exists()


def test_an_object_for_a_weight(tmp_path):
    path = saved(tmp_path, {"w": torch.ones(1), "x": Config()})
    with pytest.raises(TrustError, match=r"x is not a tensor but .*Config\. Nothing ran\. If you trust"):
        TorchSource(path)
    path = saved(tmp_path, {"w": torch.ones(1), "x._extra_state": Config()})
    with pytest.raises(TrustError, match=r"x._extra_state holds .*Config"):
        TorchSource(path)


# Bombs: small files that would take for ever, or all the memory


def doubled(leaf, times=200):
    """Each tuple holds the one before it twice: a few bytes, and 2**200 leaves when written out."""
    for _ in range(times):
        leaf = (leaf, leaf)
    return leaf


def test_extra_state_that_unfolds_for_ever(tmp_path):
    path = saved(tmp_path, {"w": torch.ones(1), "_extra_state": doubled(1, 60)})
    extra = TorchSource(path).notes.extra["_extra_state"]
    assert extra[0] is extra[1]
    path = saved(tmp_path, {"w": torch.ones(1), "_extra_state": doubled(1)})
    with pytest.raises(FormatError, match="_extra_state holds containers inside one another without an end"):
        TorchSource(path)


def test_values_that_would_print_for_ever(tmp_path):
    pile = doubled(Evil(print, 1))
    path = saved(tmp_path, {"w": torch.ones(1), "x": pile})
    with pytest.raises(TrustError, match=r"would run builtins\.print"):
        TorchSource(path)
    path = saved(tmp_path, doubled(1))
    with pytest.raises(FormatError, match="it holds a tuple, not a state_dict"):
        TorchSource(path)


def test_a_checkpoint_inside_itself(tmp_path):
    state = {"w": torch.ones(1)}
    state["model"] = state
    path = saved(tmp_path, state)
    source = TorchSource(path)
    assert list(source) == ["w"]


def test_a_tensor_of_nothing_but_repetition(tmp_path):
    path = saved(tmp_path, {"w": torch.ones(1).expand(1 << 40)})
    with pytest.raises(FormatError, match=r"a tensor of shape \(1099511627776,\) is to be made of only 1 element by"):
        TorchSource(path)


class TestParts:
    def both(self, tmp_path):
        state, average = nn.Linear(2, 2).state_dict(), {"module.weight": torch.ones(2, 2), "n": torch.tensor(3)}
        return saved(tmp_path, {"model": {"state": state, "a.b": average}, "hparams": argparse.Namespace(lr=1), "n": 3})

    @pytest.mark.parametrize(
        ("part", "keys"),
        [
            (None, ["weight", "bias"]),
            ("model", ["weight", "bias"]),
            ("model.state", ["weight", "bias"]),
            ("model.a.b", ["module.weight", "n"]),
        ],
    )
    def test_a_state_by_its_name(self, tmp_path, part, keys):
        state = read_state(self.both(tmp_path), part=part)
        assert [key.removeprefix("state.") for key in state if not key.startswith("a.b.")] == keys
        assert state.source.taken == (part or "model")

    @pytest.mark.parametrize(
        ("part", "message"),
        [
            ("ema", r"there is no part 'ema' in it. It holds: model, hparams, n"),
            ("model.ema", r"there is no part 'ema' in it. It holds: state, a\.b"),
            ("n", "'n' is the number 3, not weights"),
            ("n.x", r"there is no part 'x' in it. It holds: the number 3"),
        ],
    )
    def test_nothing_there(self, tmp_path, part, message):
        with pytest.raises(FormatError, match=message):
            read_state(self.both(tmp_path), part=part)

    def test_what_was_loaded_says_from_where(self, tmp_path):
        state = read_state(self.both(tmp_path), part="model.state")
        assert str(load_state(nn.Linear(2, 2), state)) == "loaded 2 of 2 keys from its 'model.state'"

    def test_tensors_deeper_in_a_part(self, tmp_path):
        moments = {"exp_avg": torch.ones(3)}
        path = saved(tmp_path, {"model": {"w": torch.ones(2)}, "optimizer": {"state": {0: moments}, "lr": [0.1]}})
        state = read_state(path, part="optimizer")
        assert list(state) == ["state.0.exp_avg"]
        assert dict(state.source.plain) == {"lr.0": 0.1}

    def test_a_part_that_unfolds_without_an_end(self, tmp_path):
        shared = [torch.ones(1)]
        for _ in range(60):
            shared = [shared, shared]
        path = saved(tmp_path, {"model": {"w": torch.ones(2)}, "optimizer": {"state": shared}})
        assert len(read_state(path, part="optimizer")) == 1
        for _ in range(60):
            shared = [shared]
        path = saved(tmp_path, {"model": {"w": torch.ones(2)}, "optimizer": {"state": shared}})
        with pytest.raises(FormatError, match=r"state\.0\.0 holds containers inside one another without an end"):
            read_state(path, part="optimizer")

    def test_other_formats_have_no_parts(self, tmp_path):
        save_state(nn.Linear(2, 2), tmp_path / "x.safetensors")
        with pytest.raises(FormatError, match="has one state and no parts: leave the part out"):
            read_state(tmp_path / "x.safetensors", part="ema")


def test_tensors_outside_of_the_state_are_never_left_out_in_silence(tmp_path):
    state = {"weight": torch.ones(2, 2), "packed": (torch.ones(3), 0.5)}
    torch.save(state, tmp_path / "a.pt")
    with TorchSource(tmp_path / "a.pt") as source:
        assert source.left_tensors == ["packed"]
    assert "packed" in str(summary(tmp_path / "a.pt"))
    with pytest.raises(SaveError, match=r'tensors outside of the state, in packed; nothing was written.*only="\*\*"'):
        convert(tmp_path / "a.pt", tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()
    assert convert(tmp_path / "a.pt", tmp_path / "b.safetensors", only="**").left == ("packed",)
    torch.save({**state, "packed": (torch.zeros(3), 0.5)}, tmp_path / "c.pt")
    found = diff(tmp_path / "a.pt", tmp_path / "c.pt")
    assert found
    assert "packed" in str(found)
    assert not found.to_dict()["same"]


def test_optimizers_and_losses_beside_the_state_are_no_weights(tmp_path):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    run = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "loss": torch.tensor(0.5), "epoch": 3}
    torch.save(run, tmp_path / "a.pt")
    with TorchSource(tmp_path / "a.pt") as source:
        assert source.left_tensors == ["optimizer"]
    assert convert(tmp_path / "a.pt", tmp_path / "b.safetensors").left == ("optimizer", "loss", "epoch")
    assert diff(tmp_path / "a.pt", tmp_path / "b.safetensors").left == ("optimizer",)
