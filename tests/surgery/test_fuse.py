"""fuse: the same output in evaluation, fewer norms, and what can't be folded is left alone and counted."""

import copy
import re

import pytest
import torch
import torchvision
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from modsurg import fuse
from modsurg.errors import EditError, ExampleError


def settle(model):
    """Give norms statistics and weights as training would, so that folding them wrongly shows."""
    torch.manual_seed(0)
    for module in model.modules():
        held = {**module._buffers, **module._parameters}
        if held.get("running_mean") is not None:
            with torch.no_grad():
                held["running_mean"].normal_(0, 0.1)
                held["running_var"].uniform_(0.5, 2)
                if held.get("weight") is not None:
                    held["weight"].uniform_(0.5, 1.5)
                    held["bias"].normal_(0, 0.1)
    return model.eval()


def norms(model):
    return sum("running_mean" in module._buffers for module in model.modules())


def difference(model, x, report=None):
    """Largest difference of the fused model, relative to the largest output."""
    with torch.no_grad():
        before = model(x)
        found = fuse(model, example=tuple(x.shape))
        after = model(x)
    worst = float((before - after).abs().max() / before.abs().max().clamp(min=1e-6))
    return worst, found


LAYERS = [
    (lambda: [nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)], (2, 4, 9)),
    (lambda: [nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6)], (2, 4, 9, 9)),
    (lambda: [nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8, affine=False)], (2, 4, 9, 9)),
    (lambda: [nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3, eps=0.1)], (2, 2, 4, 4, 4)),
    (lambda: [nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2), nn.BatchNorm2d(6)], (2, 4, 5, 5)),
    (lambda: [nn.ConvTranspose1d(4, 6, 3, bias=False), nn.BatchNorm1d(6)], (2, 4, 5)),
    (lambda: [nn.Linear(4, 6), nn.BatchNorm1d(6)], (3, 4)),
    (lambda: [nn.Conv2d(3, 4, 1), nn.SyncBatchNorm(4)], (2, 3, 5, 5)),
    (lambda: [nn.Conv2d(3, 4, 1), FrozenBatchNorm2d(4)], (2, 3, 5, 5)),
    (lambda: [nn.Conv2d(3, 4, 1), nn.Identity(), nn.BatchNorm2d(4)], (2, 3, 5, 5)),
]


@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_every_kind_of_layer(make, shape):
    model = settle(nn.Sequential(*make(), nn.ReLU()))
    worst, report = difference(model, torch.randn(shape))
    assert worst < 1e-5
    assert norms(model) == 0
    assert "1 norm was folded into the layer before it" in str(report)


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v3_small", "googlenet", "shufflenet_v2_x0_5", "regnet_x_400mf"]
)
def test_networks(name):
    model = settle(torchvision.models.get_model(name, weights=None, num_classes=5))
    folded = norms(model)
    worst, report = difference(model, torch.randn(2, 3, 96, 96))
    assert worst < 1e-4
    unused = 2 if name == "googlenet" else 0  # of its second outputs, which only training has
    assert norms(model) == unused
    assert f"{folded - unused} norms were folded" in str(report)
    assert ("2 are not called in evaluation" in str(report)) == bool(unused)


def test_norms_before_the_convolution_are_left_alone():
    model = settle(torchvision.models.DenseNet(4, (2, 2), 8))
    before = norms(model)
    worst, report = difference(model, torch.randn(2, 3, 64, 64))
    assert worst < 1e-4
    folded = int(re.search(r"(\d+) norms were folded", str(report))[1])
    assert folded == 5  # the first convolution and the bottleneck of each layer
    assert norms(model) == before - folded
    assert f"{before - folded} do not follow a convolution or Linear" in str(report)


