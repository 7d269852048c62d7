import collections
import datetime
import decimal
import fractions
import functools
import logging
import os
import re
import threading
import types
import zipfile
from pathlib import Path

import numpy
import pytest
import torch
import torchvision
from blueprints import Net
from torch import nn
from torch.nn.utils import parametrizations

from modsurg import load_model, save_model
from modsurg.checkpoints.pickled import read_tree
from modsurg.errors import FormatError, SaveError, TrustError
from modsurg.structure.build import describe
from modsurg.structure.schema import outline

RAN = []


class Evil:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def record(*args):
    RAN.append(args)


def hostile(path, function, *args):
    model = nn.Linear(2, 2)
    model.extra = Evil(function, *args)
    torch.save(model, path)
    return path


@pytest.mark.parametrize(
    "function, args, name",
    [
        (os.system, ("touch ran",), r"posix\.system"),
        (eval, ("1",), r"builtins\.eval"),
        (exec, ("import os",), r"builtins\.exec"),
        (getattr, (nn.ReLU(), "forward"), r"builtins\.getattr"),
        (__import__, ("os",), r"builtins\.__import__"),
        (open, ("ran", "w"), r"io\.open"),
        (bytearray, (10**12,), r"bytearray"),
        (torch.hub.load, ("a/b", "c"), r"torch\.hub\.load"),
        (torch.load, ("x",), r"torch\.serialization\.load"),
        (torch.Tensor, (10**12,), r"torch\.Tensor"),
        (torchvision.models.resnet18, (), r"torchvision\.models\.resnet\.resnet18"),
        (nn.Linear, (10**6, 10**6), r"torch\.nn\.modules\.linear\.Linear"),
        (nn.functional.relu, (torch.ones(2),), r"torch\.nn\.functional\.relu"),
        (functools.partial, (os.system, "touch ran"), r"posix\.system"),
        (functools.reduce, (max, [1]), r"functools\.reduce"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_hostile_pickle_never_runs(tmp_path, monkeypatch, function, args, name):
    monkeypatch.chdir(tmp_path)
    hostile("m.pt", function, *args)
    with pytest.raises(TrustError, match=name):
        load_model("m.pt")
    assert os.listdir(tmp_path) == ["m.pt"]


def test_a_trusted_package_is_not_called_either(tmp_path):
    path = hostile(tmp_path / "m.pt", record, 1)
    with pytest.raises(TrustError, match=r"test_pickled\.record is not trusted|test_pickled\.record\n"):
        load_model(path)
    with pytest.raises(TrustError, match=r"it wants to call test_pickled\.record"):
        load_model(path, trust=__name__)
    assert RAN == []


def test_what_makes_a_tensor_is_torchs_own(tmp_path):
    args = (record, torch.Tensor, (1,), {})
    path = hostile(tmp_path / "m.pt", torch._tensor._rebuild_from_type_v2, *args)
    with pytest.raises(TrustError, match=r"test_pickled\.record to make a tensor"):
        load_model(path, trust=__name__)
    assert RAN == []


def test_a_replaced_forward_is_refused(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].__dict__["forward"] = nn.functional.relu
    torch.save(model, tmp_path / "m.pt")
    with pytest.raises(TrustError, match="replaces forward of a Linear; nothing of it ran"):
        load_model(tmp_path / "m.pt")
    with pytest.raises(SaveError, match=r"0\.forward  a method replaced on this object"):
        save_model(model, tmp_path / "n.pt")


def test_a_forward_that_is_replaced_and_covered_up_is_refused(tmp_path):
    """The pickle fills the module twice; the second time hides the first."""
    torch.save(nn.Linear(2, 2), tmp_path / "m.pt")

    def fill_twice(name, data):
        at = data.find(b"\x81") + 1
        extra = b"}X\x07\x00\x00\x00forwardctorch.nn.functional\nrelu\nsb"
        return data[:at] + extra + data[at:] if name.endswith("data.pkl") else data

    rewrite(tmp_path / "m.pt", tmp_path / "n.pt", fill_twice)
    with pytest.raises(FormatError, match=r"fills <torch\.nn\.modules\.linear\.Linear> twice"):
        load_model(tmp_path / "n.pt")


def test_paths_as_python_3_13_names_them(tmp_path):
    model = nn.Sequential()
    model.source = Path("a/b")
    torch.save(model, tmp_path / "m.pt")
    for home in (b"pathlib", b"pathlib._local"):
        rewrite(
            tmp_path / "m.pt",
            tmp_path / "n.pt",
            lambda _, data, home=home: re.sub(rb"cpathlib(\._local)?\n", b"c" + home + b"\n", data),
        )
        assert load_model(tmp_path / "n.pt").source == Path("a/b")


def rewrite(source, target, change):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))


def test_everything_that_is_missing_is_listed(tmp_path):
    model = nn.Sequential(Net(), nn.Linear(2, 2))
    model.extra = record
    torch.save(model, tmp_path / "m.pt")
    with pytest.raises(TrustError) as caught:
        load_model(tmp_path / "m.pt")
    assert "2 names are not trusted" in str(caught.value)
    assert 'trust=("blueprints", "test_pickled",)' in str(caught.value)
    assert load_model(tmp_path / "m.pt", trust=("blueprints", "test_pickled")).extra is record


def test_the_list_of_the_process_is_as_it_was(tmp_path):
    torch.save(Net(), tmp_path / "m.pt")
    before = set(torch.serialization.get_safe_globals())
    torch.serialization.add_safe_globals([(Net, "blueprints.Net")])
    try:
        load_model(tmp_path / "m.pt", trust=Net)
        assert (Net, "blueprints.Net") in torch.serialization.get_safe_globals()
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(list(before))
    load_model(tmp_path / "m.pt", trust=Net)
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize("known", [[numpy.dtype], [numpy.dtypes.Float64DType]])
def test_numbers_of_numpy_in_a_process_that_allows_some_of_them(tmp_path, known):
    model = nn.ReLU()
    model.numbers = [numpy.float64(1.5), numpy.arange(3)]
    before = set(torch.serialization.get_safe_globals())
    with torch.serialization.safe_globals(known):
        save_model(model, tmp_path / "m.pt")
        back = load_model(tmp_path / "m.pt")
        assert set(torch.serialization.get_safe_globals()) == before | set(known)
    assert back.numbers[0] == 1.5
    assert back.numbers[1].tolist() == [0, 1, 2]


def test_threads_do_not_share_their_trust(tmp_path):
    for at in range(2):
        torch.save(nn.Sequential(Net(), *[nn.Linear(4, 4) for _ in range(50)]), tmp_path / f"{at}.pt")
    refused = []

    def trusting():
        for _ in range(10):
            load_model(tmp_path / "0.pt", trust=Net)

    def wary():
        for _ in range(10):
            try:
                load_model(tmp_path / "1.pt")
            except TrustError:
                refused.append(1)

    threads = [threading.Thread(target=work) for work in (trusting, wary)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 10


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda m: setattr(m, "act", m[0].extra_repr), r"it asks for builtins\.getattr\. Save it as m\.safetensors"),
        (lambda m: parametrizations.weight_norm(m[0]), r"torch can't pickle it[\s\S]*save it as m\.safetensors"),
        (lambda m: setattr(m, "act", lambda x: x), r"act  a lambda"),
        (lambda m: setattr(m, "act", torch.fx.symbolic_trace(nn.ReLU())), r"act  a torch\.fx module: save the model"),
        (lambda m: setattr(m, "extra", Evil(record)), r"it wants to call test_pickled\.record"),
    ],
)
def test_what_could_not_be_opened_again_is_not_written(tmp_path, spoil, words):
    model = nn.Sequential(nn.Linear(2, 2))
    spoil(model)
    with pytest.raises(SaveError, match=words):
        save_model(model, tmp_path / "m.pt")
    assert os.listdir(tmp_path) == []


