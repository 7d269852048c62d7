"""A run as one file: all of it comes back, or nothing changes."""

import collections
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import textwrap
from typing import NamedTuple

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from modsurg import load_checkpoint, read_state, resize, save_checkpoint, verify
from modsurg.checkpoints.formats.derived import DerivedSource
from modsurg.checkpoints.formats.json_codec import decode, encode
from modsurg.checkpoints.formats.registry import open_source, write_source
from modsurg.errors import FormatError, LoadError, SaveError

OPTIMIZERS = [
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True),
    lambda p: torch.optim.Adagrad(p, lr=0.01),
    lambda p: torch.optim.Rprop(p),
    lambda p: torch.optim.Adafactor(p),
]
SCHEDULES = [
    lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 4]),
    lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2, cycle_momentum=False),
    lambda o: torch.optim.lr_scheduler.SequentialLR(
        o, [torch.optim.lr_scheduler.LinearLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    lambda o: torch.optim.lr_scheduler.ChainedScheduler(
        [torch.optim.lr_scheduler.ConstantLR(o), torch.optim.lr_scheduler.StepLR(o, 2)]
    ),
    lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
]


def network():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))


def advance(model, optimizer, scheduler=None, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 1, 4, 4)).square().sum().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_every_optimizer_goes_on_bit_for_bit(tmp_path, make):
    torch.manual_seed(0)  # some beginnings run off to nan, which equals nothing
    path = tmp_path / "run.safetensors"
    model = network()
    optimizer = make(model.parameters())
    advance(model, optimizer)
    save_checkpoint(path, step=3, model=model, optimizer=optimizer)
    advance(model, optimizer)
    other = network()
    again = make(other.parameters())
    assert load_checkpoint(path, model=other, optimizer=again) == 3
    advance(other, again)
    assert same(model, other)


@pytest.mark.parametrize("make", SCHEDULES)
def test_every_scheduler_goes_on(tmp_path, make):
    def build():
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return model, optimizer, make(optimizer)

    model, optimizer, scheduler = build()
    advance(model, optimizer, scheduler)
    save_checkpoint(tmp_path / "run.safetensors", model=model, optimizer=optimizer, scheduler=scheduler)
    other, again, resumed = build()
    load_checkpoint(tmp_path / "run.safetensors", model=other, optimizer=again, scheduler=resumed)
    for _ in range(6):
        assert again.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
        advance(model, optimizer, scheduler, 1)
        advance(other, again, resumed, 1)


def test_random_states_and_plain_data_come_back(tmp_path):
    numpy = pytest.importorskip("numpy")
    path = tmp_path / "run.safetensors"
    data = {"at": 4, "names": ("a", {1, 2}), "inf": float("inf"), 3: torch.arange(3), "bytes": b"\0x"}
    save_checkpoint(path, data=data)
    drawn = (random.random(), numpy.random.rand(), torch.rand(2))
    target = {"old": 1}
    load_checkpoint(path, data=target)
    assert (random.random(), numpy.random.rand()) == drawn[:2]
    assert torch.equal(torch.rand(2), drawn[2])
    assert torch.equal(target.pop(3), torch.arange(3))
    assert target == {"at": 4, "names": ("a", {1, 2}), "inf": float("inf"), "bytes": b"\0x"}


def test_optimizer_state_is_matched_by_name(tmp_path):
    path = tmp_path / "run.safetensors"
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    advance(model, optimizer)
    save_checkpoint(path, model=model, optimizer=optimizer)
    other = network()
    backwards = torch.optim.Adam(list(other.parameters())[::-1])
    load_checkpoint(path, model=other, optimizer=backwards)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(optimizer.state[mine]["exp_avg"], backwards.state[theirs]["exp_avg"])


def test_states_lie_in_memory_as_their_parameters(tmp_path):
    model = network()
    model[0].to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters())
    advance(model, optimizer)
    save_checkpoint(tmp_path / "run.safetensors", model=model, optimizer=optimizer)
    load_checkpoint(tmp_path / "run.safetensors", model=model, optimizer=optimizer)
    assert optimizer.state[model[0].weight]["exp_avg"].stride() == model[0].weight.stride()