class Shared(nn.Module):
    """Uses what the convolution returns in two places, or calls a layer twice, or returns it."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.conv = nn.Conv2d(3, 3, 1)
        self.norm, self.other = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.tail, self.end = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.conv(x)
        if self.how == "sum":
            out = self.norm(y) + y
        elif self.how == "twice":
            out = self.norm(y) + self.conv(x * 2)
        elif self.how == "norm twice":
            out = self.norm(y) + self.norm(x)
        elif self.how == "two norms":
            out = self.norm(y) + self.other(y)
        elif self.how == "in place":
            out = self.norm(y.relu_())
        else:
            out = self.norm(y)
        out = self.end(self.tail(out))
        return (out, y) if self.how == "returned" else out


@pytest.mark.parametrize("how", ["sum", "twice", "norm twice", "two norms", "in place", "returned"])
def test_an_output_that_something_else_uses_is_left_alone(how):
    model = settle(Shared(how))
    x = torch.randn(2, 3, 5, 5)
    with torch.no_grad():
        before = model(x)
        report = fuse(model, example=(2, 3, 5, 5))
        torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    assert isinstance(model.norm, nn.BatchNorm2d)
    assert isinstance(model.end, nn.Identity)
    assert "; 1 " in str(report) or "; 2 " in str(report)


def test_shared_weights_hooks_and_layers_of_their_own_are_left_alone():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            return nn.functional.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)

    def build(change):
        blocks = [nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)]
        change(blocks)
        return settle(nn.Sequential(*blocks))

    def tie(blocks):
        blocks.append(nn.Conv2d(3, 3, 1))
        blocks[4].weight = blocks[0].weight

    changes = {
        "share weights": tie,
        "have hooks": lambda blocks: blocks[0].register_forward_hook(lambda *_: None),
        "changes its weights": lambda blocks: blocks.__setitem__(0, Standardised(3, 3, 1)),
        "no running statistics": lambda blocks: blocks.__setitem__(1, nn.BatchNorm2d(3, track_running_stats=False)),
    }
    for said, change in changes.items():
        model = build(change)
        worst, report = difference(model, torch.randn(2, 3, 5, 5))
        assert worst < 1e-5
        assert said in str(report)
        assert isinstance(model[1], nn.BatchNorm2d)


def test_the_other_dimension_of_a_sequence_is_left_alone():
    model = settle(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(7), nn.Flatten(), nn.Linear(35, 3), nn.BatchNorm1d(3)))
    worst, report = difference(model, torch.randn(2, 7, 4))
    assert worst < 1e-5
    assert "1 normalise another dimension" in str(report)


def test_in_training_and_without_pairs_it_is_refused_and_nothing_changes():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(EditError, match=r'"1" is in training mode.*Try: fuse\(model\.eval\(\), example=\.\.\.\)'):
        fuse(model, example=(1, 3, 4, 4))
    with pytest.raises(ExampleError, match="does not run on the example; nothing was changed"):
        fuse(model.eval(), example=(1, 2, 4, 4))
    with pytest.raises(EditError, match="no BatchNorm can be folded; nothing was changed"):
        fuse(nn.Sequential(nn.Linear(2, 2)), example=(1, 2))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_undo_dtype_and_the_optimizer():
    model = settle(nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2)))
    model = model.to(torch.bfloat16)
    x, optimizer = torch.randn(2, 3, 4, 4, dtype=torch.bfloat16), torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    with torch.no_grad():
        before = model(x)
    report = fuse(model, example=x, optimizer=optimizer)
    assert model[0].weight.dtype == model[0].bias.dtype == torch.bfloat16
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == set(map(id, model.parameters()))
    report.undo()
    with torch.no_grad():
        assert torch.equal(model(x), before)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == set(map(id, model.parameters()))


@pytest.mark.models
@pytest.mark.parametrize("name", torchvision.models.list_models(module=torchvision.models))
def test_every_network_of_torchvision(name):
    if name == "regnet_y_128gf":
        pytest.skip("2.6 GB of weights; it is built like regnet_y_400mf")
    model = settle(torchvision.models.get_model(name, weights=None, num_classes=5))
    if not norms(model):
        pytest.skip("no BatchNorm")
    size = {"inception_v3": 299, "maxvit_t": 224}.get(name, 96)
    assert difference(model, torch.randn(1, 3, size, size))[0] < 1e-4


@pytest.mark.models
def test_one_network_of_each_family_of_timm():
    timm = pytest.importorskip("timm")
    families = {}
    for name in timm.list_models():
        families.setdefault(timm.models.model_entrypoint(name).__module__, []).append(name)
    folded, wrong = {}, {}
    for names in families.values():
        for name in names:
            with torch.device("meta"):
                try:
                    skeleton = timm.create_model(name)
                except Exception:  # constructors that compute with values do not run on meta
                    continue
            if sum(each.numel() for each in skeleton.parameters()) < 30e6:
                break
        else:
            continue
        if not norms(skeleton):
            continue
        model = settle(timm.create_model(name, num_classes=5))
        x = torch.randn(1, *model.default_cfg["input_size"])
        try:
            worst, report = difference(model, x)
        except EditError as error:
            folded[name] = str(error)
            continue
        folded[name] = str(report).splitlines()[-1].strip()
        if not worst < 1e-4:
            wrong[name] = worst
    print("\n".join(f"{name}: {text}" for name, text in folded.items()))
    assert not wrong
    assert len(folded) > 40
