import collections
import functools
import os
import re
import zipfile
from pathlib import Path

import pytest
import torch
import torchvision
from blueprints import Net, assert_same
from torch import nn
from torch.nn.utils import parametrizations

from modsurg import load_model, save_model
from modsurg.checkpoints.formats.torch_save.reader import TorchSource
from modsurg.errors import FormatError, SaveError, TrustError
from modsurg.structure.build import describe
from modsurg.structure.schema import outline, read_tree

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
        (getattr, (nn.ReLU(), "_call_impl"), r"no method '_call_impl'"),
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
        (functools.reduce, (max, [1]), r"builtins\.reduce"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_hostile_pickle_never_runs(tmp_path, monkeypatch, function, args, name):
    monkeypatch.chdir(tmp_path)
    hostile("m.pt", function, *args)
    with pytest.raises(TrustError, match=name):
        load_model("m.pt")
    assert os.listdir(tmp_path) == ["m.pt"]


def test_what_makes_a_tensor_is_torchs_own(tmp_path):
    args = (record, torch.Tensor, (1,), {})
    path = hostile(tmp_path / "m.pt", torch._tensor._rebuild_from_type_v2, *args)
    with pytest.raises(TrustError, match=r"extra  a call of test_pickled\.record"):
        load_model(path, trust=__name__)
    assert RAN == []


def test_a_replaced_forward_is_refused(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].__dict__["forward"] = nn.functional.relu
    torch.save(model, tmp_path / "m.pt")
    with pytest.raises(TrustError, match="replaces 'forward' of a Linear; nothing of it ran"):
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


def rewrite(source, target, change):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))


def test_a_wrapper_says_what_to_save_in_its_place(tmp_path):
    script = torch.jit.script(nn.Linear(2, 2))
    with pytest.raises(SaveError, match=r"the model  a ScriptModule module: keep it with torch\.jit\.save"):
        save_model(script, tmp_path / "m.pt")
    with pytest.raises(SaveError, match=r"1  a DataParallel module: save the module inside it, \.module"):
        save_model(nn.Sequential(nn.ReLU(), nn.DataParallel(nn.ReLU())), tmp_path / "m.pt")
    assert os.listdir(tmp_path) == []


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


def test_a_storage_shorter_than_the_pickle_says(tmp_path):
    torch.save(nn.Linear(4, 4), tmp_path / "m.pt")
    rewrite(tmp_path / "m.pt", tmp_path / "n.pt", lambda name, data: data[:8] if "/data/0" in name else data)
    with pytest.raises(FormatError, match="its storage should have 64 bytes, and the file has 8"):
        load_model(tmp_path / "n.pt")


def test_a_function_of_a_trusted_package_is_not_called(tmp_path):
    path = hostile(tmp_path / "m.pt", record, 1)
    for trust in ((), __name__, f"{__name__}.record", record):
        with pytest.raises(TrustError, match=r"extra  a call of test_pickled\.record"):
            load_model(path, trust=trust)
    assert RAN == []


def test_everything_that_is_missing_is_listed(tmp_path):
    model = nn.Sequential(Net(), nn.Linear(2, 2))
    model.extra = record
    torch.save(model, tmp_path / "m.pt")
    with pytest.raises(TrustError) as caught:
        load_model(tmp_path / "m.pt")
    assert "2 names are not trusted" in str(caught.value)
    assert load_model(tmp_path / "m.pt", trust=("blueprints", record)).extra is record


def test_a_function_of_a_trusted_package_is_named_by_itself(tmp_path):
    model = nn.ReLU()
    model.extra = record
    torch.save(model, tmp_path / "m.pt")
    with pytest.raises(TrustError, match=r"test_pickled\.record"):
        load_model(tmp_path / "m.pt", trust=__name__)
    assert load_model(tmp_path / "m.pt", trust=f"{__name__}.record").extra is record


