"""Outputs of inner modules: as plain hooks give them, up to the last one that is wanted, and no hook is left."""

import copy
import subprocess
import sys

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import get_model, list_models, resnet18

from modsurg import capture, features, load_model, save_model, select
from modsurg.errors import EditError, NoMatchError, WrapperError


class Counted(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x


class Blocks(nn.Module):
    """Iterates its blocks, calls one activation twice, writes into what comes out of the first layer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4), Counted()])
        self.act = nn.ReLU()
        self.last = Counted()
        self.head = nn.Linear(4, 2)

    def forward(self, x, scale=1.0):
        x = self.act(self.first(x).mul_(scale))
        for block in self.blocks:
            x = block(x)
        return self.head(self.last(self.act(x)))


def by_hooks(model, paths, *args, **kwargs):
    """What plain hooks see, copied before anything writes into it."""
    seen = {path: [] for path in paths}
    handles = [
        model.get_submodule(path).register_forward_hook(
            lambda _, __, out, path=path: seen[path].append(out.clone() if isinstance(out, torch.Tensor) else out)
        )
        for path in paths
    ]
    model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return {path: found[0] if len(found) == 1 else found for path, found in seen.items()}


def assert_equal(a, b):
    assert list(a) == list(b)
    for path in a:
        first, second = (each if isinstance(each, list) else [each] for each in (a[path], b[path]))
        assert len(first) == len(second)
        assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True) if isinstance(x, torch.Tensor))


def hooks_of(model):
    return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


@pytest.mark.parametrize(
    "paths", [["first"], ["act"], ["blocks.1", "first"], ["head"], ["blocks.0", "act", "blocks.2"], [""]]
)
def test_outputs_are_those_of_plain_hooks(paths):
    model, x = Blocks(), torch.randn(3, 4)
    extractor = features(model, paths)
    assert_equal(extractor(x), by_hooks(model, paths, x))
    assert_equal(extractor(x, scale=2.0), by_hooks(model, paths, x, scale=2.0))
    assert_equal(extractor(x=x), by_hooks(model, paths, x))
    assert not any(hooks_of(model))


def test_the_model_stops_after_the_last_output():
    model, x = Blocks(), torch.randn(3, 4)
    extractor = features(model, ["first", "blocks.1"])
    for _ in range(2):
        extractor(x)
    assert (model.blocks[2].calls, model.last.calls) == (0, 0)
    extractor = features(model, "act")  # called again behind the blocks
    assert len(extractor(x)["act"]) == 2
    assert (model.blocks[2].calls, model.last.calls) == (1, 0)


def test_the_keys_and_the_mode_are_the_models():
    model = Blocks()
    extractor = features(model, "first")
    assert list(extractor.state_dict()) == list(model.state_dict())
    assert [name for name, _ in extractor.named_parameters()] == [name for name, _ in model.named_parameters()]
    extractor.eval()
    assert not model.training
    assert not model.first.training
    extractor.load_state_dict({key: torch.zeros_like(value) for key, value in model.state_dict().items()})
    assert not model.first.weight.any()
    extractor.to(torch.float64)
    assert model.head.weight.dtype is torch.float64
    assert type(model) is Blocks
    assert not hasattr(model, "paths")


def test_gradients_flow():
    model, x = Blocks(), torch.randn(3, 4)
    other = copy.deepcopy(model)
    features(model, "blocks.1")(x)["blocks.1"].sum().backward()
    by_hooks(other, ["blocks.1"], x)["blocks.1"].sum().backward()
    assert torch.equal(model.first.weight.grad, other.first.weight.grad)
    assert model.head.weight.grad is None


def test_no_hook_is_left_after_an_error():
    model = Blocks()
    extractor = features(model, "head")
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        extractor(torch.randn(3, 5))
    assert not any(hooks_of(model))
    with pytest.raises(ZeroDivisionError, match="division"), capture(model, "first"):
        _ = 1 / 0
    assert not any(hooks_of(model))


def test_a_container_that_is_never_called_is_refused():
    model = Blocks()
    with pytest.raises(EditError, match=r'"blocks" \(ModuleList\) is never called.*Try: "blocks\.2", its last child'):
        features(model, "blocks")

    class Iterates(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))

        def forward(self, x):
            return self.layers[1](self.layers[0](x))

    extractor = features(Iterates(), "layers")
    with pytest.raises(EditError, match=r'"layers" \(Sequential\) is never called.*Try: "layers\.1"'):
        extractor(torch.ones(1, 4))
    with pytest.raises(EditError, match=r'Try: "layers\.1"'):
        features(Iterates(), "layers", example=(1, 4))


def test_what_is_selected():
    model = Blocks()
    x = torch.randn(1, 4)
    assert list(features(model, ["head", "first"])(x)) == ["head", "first"]
    assert list(features(model, select(model, nn.Linear) - "head")(x)) == ["first", "blocks.0", "blocks.1"]
    with pytest.raises(NoMatchError, match="heda"):
        features(model, "heda")


def test_inputs_of_other_shapes_and_modes():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout())
    extractor = features(model, ["0", "1"])
    for size in (8, 9):
        x = torch.randn(2, 3, size, size)
        copied = copy.deepcopy(model)
        assert_equal(extractor(x), by_hooks(copied, ["0", "1"], x))
        assert torch.equal(model[1].running_mean, copied[1].running_mean)
    x = torch.randn(1, 3, 8, 8)
    assert_equal(extractor.eval()(x), by_hooks(model, ["0", "1"], x))


def test_a_forward_that_meta_can_not_run_is_run_whole():
    class Chooses(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.last = nn.Linear(4, 4), Counted()

        def forward(self, x):
            return self.last(x if self.a(x).sum().item() > 1e9 else self.a(x))

    model, x = Chooses(), torch.randn(2, 4)
    assert_equal(features(model, "a")(x), by_hooks(model, ["a"], x))


def test_wrapped_models_run_whole():
    model, x = Blocks(), torch.randn(2, 4)
    parallel = nn.DataParallel(model)
    assert_equal(features(parallel, "first")(x), by_hooks(model, ["first"], x))
    assert model.last.calls == 2
    compiled = torch.compile(model, backend="eager")
    assert_equal(features(compiled, "first")(x), by_hooks(model, ["first"], x))
    with pytest.raises(WrapperError, match="ScriptModule"):
        features(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), "")


def test_cut_leaves_out_what_is_not_reached(tmp_path):
    model = resnet18(num_classes=5).eval()
    x = torch.randn(1, 3, 64, 64)
    cut = features(model, ["layer2", "layer1.0"], example=x, cut=True)
    names = [name for name, _ in cut.named_children()]
    assert names == ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2"]
    assert_equal(cut(x), by_hooks(model, ["layer2", "layer1.0"], x))
    assert [name for name, _ in model.named_children()][-1] == "fc"
    path = save_model(cut, tmp_path / "cut.safetensors")
    assert_equal(load_model(path)(x), by_hooks(model, ["layer2", "layer1.0"], x))
    torch.save(x, tmp_path / "x.pt")
    code = "import torch, modsurg; m = modsurg.load_model('cut.safetensors'); print(list(m(torch.load('x.pt'))))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "['layer2', 'layer1.0']\n"


def test_cut_keeps_a_stub_of_what_forward_looks_at():
    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            x = self.first(x)
            return self.second(x) if isinstance(self.second, nn.Module) else x

    model, x = Looks(), torch.randn(1, 4)
    cut = features(model, "first", example=x, cut=True)
    assert_equal(cut(x), by_hooks(model, ["first"], x))
    with pytest.raises(EditError, match=r"cut=True needs an example"):
        features(model, "first", cut=True)


def test_capture_while_the_model_runs_as_usual():
    model, x = Blocks(), torch.randn(3, 4)
    with capture(model, ["first", "act"]) as seen:
        output = model(x)
    assert torch.equal(output, model(x))
    assert_equal(dict(seen), {path: by_hooks(model, [path], x)[path] for path in seen})
    assert seen["first"].requires_grad
    with capture(model, "first", detach=True, device="cpu") as seen:
        assert "first" not in seen
        model(x)
        model(x)
    assert len(seen["first"]) == 2
    assert not seen["first"][0].requires_grad
    assert model.last.calls == 6


def check(model, x, **kwargs):
    """Every child that is called, and three deeper modules."""
    model.eval()
    called = []
    handles = [
        module.register_forward_hook(lambda _, __, out, name=name: called.append(name))
        for name, module in model.named_modules()
        if name
    ]
    with torch.no_grad():
        model(*x, **kwargs)
    for handle in handles:
        handle.remove()
    unique = list(dict.fromkeys(called))
    paths = unique[:: max(1, len(unique) // 6)]
    with torch.no_grad():
        assert_equal(features(model, paths)(*x, **kwargs), by_hooks(model, paths, *x, **kwargs))
    middle = unique[len(unique) // 2]
    with torch.no_grad():
        assert_equal(features(model, middle)(*x, **kwargs), by_hooks(model, [middle], *x, **kwargs))
    assert not any(hooks_of(model))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ["resnet18", "densenet121", "mobilenet_v3_small"])
def test_networks_of_torchvision(name):
    check(get_model(name, weights=None), [torch.randn(1, 3, 64, 64)])


LARGE = {"regnet_y_128gf", "vit_h_14", "vit_l_16", "vit_l_32"}


@pytest.mark.models
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(set(list_models(module=torchvision.models)) - LARGE))
def test_every_classification_network_of_torchvision(name):
    side = 299 if name == "inception_v3" else 224
    check(get_model(name, weights=None), [torch.randn(1, 3, side, side)])


@pytest.mark.models
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral", "bert", "t5", "albert", "vit", "wav2vec2"])
def test_models_of_transformers(name):
    from zoo import transformers_models

    model, inputs = transformers_models()[name]
    check(model, [], **inputs)
