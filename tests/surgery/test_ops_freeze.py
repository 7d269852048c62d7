import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import modsurg
from modsurg.errors import EditError
from modsurg.surgery.journal import Journal
from modsurg.surgery.ops.freeze import apply_frozen, has_statistics, plan_freeze, plan_unfreeze
from modsurg.tree.selection import resolve
from modsurg.tree.walk import walk


def net(norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(), nn.Dropout(0.5))
    return nn.Sequential(body, nn.Flatten(), nn.Linear(4 * 6 * 6, 2))


class Done:
    """What a plan says, by names."""

    def __init__(self, model, changes, notes):
        names = {id(p): name for name, p in reversed(list(model.named_parameters(remove_duplicate=False)))}
        modules = {id(m): path for path, m in reversed(list(model.named_modules(remove_duplicate=False)))}
        self.parameters = [names[id(p)] for change in changes for p in change.detail.parameters]
        self.statistics = tuple(modules[id(m)] for change in changes for m in change.detail.statistics)
        self.notes = tuple(notes)


def run(plan, model, paths):
    journal, tree = Journal(), walk(model)
    changes, notes = plan(tree, resolve(tree, lambda path, module: path in paths))
    done = Done(model, changes, notes)
    apply_frozen(changes, journal)
    return done, journal


def freeze(model, *paths):
    return run(plan_freeze, model, paths)


def unfreeze(model, *paths):
    return run(plan_unfreeze, model, paths)