def test_neither_torch_load_nor_its_list_is_used(tmp_path, monkeypatch):
    torch.save(nn.Sequential(Net(), nn.LSTM(2, 2)), tmp_path / "m.pt")
    before = set(torch.serialization.get_safe_globals())
    monkeypatch.setattr(torch, "load", None)
    monkeypatch.setattr(torch.serialization, "add_safe_globals", None)
    assert isinstance(load_model(tmp_path / "m.pt", trust=Net)[0], Net)
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda m: parametrizations.weight_norm(m[0]), r"torch can't pickle it[\s\S]*save it as m\.safetensors"),
        (lambda m: setattr(m, "act", lambda x: x), r"act  a lambda"),
        (lambda m: setattr(m, "act", torch.fx.symbolic_trace(nn.ReLU())), r"act  a torch\.fx module: save the model"),
        (
            lambda m: setattr(m, "extra", Evil(record)),
            r"extra  a Evil that holds <function record|extra  a call of test_pickled\.record",
        ),
        (lambda m: setattr(m, "act", m[0].extra_repr), r"act  Linear\.extra_repr"),
        (lambda m: setattr(m, "source", Path("a")), r"source  a pathlib\.PosixPath"),
        (lambda m: setattr(m, "pattern", re.compile("a+")), r"pattern  a re\.Pattern"),
        (lambda m: m.register_forward_hook(record), r"Sequential  a hook \(forward hook\)"),
    ],
)
def test_what_could_not_be_opened_again_is_not_written(tmp_path, spoil, words):
    for suffix in (".pt", ".safetensors"):
        model = nn.Sequential(nn.Linear(2, 2))
        spoil(model)
        if suffix == ".safetensors" and "pickle" in words:
            continue
        with pytest.raises(SaveError, match=words):
            save_model(model, tmp_path / f"m{suffix}")
    assert os.listdir(tmp_path) == []


def test_values_come_back(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.LSTM(2, 2))
    model.values = ({1, 2}, 1 + 2j, b"x", b"", torch.float16, torch.Size([2, 3]), float("inf"), (1, (2, None)))
    model.act = functools.partial(nn.functional.gelu, approximate="tanh")
    model.gelu, model.tanh, model.merge = nn.functional.gelu, torch.tanh, functools.partial(torch.add, alpha=2)
    model.device = torch.device("cuda", 1)
    model.recent = collections.deque([1, torch.ones(2)], maxlen=3)
    model.same = [model.recent, collections.deque()]
    model.groups = collections.defaultdict(list, {"a": [1], 2: [2]})
    model.order = collections.OrderedDict(b=1, a=2)
    model.norm_layer, model.other = nn.BatchNorm2d, model[0]
    model.point = Point(1, [2])
    model.config = Config(3, sizes=[1, 2])
    save_model(model, tmp_path / "m.pt")
    back = load_model(tmp_path / "m.pt", trust=(Point, Config))
    for name in ("values", "gelu", "tanh", "device", "groups", "order", "norm_layer", "point"):
        assert getattr(back, name) == getattr(model, name), name
        assert type(getattr(back, name)) is type(getattr(model, name)), name
    assert back.act.keywords == {"approximate": "tanh"}
    assert back.merge.func is torch.add
    assert back.groups["new"] == []
    assert torch.equal(back.recent[1], torch.ones(2))
    assert back.recent.maxlen == 3
    assert back.same[0] is back.recent
    assert back.other is back[0]
    assert vars(back.config) == vars(model.config)
    x = torch.ones(1, 2)
    assert torch.equal(back[1](x)[0], model[1](x)[0])
    assert_same(back, model)
    assert type(torch.load(tmp_path / "m.pt", weights_only=False)) is nn.Sequential


class Point(collections.namedtuple("Point", "x y")):
    pass


class Config:
    def __init__(self, depth, **more):
        self.depth = depth
        self.__dict__.update(more)