def test_what_pickles_hold_as_a_rule(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.LSTM(2, 2))
    model.values = (slice(1, 2), range(3), frozenset("ab"), {1, 2}, 1 + 2j, b"x", b"", bytearray(b"y"), torch.float16)
    model.act = functools.partial(nn.functional.gelu, approximate="tanh")
    model.gelu = nn.functional.gelu
    model.device = torch.device("cpu")
    model.noise = torch.distributions.Normal(torch.zeros(1), torch.ones(1))
    model.index = torch.eye(2).to_sparse()
    model.more = [Path("a"), datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC), decimal.Decimal("0.1")]
    model.more += [fractions.Fraction(1, 3), types.SimpleNamespace(a=1), re.compile("a+"), logging.getLogger("a.b")]
    model.numbers = [numpy.float64(1.5), numpy.arange(3), numpy.ones((2, 2), order="F"), numpy.dtype("int8")]
    model.numbers += [numpy.bool_(True), numpy.arange(2, dtype=">i4"), numpy.array(3j)]
    model.generator = torch.Generator().manual_seed(3)
    save_model(model, tmp_path / "m.pt")
    back = load_model(tmp_path / "m.pt")
    assert back.values == model.values
    assert back.more == model.more
    assert all(map(numpy.array_equal, back.numbers, model.numbers))
    assert list(map(type, back.numbers)) == list(map(type, model.numbers))
    assert torch.equal(back.generator.get_state(), model.generator.get_state())
    assert back.act.keywords == {"approximate": "tanh"}
    assert back.gelu is nn.functional.gelu
    assert torch.equal(back.index.to_dense(), torch.eye(2))
    assert type(torch.load(tmp_path / "m.pt", weights_only=False)) is nn.Sequential