def test_the_weights_in_it_are_an_ordinary_state_without_pickle(tmp_path):
    model = network()
    save_checkpoint(tmp_path / "run.safetensors", model=model)
    assert torch.equal(read_state(tmp_path / "run.safetensors")["model.3.weight"], model[3].weight)
    assert pickle.dumps(model.state_dict())[:2] not in (tmp_path / "run.safetensors").read_bytes()[:400]
    assert verify(tmp_path / "run.safetensors")


def test_a_compiled_model_and_a_plain_one_are_the_same_to_it(tmp_path):
    model = network()
    save_checkpoint(tmp_path / "run.safetensors", model=torch.compile(model))
    other = network()
    load_checkpoint(tmp_path / "run.safetensors", model=other)
    assert same(model, other)


class TestRefusals:
    @pytest.fixture
    def run(self, tmp_path):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        advance(model, optimizer, scheduler)
        path = tmp_path / "run.safetensors"
        save_checkpoint(path, model=model, optimizer=optimizer, scheduler=scheduler, note={"a": 1})
        return path, model, optimizer, scheduler

    def unchanged(self, path, message, **stateful):
        model, note = stateful["model"], {"mine": 1}
        before = {key: value.clone() for key, value in model.state_dict().items()}
        drawn = torch.get_rng_state()
        with pytest.raises(LoadError, match=message):
            load_checkpoint(path, note=note, **stateful)
        assert note == {"mine": 1}
        assert torch.equal(torch.get_rng_state(), drawn)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    def test_another_class_of_optimizer_or_scheduler(self, run):
        model = network()
        self.unchanged(
            run[0],
            r"optimizer  file torch.optim.sgd.SGD, here torch.optim.adam.Adam: make it of the same class",
            model=model,
            optimizer=torch.optim.Adam(model.parameters()),
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        self.unchanged(
            run[0],
            "scheduler  file .*StepLR, here .*ExponentialLR",
            model=model,
            optimizer=optimizer,
            scheduler=torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
        )

    def test_another_model(self, run):
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3), nn.Linear(3, 3))
        self.unchanged(run[0], r"nothing was loaded.\n  model.3.weight  file \(2, 16\), here \(3, 16\)", model=model)
        self.unchanged(run[0], r"model.4.weight  not in the file", model=model)
        self.unchanged(run[0], "model.0.weight  file torch.float32, here torch.float64", model=network().double())

    def test_a_layer_of_another_size_gets_the_line_that_resizes_it(self, tmp_path):
        def language(words, width):
            model = nn.Sequential(nn.Embedding(words, width), nn.LayerNorm(width), nn.Linear(width, words))
            return model, torch.optim.SGD(model.parameters(), lr=0.1)

        model, optimizer = language(12, 4)
        save_checkpoint(tmp_path / "run.safetensors", net=model, optimizer=optimizer)
        fresh, optimizer = language(10, 4)
        text = (
            r"here \(10, 4\): first resize\(net, \"0\", num_embeddings=12\)\n"
            r"  net.2.weight  .*: first resize\(net, \"2\", out_features=12\)\n  net.2.bias .*here \(10,\)$"
        )
        with pytest.raises(LoadError, match=text):
            load_checkpoint(tmp_path / "run.safetensors", net=fresh, optimizer=optimizer)
        resize(fresh, "0", num_embeddings=12, optimizer=optimizer)
        resize(fresh, "2", out_features=12, optimizer=optimizer)
        load_checkpoint(tmp_path / "run.safetensors", net=fresh, optimizer=optimizer)
        assert same(model, fresh)
        with pytest.raises(LoadError, match=r'resize\(net, "2", out_features=12, in_features=4\)'):
            load_checkpoint(tmp_path / "run.safetensors", net=language(11, 5)[0])

    def test_a_layer_that_has_no_such_line(self, tmp_path):
        save_checkpoint(tmp_path / "run.safetensors", model=nn.Sequential(nn.Conv2d(1, 4, 3)))
        text = (
            r"\(2, 1, 3, 3\): build it with the arguments of the saved one\n  model.0.bias  file \(4,\), here \(2,\)$"
        )
        with pytest.raises(LoadError, match=text):
            load_checkpoint(tmp_path / "run.safetensors", model=nn.Sequential(nn.Conv2d(1, 2, 3)))

    def test_other_parameters_in_the_optimizer(self, run):
        model = network()
        optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.9)
        self.unchanged(
            run[0], "group 0 of the file has model.1.weight, here it has not", model=model, optimizer=optimizer
        )
        groups = [{"params": model[0].parameters()}, {"params": model[3].parameters()}]
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        self.unchanged(run[0], "file 1 parameter group, here 2", model=model, optimizer=optimizer)

    def test_what_fails_late_is_taken_back(self, run):
        class Stubborn(nn.Module):
            def state_dict(self, *args, **kwargs):
                return {}

        class Failing:
            def state_dict(self):
                return {"a": 1}

            def load_state_dict(self, state):
                if state != {"a": 1}:
                    raise RuntimeError("no")

        path = run[0].with_name("other.safetensors")
        failing = Failing()
        failing.state_dict = lambda: {"a": 2}
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        save_checkpoint(path, optimizer=optimizer, failing=failing)
        optimizer.param_groups[0]["lr"] = 7.0
        with pytest.raises(LoadError, match=r"loading failing failed \(RuntimeError\('no'\)\); nothing was loaded"):
            load_checkpoint(path, optimizer=optimizer, failing=Failing())
        assert optimizer.param_groups[0]["lr"] == 7.0

    def test_who_does_not_take_the_old_state_either_is_named(self, run):
        class Broken:
            def state_dict(self):
                return {"a": 1}

            def load_state_dict(self, state):
                raise KeyError("a")

        path = run[0].with_name("other.safetensors")
        note = {"mine": 1}
        save_checkpoint(path, note={"mine": 2}, broken=Broken())
        with pytest.raises(LoadError, match=r"loading broken failed.*; broken could not get its old state back"):
            load_checkpoint(path, note=note, broken=Broken())
        assert note == {"mine": 1}

    def test_an_optimizer_without_its_model(self, run):
        optimizer = torch.optim.SGD(network().parameters(), lr=0.1, momentum=0.9)
        with pytest.raises(LoadError, match=r"optimizer  file has its parameters by the names of their model: pass"):
            load_checkpoint(run[0], optimizer=optimizer)

    def test_a_name_that_the_file_has_not(self, run):
        with pytest.raises(LoadError, match="holds model, optimizer, scheduler, note, and no scaler; nothing was"):
            load_checkpoint(run[0], scaler=torch.GradScaler("cpu"))

    def test_files_that_are_no_runs(self, tmp_path, run):
        from modsurg import save_state

        save_state(network(), tmp_path / "state.safetensors")
        with pytest.raises(FormatError, match=r"holds no run, only a state: load_state\(model,"):
            load_checkpoint(tmp_path / "state.safetensors")
        data = run[0].read_bytes()
        run[0].write_bytes(data[: len(data) // 2])
        with pytest.raises(FormatError, match=r"run.safetensors"):
            load_checkpoint(run[0])

    @pytest.mark.parametrize(
        ("place", "value"),
        [
            (("step",), "3"),
            (("classes",), {}),
            (("states",), []),
            (("random", "python"), [3, "x", None]),
            (("random", "torch"), {"$tensor": "model.0.weight"}),
            (("random", "numpy"), 3),
            (("random",), {}),
            (("states", "optimizer", "groups"), [{}]),
            (("states", "optimizer"), 3),
            (("states", "model"), None),
            (("states", "model"), {"x": {"$device": "nowhere"}}),
            (("states", "model"), {"x": {"$float": 10**400}}),
            (("states", "model"), {"x": {"$numpy": ["random.torch", "V1000000000000"]}}),
        ],
    )
    def test_a_damaged_run_changes_nothing(self, tmp_path, run, place, value):
        path = tmp_path / "damaged.safetensors"
        with open_source(run[0]) as source:
            data = json.loads(source.notes.metadata["modsurg.run"])
            inner = data
            for part in place[:-1]:
                inner = inner[part]
            inner[place[-1]] = value
            write_source(path, DerivedSource(source, metadata={"modsurg.run": json.dumps(data)}))
        model, before = network(), torch.get_rng_state()
        kept = {key: value.clone() for key, value in model.state_dict().items()}
        optimizer = torch.optim.SGD(model.parameters(), lr=7.0, momentum=0.9)
        with pytest.raises((FormatError, LoadError), match=r"damaged\.safetensors"):
            load_checkpoint(path, model=model, optimizer=optimizer)
        assert all(torch.equal(kept[key], value) for key, value in model.state_dict().items())
        assert optimizer.param_groups[0]["lr"] == 7.0
        assert torch.equal(torch.get_rng_state(), before)

    def test_what_cannot_be_kept_leaves_the_old_file(self, run):
        before = run[0].read_bytes()
        with pytest.raises(SaveError, match=r"thing.a.1 is a builtins.object, which can't be kept without pickle"):
            save_checkpoint(run[0], thing={"a": [1, object()]})
        with pytest.raises(SaveError, match="thing is a builtins.int without state_dict"):
            save_checkpoint(run[0], thing=3)
        with pytest.raises(SaveError, match=r"step=1\.5: give a whole number"):
            save_checkpoint(run[0], step=1.5)
        assert run[0].read_bytes() == before


def test_a_step_may_be_a_number_of_numpy_or_torch(tmp_path):
    for step in (numpy.int64(3), torch.tensor(3)):
        save_checkpoint(tmp_path / "run.safetensors", step=step)
        assert load_checkpoint(tmp_path / "run.safetensors") == 3


def test_a_state_in_a_finer_dtype_than_its_parameter_is_not_rounded(tmp_path):
    """As optimizers with master weights keep it; torch's own `load_state_dict` rounds."""
    layers = [nn.Linear(3, 3, dtype=torch.bfloat16) for _ in range(2)]
    first, second = [torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9) for layer in layers]
    for parameter in layers[0].parameters():
        first.state[parameter]["master"] = torch.rand(parameter.shape)
    save_checkpoint(tmp_path / "run.safetensors", model=layers[0], optimizer=first)
    load_checkpoint(tmp_path / "run.safetensors", model=layers[1], optimizer=second)
    assert torch.equal(second.state[layers[1].weight]["master"], first.state[layers[0].weight]["master"])


def test_a_state_that_is_none_is_given_back(tmp_path):
    class Counter:
        def state_dict(self):
            return None

        def load_state_dict(self, state):
            self.got = state

    save_checkpoint(tmp_path / "run.safetensors", counter=Counter())
    counter = Counter()
    load_checkpoint(tmp_path / "run.safetensors", counter=counter)
    assert counter.got is None


def test_queues_and_frozen_sets_keep_their_kind():
    back = decode(encode([collections.deque([1, 2], 4), frozenset({1})], "x", {}), {})
    assert back == [collections.deque([1, 2], 4), frozenset({1})]
    assert back[0].maxlen == 4
    assert type(back[1]) is frozenset


def test_a_kill_leaves_a_file_that_opens(tmp_path):
    script = textwrap.dedent("""
        import sys, torch
        from modsurg import save_checkpoint
        data = {"big": torch.zeros(1_000_000)}
        save_checkpoint(sys.argv[1], step=0, data=data)
        print("go", flush=True)
        step = 0
        while True:
            step += 1
            save_checkpoint(sys.argv[1], step=step, data=data)
    """)
    path = tmp_path / "run.safetensors"
    for wait in (3, 11):
        process = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE)
        process.stdout.readline()
        seen = path.stat().st_ino
        while wait:
            if path.stat().st_ino != seen:
                seen, wait = path.stat().st_ino, wait - 1
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert load_checkpoint(path, data={}) > 0
    save_checkpoint(path)
    assert list(tmp_path.iterdir()) == [path]


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.complex_numbers(allow_nan=False),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(plain)
def test_plain_data_survives(value):
    assert decode(encode(value, "x", {}), {}) == value


