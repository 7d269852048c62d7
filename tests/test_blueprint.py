import collections
import dataclasses
import json
import threading

import pytest
import torch
from blueprints import Net, again, assert_same
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from modsurg.errors import SaveError, TrustError
from modsurg.tree.blueprint import build, describe

HERE = __name__


@dataclasses.dataclass
class Config:
    width: int


def test_no_constructor_is_called(monkeypatch):
    data = describe(nn.Sequential(nn.Linear(2, 2), Net(a=nn.ReLU())))

    def refuse(*_, **__):
        raise AssertionError("a constructor was called")

    for kind in (nn.Module, nn.Linear, nn.Sequential, nn.ReLU, Net):
        monkeypatch.setattr(kind, "__init__", refuse)
    assert isinstance(build(data, Net)[1].a, nn.ReLU)


def test_without_values_the_tensors_are_on_meta():
    model = build(describe(nn.BatchNorm1d(3)))
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert model.weight.requires_grad


def test_the_description_is_the_same_for_the_same_model():
    texts = [json.dumps(describe(nn.Transformer(16, 2, 1, 1, 8))) for _ in range(2)]
    assert texts[0] == texts[1]
    assert json.dumps(describe(build(json.loads(texts[0])))) == texts[0]


def test_order_modes_and_empty_slots():
    model = nn.Sequential(
        collections.OrderedDict(z=nn.Linear(2, 2, bias=False), a=nn.BatchNorm1d(2), m=nn.Dropout(0.3))
    )
    model.add_module("none", None)
    model.z.requires_grad_(False)
    model.a.eval()
    model.register_parameter("gain", None)
    model.register_buffer("mask", None)
    back = again(model)
    assert_same(model, back)
    assert list(back._modules) == ["z", "a", "m", "none"]
    assert back.none is None
    assert back.z.bias is None
    assert (back.gain, back.mask) == (None, None)


def test_ties_shared_modules_and_aliases():
    shared = nn.Linear(3, 3)
    model = Net(a=shared, b=nn.Sequential(shared, nn.Linear(3, 3)))
    model.b[1].weight = shared.weight
    model.blocks = [model.a, model.b]
    model.weights = {"w": shared.weight}
    model.go = model.b.forward
    back = again(model)
    assert_same(model, back)
    assert back.a is back.b[0]
    assert back.b[1].weight is back.a.weight
    assert back.blocks[1] is back.b
    assert back.weights["w"] is back.a.weight
    assert back.go.__self__ is back.b


def test_one_config_in_many_modules_stays_one():
    config = Config(3)
    model = nn.Sequential(*[Net(config=config, sizes=[1, 2]) for _ in range(5)])
    back = again(model)
    assert all(module.config is back[0].config for module in back)
    assert back[0].sizes is not back[1].sizes
    assert back[0].config == config


def test_lists_alike_do_not_become_one():
    back = again(nn.Sequential(Net(sizes=[1]), Net(sizes=[1])))
    back[0].sizes.append(2)
    assert back[1].sizes == [1]


def test_extra_containers():
    model = Net(
        items=nn.ParameterList([nn.Parameter(torch.ones(1)), torch.zeros(2)]),
        table=nn.ParameterDict({"b": nn.Parameter(torch.ones(1)), "a": torch.zeros(2)}),
        names=nn.ModuleDict({"z": nn.ReLU(), "a": nn.Tanh()}),
    )
    back = again(model)
    assert_same(model, back)
    assert len(back.items) == 2
    assert list(back.table) == list(model.table)


def test_compiled_models_are_looked_through():
    model = nn.Sequential(nn.Linear(2, 2), torch.compile(nn.Linear(2, 2)))
    back = again(torch.compile(model))
    assert type(back[1]) is nn.Linear
    assert list(back.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_a_class_inside_a_function_opens_with_the_class_itself():
    class Local(nn.Module):
        pass

    data = describe(Local())
    assert isinstance(build(data, [Local]), Local)
    with pytest.raises(TrustError, match=r"not trusted[\s\S]*Local"):
        build(data)


def lock(model):
    model.lock = threading.Lock()


def hook_with_closure(model):
    model[1].register_forward_hook(lambda *_: lock)


def tensor_hook(model):
    model[0].weight.register_hook(lambda grad: grad)


def replaced_forward(model):
    model[0].forward = nn.functional.relu


def sparse(model):
    model.index = torch.eye(2).to_sparse()


def overlap(model):
    base = torch.arange(6.0)
    model.register_buffer("front", base[:4])
    model.register_buffer("back", base[2:])


def lazy(model):
    model.append(nn.LazyLinear(3))


def wrapped(model):
    model.append(nn.DataParallel(nn.Linear(2, 2)))


def scripted(model):
    model.append(torch.jit.script(nn.Linear(2, 2)))


def traced(model):
    model.append(torch.fx.symbolic_trace(nn.Linear(2, 2)))


def stranger(model):
    model.others = [nn.Linear(1, 1)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "spoil, words",
    [
        (lock, r"lock  a _thread\.lock: drop it"),
        (hook_with_closure, r"1 \(forward hook\)  a lambda: define it at the top level"),
        (tensor_hook, r"0\.weight  has a hook: remove it"),
        (replaced_forward, r"0\.forward  a method replaced on this object: use a subclass"),
        (sparse, r"index  is a torch\.sparse_coo tensor"),
        (overlap, r"back  shares only a part of its memory with front: clone one"),
        (lazy, r"2\.weight  has no shape yet: run the model once"),
        (wrapped, r"2  a DataParallel module: save the module inside it"),
        (scripted, r"2  a ScriptModule module: keep it with torch\.jit\.save"),
        (traced, r"2  a torch\.fx module: save the model that it was traced from"),
        (stranger, r"others\[0\]  a Linear outside the tree: register it"),
    ],
)
def test_what_can_not_be_kept_is_refused_by_its_path(spoil, words):
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    spoil(model)
    with pytest.raises(SaveError, match=words):
        describe(model)


def test_everything_that_can_not_be_kept_is_listed_at_once():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    for spoil in (lock, hook_with_closure, tensor_hook, sparse):
        spoil(model)
    with pytest.raises(SaveError, match="4 things can't be kept; nothing was written"):
        describe(model)


def test_a_tree_that_holds_itself_is_refused():
    model = nn.Sequential(nn.ReLU())
    model.append(model)
    with pytest.raises(SaveError, match="holds itself"):
        describe(model)


LAYERS = st.deferred(
    lambda: (
        st.builds(nn.Linear, st.integers(1, 3), st.integers(1, 3), st.booleans())
        | st.builds(nn.BatchNorm1d, st.integers(1, 3))
        | st.builds(nn.Dropout)
        | st.lists(LAYERS, max_size=3).map(lambda layers: nn.Sequential(*layers))
        | st.lists(LAYERS, max_size=3).map(nn.ModuleList)
        | st.tuples(LAYERS, LAYERS).map(lambda pair: Net(a=pair[0], b=pair[1], again=pair[0]))
        | st.dictionaries(st.sampled_from("abc"), st.integers() | st.text(), max_size=2).map(lambda d: Net(info=d))
    )
)


@given(LAYERS, st.randoms(use_true_random=False))
def test_any_tree_comes_back(model, random):
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if len(layers) > 1 and layers[0].weight.shape == layers[1].weight.shape:
        layers[1].weight = layers[0].weight
    for module in model.modules():
        module.training = random.random() < 0.5
    back = again(model)
    assert_same(model, back)
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    assert [name for name, _ in back.named_modules(remove_duplicate=False)] == names