def test_containers_that_torch_would_not_fill_again(tmp_path):
    model = nn.ReLU()
    model.recent = collections.deque([1, torch.ones(2)], maxlen=3)
    model.same = [model.recent, collections.deque()]
    model.groups = collections.defaultdict(list, {"a": [1], 1j: [2]})
    model.empty = [b"", numpy.zeros((0, 3))]
    model.index = (slice(None), ...)
    save_model(model, tmp_path / "m.pt")
    for back in (load_model(tmp_path / "m.pt"), torch.load(tmp_path / "m.pt", weights_only=False)):
        assert back.recent[0] == 1
        assert torch.equal(back.recent[1], torch.ones(2))
        assert back.recent.maxlen == 3
        assert back.same == [back.recent, collections.deque()]
        assert back.same[0] is back.recent
        assert back.groups == model.groups
        assert back.groups["new"] == []
        assert back.empty[0] == b""
        assert back.empty[1].shape == (0, 3)
        assert back.index == (slice(None), ...)


def test_a_wrapper_says_what_to_save_in_its_place(tmp_path):
    script = torch.jit.script(nn.Linear(2, 2))
    with pytest.raises(SaveError, match=r"the model  a ScriptModule module: keep it with torch\.jit\.save"):
        save_model(script, tmp_path / "m.pt")
    with pytest.raises(SaveError, match=r"1  a DataParallel module: save the module inside it, \.module"):
        save_model(nn.Sequential(nn.ReLU(), nn.DataParallel(nn.ReLU())), tmp_path / "m.pt")
    assert os.listdir(tmp_path) == []


def test_functions_that_torch_pickles_by_getattr(tmp_path):
    model = nn.ReLU()
    model.act = torch.tanh
    model.merge = functools.partial(torch.add, alpha=2)
    save_model(model, tmp_path / "m.pt")
    back = load_model(tmp_path / "m.pt")
    assert back.act is torch.tanh
    assert back.merge.func is torch.add
    model.act = torch.from_file
    torch.save(model, tmp_path / "m.pt")
    with pytest.raises(TrustError, match=r"torch\.from_file"):
        load_model(tmp_path / "m.pt")
    model.act, model.more = torch.tanh, Evil(getattr, nn.ReLU, "forward")
    torch.save(model, tmp_path / "m.pt")
    with pytest.raises(TrustError, match=r"it wants to call builtins\.getattr, which is no data; nothing of it ran"):
        load_model(tmp_path / "m.pt")


class Packed(nn.Linear):
    """Says itself what a pickle has of it."""

    def __getstate__(self):
        return (self.__dict__, 1)

    def __setstate__(self, state):
        super().__setstate__(state[0])


def test_a_large_bytearray(tmp_path):
    model = nn.Sequential()
    model.table = bytearray(range(256)) * 9000
    assert load_model(save_model(model, tmp_path / "m.pt")).table == model.table