class Versioned(nn.Linear):
    """Loads by the version of its state, as torchvision's MNASNet does."""

    _version = 2

    def _load_from_state_dict(self, state, prefix, local_metadata, *rest):
        if local_metadata.get("version") != 2:
            raise ValueError(f"version {local_metadata.get('version')}")
        super()._load_from_state_dict(state, prefix, local_metadata, *rest)


def test_the_versions_of_modules_are_kept(tmp_path):
    for make in (lambda: Versioned(2, 2), lambda: nn.Sequential(nn.ReLU(), Versioned(2, 2))):
        model, other = make(), make()  # at the root, and below it
        save_checkpoint(tmp_path / "run.safetensors", model=model)
        load_checkpoint(tmp_path / "run.safetensors", model=other)
        assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))


def test_kinds_of_dicts_and_tuples_come_back_plain(tmp_path):
    class Pair(NamedTuple):
        a: int
        b: int

    kept = {
        "o": collections.OrderedDict(a=1),
        "d": collections.defaultdict(list, a=[1]),
        "p": Pair(1, 2),
        "n": numpy.str_("x"),
    }
    notes = {}
    load_checkpoint(save_checkpoint(tmp_path / "run.safetensors", notes=kept), notes=notes)
    assert repr(notes) == repr({"o": {"a": 1}, "d": {"a": [1]}, "p": (1, 2), "n": "x"})


