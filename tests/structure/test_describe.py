import json
import threading

import pytest
import torch
from blueprints import again, assert_same
from torch import nn

from modsurg.errors import SaveError
from modsurg.structure.build import build, describe


def test_the_description_is_the_same_for_the_same_model():
    texts = [json.dumps(describe(nn.Transformer(16, 2, 1, 1, 8)).data) for _ in range(2)]
    assert texts[0] == texts[1]
    assert json.dumps(describe(build(json.loads(texts[0]))).data) == texts[0]


def test_compiled_models_are_looked_through():
    model = nn.Sequential(nn.Linear(2, 2), torch.compile(nn.Linear(2, 2)))
    back = again(torch.compile(model))
    assert type(back[1]) is nn.Linear
    assert list(back.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_modules_outside_the_tree_come_along():
    teacher = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval()
    model = nn.Sequential(nn.Linear(2, 2))
    model.hidden = [teacher]
    model[0].owner = [model]
    teacher[0].student = [model[0]]
    back = again(model)
    assert_same(model, back)
    assert_same(teacher, back.hidden[0])
    assert back[0].owner[0] is back
    assert back.hidden[0][0].student[0] is back[0]
    assert not back.hidden[0].training


def test_what_is_wrong_outside_the_tree_has_its_path_too():
    model = nn.Sequential(nn.Linear(2, 2))
    model.hidden = [nn.Sequential(nn.Linear(2, 2))]
    lock(model.hidden[0][0])
    with pytest.raises(SaveError, match=r"hidden\[0\]\.0\.lock  a _thread\.lock"):
        describe(model)


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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "spoil, words",
    [
        (lock, r"lock  a _thread\.lock: drop it"),
        (hook_with_closure, r"1  a hook \(forward hook\): remove it, and register it again after loading"),
        (tensor_hook, r"0\.weight  has a hook: remove it"),
        (replaced_forward, r"0\.forward  a method replaced on this object: use a subclass;"),
        (sparse, r"index  is a torch\.sparse_coo tensor"),
        (overlap, r"back  shares only a part of its memory with front: clone one"),
        (lazy, r"2\.weight  has no shape yet: run the model once"),
        (wrapped, r"2  a DataParallel module: save the module inside it"),
        (scripted, r"2  a ScriptModule module: keep it with torch\.jit\.save"),
        (traced, r"2  a torch\.fx module: save the model that it was traced from"),
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
    with pytest.raises(SaveError, match=r"1 leads back to a Sequential that it lies in: keep the way back in a list"):
        describe(model)


def test_a_path_inside_a_compiled_module_is_that_of_the_module():
    model = nn.Sequential(torch.compile(nn.Sequential(nn.Linear(2, 2))))
    lock(model[0]._orig_mod[0])
    with pytest.raises(SaveError, match=r"0\.0\.lock  a _thread\.lock"):
        describe(model)