def snapshot(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def train(model, optimizer, steps=10):
    for _ in range(steps):
        model.train()
        optimizer.zero_grad(set_to_none=False)
        model(torch.randn(4, 3, 8, 8)).square().sum().backward()
        optimizer.step()


NORMS = {
    "batch": nn.BatchNorm2d,
    "cumulative": lambda n: nn.BatchNorm2d(n, momentum=None),
    "sync": nn.SyncBatchNorm,
    "instance": lambda n: nn.InstanceNorm2d(n, affine=True, track_running_stats=True),
}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adam, no foreach": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, foreach=False),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, weight_decay=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01, weight_decay=0.1),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_frozen_body_is_bit_identical_after_training(norm, optimizer):
    model = net(NORMS[norm])
    if norm == "sync":
        model[0][1].forward = lambda x: nn.BatchNorm2d.forward(model[0][1], x)  # the real one needs a GPU
    steps = OPTIMIZERS[optimizer](model.parameters())
    train(model, steps, 2)
    freeze(model, "0")
    body, head = snapshot(model[0]), snapshot(model[2])
    train(model, steps)
    assert same(snapshot(model[0]), body)
    assert not same(snapshot(model[2]), head)


def test_the_norm_uses_its_statistics_and_keeps_its_looks():
    model = net()
    before, keys = repr(model), list(model.state_dict())
    freeze(model, "0.1")
    model.train()
    x = torch.randn(4, 4, 6, 6)
    norm = model[0][1]
    assert not norm.training
    assert model[0][3].training
    assert torch.equal(
        norm(x), nn.functional.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    assert repr(model) == before
    assert list(model.state_dict()) == keys
    assert type(norm) is nn.BatchNorm2d
    assert norm.train() is norm


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_stay_frozen_and_are_their_own(duplicate):
    model = net()
    freeze(model, "0")
    other = duplicate(model).train()
    assert not other[0][1].training
    unfreeze(model.train(), "0")
    assert model[0][1].training
    assert not other.train()[0][1].training
    unfreeze(other, "0")
    assert other[0][1].training


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_saved_model_stays_frozen(tmp_path, suffix):
    model = net().eval()
    freeze(model, "0")
    modsurg.save_model(model, tmp_path / f"model{suffix}")
    loaded = modsurg.load_model(tmp_path / f"model{suffix}").train()
    assert not loaded[0][1].training
    assert loaded[0][3].training
    assert not any(p.requires_grad for p in loaded[0].parameters())
    unfreeze(loaded, "0")
    assert loaded[0][1].training


def test_a_new_norm_in_a_frozen_body_trains():
    model = net()
    freeze(model, "0")
    modsurg.replace(model, "0.1", nn.BatchNorm2d(4))
    assert model[0][1].training
    assert model.eval().train()[0][1].training
    modsurg.replace(model, "0.1", copy.deepcopy)
    unfreeze(model, "0")
    freeze(model, "0")
    modsurg.replace(model, "0.1", copy.deepcopy)
    assert not model.train()[0][1].training


@given(st.lists(st.sampled_from(["train", "eval", "freeze", "unfreeze"]), max_size=8), st.booleans())
@settings(deadline=None, max_examples=40)
def test_unfreeze_gives_the_mode_that_was_last_asked_for(steps, training):
    model = net().train(training)
    asked = training
    for step in steps:
        if step in ("train", "eval"):
            getattr(model, step)()
            asked = step == "train"
        else:
            (freeze if step == "freeze" else unfreeze)(model, "0")
    unfreeze(model, "0")
    assert all(module.training == asked for module in model.modules())
    assert "train" not in model[0][1].__dict__
    assert all(p.requires_grad for p in model.parameters())


def test_gradients_left_from_an_earlier_step_go():
    model = net()
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    model[0][0].weight.requires_grad_(False)
    freeze(model, "0")
    assert all(p.grad is None for p in model[0].parameters())
    assert all(p.grad is not None for p in model[2].parameters())


def test_a_graph_from_before_leaves_no_gradient():
    model = net()
    loss = model(torch.randn(2, 3, 8, 8)).sum()
    freeze(model, "0")
    loss.backward()
    assert all(p.grad is None for p in model[0].parameters())


def test_what_is_reported():
    model = net()
    report, _ = freeze(model, "0")
    assert list(report.parameters) == ["0.0.weight", "0.0.bias", "0.1.weight", "0.1.bias"]
    assert report.statistics == ("0.1",)
    assert report.notes == ()
    again, _ = freeze(model, "0")
    assert not again.parameters
    assert not again.statistics
    back, _ = unfreeze(model, "0")
    assert list(back.parameters) == list(report.parameters)
    assert back.statistics == ("0.1",)


def test_a_tied_parameter_is_reported():
    model = nn.ModuleDict({"wte": nn.Embedding(5, 3), "lm_head": nn.Linear(3, 5, bias=False)})
    model["lm_head"].weight = model["wte"].weight
    report, _ = freeze(model, "lm_head")
    assert report.notes == ("wte.weight is the same parameter as one inside: it is frozen too",)
    assert list(report.parameters) == ["wte.weight"]


def test_a_shared_norm_is_reported_once():
    norm = nn.BatchNorm1d(2)
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), norm), nn.Sequential(nn.Linear(2, 2), norm))
    report, _ = freeze(model, "0")
    assert report.statistics == ("0.1",)
    assert report.notes == ("1.1 is the same module as one inside: it is frozen there too",)
    assert freeze(model, "0.1")[0].notes == ()


def test_rollback_is_exact():
    model = net()
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    _, journal = freeze(model, "0")
    journal.rollback()
    assert all(p.requires_grad and p.grad is grads[name] for name, p in model.named_parameters())
    assert "train" not in model[0][1].__dict__
    assert model[0][1].training
    freeze(model, "0")
    _, journal = unfreeze(model, "0")
    journal.rollback()
    assert not model.train()[0][1].training
    assert not any(p.requires_grad for p in model[0].parameters())


@pytest.mark.parametrize("verb", [freeze, unfreeze])
def test_what_was_moved_and_trained_since_stays_so(verb):
    model = nn.Sequential(nn.Linear(2, 2))
    model(torch.ones(1, 2)).sum().backward()
    _, journal = verb(model.requires_grad_(verb is freeze), "0")
    model.double()[0].weight.data.fill_(3.0)
    journal.rollback()
    assert model[0].weight.dtype == torch.float64
    assert torch.equal(model[0].weight, torch.full((2, 2), 3.0, dtype=torch.float64))
    assert model[0].weight.requires_grad is (verb is freeze)
    assert model[0].weight.grad.dtype == torch.float64


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_spectral_norm_does_not_drift(norm):
    torch.manual_seed(0)
    model = nn.Sequential(norm(nn.Linear(4, 4)), nn.Linear(4, 1))
    freeze(model, "0")
    x = torch.randn(3, 4)
    first = model.train()[0](x).detach()
    for _ in range(3):
        model(x)
    assert torch.equal(model[0](x), first)