def test_arrays_of_the_other_byte_order(tmp_path):
    kept = {"row": numpy.arange(3, dtype=">f4"), "turned": numpy.arange(6, dtype="<i8").reshape(2, 3)[::-1]}
    notes = {}
    load_checkpoint(save_checkpoint(tmp_path / "run.safetensors", notes=kept), notes=notes)
    assert repr(notes) == repr(kept)
    assert notes["row"].dtype == ">f4"


def _endless():
    value = {}
    value["me"] = [value]
    return value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (_endless(), "notes holds itself, or containers inside one another without an end"),
        ({"x": numpy.longdouble(1)}, r"notes\.x is a numpy\.longdouble, which can't be kept"),
        ({"x": numpy.ones(2, numpy.longdouble)}, r"notes\.x is a numpy\.ndarray, which can't be kept"),
        ({"x": numpy.datetime64("2020-01-01")}, r"notes\.x is a numpy\.datetime64, which can't be kept"),
        ({"x": numpy.array("a")}, r"notes\.x is a numpy\.ndarray, which can't be kept"),
        ({"x": numpy.ma.array([1, 2], mask=[0, 1])}, r"notes\.x is a numpy\.ma\.\S+, which can't be kept"),
    ],
)
def test_what_is_no_plain_data(tmp_path, value, message):
    with pytest.raises(SaveError, match=message):
        save_checkpoint(tmp_path / "run.safetensors", notes=value)
    assert os.listdir(tmp_path) == []


def test_a_lazy_model_is_refused_by_name(tmp_path):
    with pytest.raises(SaveError, match=r"model\.weight is not initialised yet: run the model once"):
        save_checkpoint(tmp_path / "run.safetensors", model=nn.LazyLinear(2))


def test_a_kind_of_list_comes_back_as_a_list(tmp_path):
    class Rows(list):
        pass

    save_checkpoint(tmp_path / "run.safetensors", notes={"rows": Rows([1])})
    notes = {}
    load_checkpoint(tmp_path / "run.safetensors", notes=notes)
    assert notes == {"rows": [1]}