def test_tied_and_overlapping_tensors_stay_so(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    model[1].weight = model[0].weight
    model.rows = model[0].weight.detach()[1:]
    model[2].register_buffer("mask", torch.ones(2), persistent=False)
    model[0].bias.requires_grad_(False)
    model[0].bias.tag = "head"
    back = load_model(save_model(model, tmp_path / "m.pt"))
    assert back[1].weight is back[0].weight
    back[0].weight.data[1, 0] = 7
    assert back.rows[0, 0] == 7
    assert torch.equal(back[2].mask, torch.ones(2))
    assert "2.mask" not in back.state_dict()
    assert back[0].bias.tag == "head"
    assert not back[0].bias.requires_grad
    assert_same(back[2], model[2])


def test_changing_the_model_does_not_change_the_file(tmp_path):
    model = nn.Linear(64, 64)
    path = save_model(model, tmp_path / "m.pt")
    before = path.read_bytes()
    load_model(path).weight.data.zero_()
    assert path.read_bytes() == before


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.*deprecated:FutureWarning")
def test_norms_by_hooks(tmp_path):
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(2, 3)), nn.utils.spectral_norm(nn.Linear(3, 2)))
    model(torch.ones(1, 2))
    model.eval()
    back = load_model(save_model(model, tmp_path / "m.pt"))
    assert torch.equal(back(torch.ones(1, 2)), model(torch.ones(1, 2)))
    back[0].weight_g.data *= 2
    assert not torch.equal(back(torch.ones(1, 2)), model(torch.ones(1, 2)))


def test_another_hook_is_refused(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].register_forward_pre_hook(record)
    torch.save(model, tmp_path / "m.pt")
    with pytest.raises(TrustError, match=r"0  a hook, test_pickled\.record"):
        load_model(tmp_path / "m.pt", trust=record)
    assert RAN == []


def test_a_model_inside_a_checkpoint(tmp_path):
    first, second = nn.Linear(2, 3), nn.Linear(3, 4)
    torch.save({"model": first, "epoch": 3}, tmp_path / "one.pt")
    assert load_model(tmp_path / "one.pt").out_features == 3
    assert load_model(tmp_path / "one.pt", part="model").out_features == 3
    torch.save({"nets": {"a": first, "b": second}}, tmp_path / "two.pt")
    with pytest.raises(FormatError, match=r'2 models: nets\.a, nets\.b\. Try: load_model\(path, part="nets\.a"\)'):
        load_model(tmp_path / "two.pt")
    assert load_model(tmp_path / "two.pt", part="nets.b").out_features == 4


def test_files_of_other_kinds(tmp_path):
    path = tmp_path / "m.pt"
    path.write_text("<html>")
    with pytest.raises(FormatError, match="HTML page"):
        load_model(path)
    torch.save(nn.Linear(2, 2).state_dict(), path)
    with pytest.raises(FormatError, match="it holds no model"):
        load_model(path)
    torch.save(nn.Linear(2, 2), path, _use_new_zipfile_serialization=False)
    assert load_model(path).in_features == 2


def test_the_tree_of_a_model_whose_classes_are_gone(tmp_path, monkeypatch):
    model = nn.Sequential(Net(a=nn.Linear(2, 3)), nn.BatchNorm1d(3), nn.ReLU())
    model[0].b = model[0].a
    torch.save(model, tmp_path / "m.pt")
    monkeypatch.delattr("blueprints.Net")
    with TorchSource(tmp_path / "m.pt") as source:
        places = list(outline(read_tree(source.notes.metadata)))
    assert [(place.path, place.kind) for place in places][:3] == [
        ("", "torch.nn.modules.container.Sequential"),
        ("0", "blueprints.Net"),
        ("0.a", "torch.nn.modules.linear.Linear"),
    ]
    monkeypatch.undo()
    assert [(place, place.tensors) for place in places] == [
        (place, place.tensors) for place in outline(describe(model).data)
    ]