def test_keys_that_are_no_plain_text(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2))
    zone = datetime.timezone(datetime.timedelta(hours=1))
    model.labels = {model[0]: "a", zone: "b", numpy.int64(3): "c", frozenset({1, 2}): "d", (numpy.int64(3), 1): "e"}
    model.groups = {frozenset({1, 2}), frozenset("ab")}
    save_model(model, tmp_path / "m.pt")
    back = load_model(tmp_path / "m.pt")
    assert next(iter(back.labels)) is back[0]
    assert list(back.labels.values()) == list("abcde")
    assert list(back.labels)[1:] == list(model.labels)[1:]
    assert back.groups == model.groups


def test_a_module_that_says_itself_what_a_pickle_has_of_it(tmp_path):
    model = nn.Sequential(Packed(2, 2))
    save_model(model, tmp_path / "m.pt")
    back = load_model(tmp_path / "m.pt", trust=Packed)
    assert torch.equal(back[0].weight, model[0].weight)
    model[0].forward = torch.nn.functional.relu
    torch.save(model, tmp_path / "m.pt")
    with pytest.raises(TrustError, match="the file replaces forward of a Packed"):
        load_model(tmp_path / "m.pt", trust=Packed)


def test_what_torch_leaves_out_of_a_pickle_is_refused(tmp_path):
    with pytest.raises(SaveError, match=r"0 has __slots__, which torch leaves out of a pickle: save it as m\.safetens"):
        save_model(nn.Sequential(Slotted(2)), tmp_path / "m.pt")
    save_model(nn.Sequential(Slotted(2)), tmp_path / "m.safetensors")
    assert load_model(tmp_path / "m.safetensors", trust=Slotted)[0].factor == 2


class Slotted(nn.ReLU):
    __slots__ = ("factor",)

    def __init__(self, factor):
        super().__init__()
        self.factor = factor


class Rows(list):
    pass


class Table(dict):
    pass


def test_the_reason_of_torch_comes_without_its_advice(tmp_path):
    reasons = []
    for extra in (Rows([1]), Table(a=1)):  # which of them torch can't fill depends on its version
        model = nn.ReLU()
        model.extra = extra
        try:
            save_model(model, tmp_path / "m.pt")
        except SaveError as error:
            reasons.append(str(error))
    assert reasons
    told = r"torch can't open it: Can only (SETITEM|append)[^\n]*\. Save it as m\.safetensors$"
    assert all(re.search(told, reason) for reason in reasons)


def test_files_of_other_kinds(tmp_path):
    path = tmp_path / "m.pt"
    path.write_text("<html>")
    with pytest.raises(FormatError, match="HTML page"):
        load_model(path)
    torch.save(nn.Linear(2, 2), path, _use_new_zipfile_serialization=False)
    with pytest.raises(FormatError, match=r"older than 1\.6 has to be saved again"):
        load_model(path)
    torch.save(nn.Linear(2, 2).state_dict(), path)
    with pytest.raises(FormatError, match="it holds no model"):
        load_model(path)


def test_a_storage_shorter_than_the_pickle_says(tmp_path):
    torch.save(nn.Linear(4, 4), tmp_path / "m.pt")
    rewrite(tmp_path / "m.pt", tmp_path / "n.pt", lambda name, data: data[:8] if "/data/0" in name else data)
    with pytest.raises(FormatError, match="storage 0 is shorter"):
        load_model(tmp_path / "n.pt")


def test_the_tree_of_a_model_whose_classes_are_gone(tmp_path, monkeypatch):
    model = nn.Sequential(Net(a=nn.Linear(2, 3)), nn.BatchNorm1d(3), nn.ReLU())
    model[0].b = model[0].a
    torch.save(model, tmp_path / "m.pt")
    monkeypatch.delattr("blueprints.Net")
    places = list(outline(read_tree(tmp_path / "m.pt")))
    assert [(place.path, place.kind) for place in places][:3] == [
        ("", "torch.nn.modules.container.Sequential"),
        ("0", "blueprints.Net"),
        ("0.a", "torch.nn.modules.linear.Linear"),
    ]
    monkeypatch.undo()
    expected = list(outline(describe(model)))
    for place, other in zip(places, expected, strict=True):
        assert (place.path, place.kind) == (other.path, other.kind)
        assert [(t.name, t.key, t.shape, t.dtype) for t in place.tensors] == [
            (t.name, t.key, t.shape, t.dtype) for t in other.tensors
        ]
    assert places[2].attributes["in_features"] == 2