def test_what_has_no_statistics_is_not_held():
    assert not has_statistics(nn.BatchNorm1d(2, track_running_stats=False))
    assert not has_statistics(nn.InstanceNorm1d(2))
    assert not has_statistics(nn.GroupNorm(1, 2))
    assert has_statistics(nn.LazyBatchNorm1d())


def test_lazy_and_meta_and_integer_parameters():
    lazy = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())
    freeze(lazy, "")
    lazy.train()(torch.randn(2, 4))
    assert not any(p.requires_grad for p in lazy.parameters())
    assert lazy[1].num_batches_tracked == 0
    with torch.device("meta"):
        model = net()
    freeze(model, "0")
    counts = nn.Module()
    counts.n = nn.Parameter(torch.tensor([1]), requires_grad=False)
    unfreeze(counts, "")
    assert not counts.n.requires_grad


def test_compiled_forward_of_a_held_norm():
    model = net()
    freeze(model, "0")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    body = snapshot(model[0])
    compiled.train()(torch.randn(2, 3, 8, 8)).sum().backward()
    assert same(snapshot(model[0]), body)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.ones(2))
        self.body, self.norm, self.head = nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 2)


def test_parameters_of_the_model_itself_that_were_forgotten_are_told():
    model = Tokens()
    message = r'token of Tokens itself still trains: freeze\(model, "\*\*"\), then unfreeze\(model, ...\)'
    with pytest.warns(modsurg.errors.ModsurgWarning, match=message):
        modsurg.freeze(model, modsurg.select(model, "*") - modsurg.select(model, "head"))
    assert model.token.requires_grad


@pytest.mark.filterwarnings("error")
def test_parameters_of_the_model_itself_that_were_not_meant_are_not():
    model = Tokens()
    modsurg.freeze(model, "body")
    modsurg.freeze(model, "**")
    modsurg.freeze(model, "*")
    modsurg.unfreeze(model, "head")
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]


def test_the_like_in_many_modules_is_told_once_and_chosen_layers_not_at_all():
    model = nn.Sequential(*(Tokens() for _ in range(3)))
    with pytest.warns(modsurg.errors.ModsurgWarning, match="token of Tokens .* trains .the like in 2 more") as said:
        modsurg.freeze(model, nn.Linear)
    assert len(said) == 1
    for each in model:
        each.more = nn.LayerNorm(2)
    modsurg.unfreeze(model, "")
    assert modsurg.freeze(model, nn.Linear).warnings == ()


def test_undo_where_the_user_set_what_trains_since():
    model = net()
    report = modsurg.freeze(model, "0")
    model.requires_grad_(True)
    report.undo()
    assert all(p.requires_grad for p in model.parameters())
    assert model[0].training


def test_what_has_no_shape_yet_is_frozen_and_brought_back():
    model = nn.Sequential(nn.LazyLinear(2))
    modsurg.freeze(model, "0").undo()
    assert model[0].weight.requires_grad
    modsurg.freeze(model, "0")
    model(torch.ones(1, 3))
    assert not model[0].weight.requires_grad


def test_inference_tensors_are_not_unfrozen_and_the_line_makes_them_ordinary():
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    modsurg.freeze(model, "0")
    with pytest.raises(EditError, match=r'"0.weight" was made under torch.inference_mode') as error:
        modsurg.unfreeze(model, "**")
    assert not model[0].weight.requires_grad
    names = {"model": model, "copy": copy}
    exec(str(error.value).partition("tensors: ")[2], names)
    model = names["model"]
    modsurg.unfreeze(model, "**")
    model(torch.randn(3, 2)).sum().backward()
    assert model[0].weight.grad is not None
