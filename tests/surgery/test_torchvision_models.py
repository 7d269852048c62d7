"""Surgery on models that nobody here wrote: every classification model of torchvision."""

import copy

import pytest
import torch
from torch import nn

from modsurg import edit, remove, replace, select, wrap
from modsurg.tracing.trace import run

models = pytest.importorskip("torchvision.models")

NAMES = models.list_models(module=models)
REAL = ["alexnet", "efficientnet_b0", "googlenet", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf"]
REAL += ["resnet18", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "vit_b_16", "densenet121"]
pytestmark = [
    pytest.mark.filterwarnings("ignore::modsurg.errors.ModsurgWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def build(name):
    torch.manual_seed(0)
    extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return models.get_model(name, weights=None, **extra).eval()


@pytest.fixture
def build_on_meta(monkeypatch):
    """Build without initialising, which would be most of the time, and let the memory go."""
    for name in vars(nn.init):
        if name.endswith("_") and not name.startswith("_"):
            monkeypatch.setattr(nn.init, name, lambda tensor, *args, **options: tensor)
    return lambda name: build(name).to("meta")


def leaf(path, module):
    return path != "" and not module._modules


@pytest.mark.parametrize("name", REAL)
def test_a_copy_of_every_leaf_computes_the_same(name):
    model = build(name)
    size = 224 if name.startswith("vit") else 96
    x = torch.randn(1, 3, size, size)
    with torch.no_grad():
        before = model(x)
        keys = list(model.state_dict())
        tree = [path for path, _ in model.named_modules()]
        report = replace(model, leaf, copy.deepcopy)
        assert torch.equal(model(x), before)
        assert list(model.state_dict()) == keys
        wrap(model, (nn.Linear, nn.Conv2d), nn.Sequential)
        assert torch.equal(model(x), before)
    assert len(report.changes) == len(select(build(name), leaf))
    assert [path for path, _ in build(name).named_modules()] == tree


@pytest.mark.parametrize("name", [name for name in NAMES if name not in REAL])
def test_every_model_is_edited_and_undone_on_meta(name, build_on_meta):
    model = build_on_meta(name)
    tree = [(path, id(module)) for path, module in model.named_modules()]
    size = 299 if name == "inception_v3" else 224
    shape = (1, 3, size, size)
    reports = [replace(model, leaf, copy.deepcopy)]
    reports += [wrap(model, (nn.Linear, nn.Conv2d), nn.Sequential)]
    trace = run(model, shape)
    assert trace.failure is None
    assert trace.note == ""
    for report in reversed(reports):
        report.undo()
    assert [(path, id(module)) for path, module in model.named_modules()] == tree


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "vit_b_16"])
def test_every_block_is_removed_and_brought_back(name, build_on_meta):
    model = build_on_meta(name)
    before = str(model)
    for path, module in list(model.named_modules()):
        if path and module._modules and not isinstance(module, nn.MultiheadAttention):  # for which no Identity stands
            report = remove(model, path)
            assert str(model) != before
            report.undo()
            assert str(model) == before
    with edit(model) as e:
        for path, _ in list(model.named_children()):
            e.remove(path)
    e.report.undo()
    assert str(model) == before
