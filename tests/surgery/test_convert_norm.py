"""convert_norm: another kind of norm, the weights carried over, the rest told."""

import pytest
import torch
import torchvision
from torch import nn

from modsurg import convert_norm, replace
from modsurg.errors import EditError, NoMatchError


def net():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 48, 3), nn.BatchNorm2d(48, eps=0.01, momentum=0.3), nn.ReLU(), nn.Conv2d(48, 7, 1)
    )
    model.append(nn.BatchNorm2d(7))
    for norm in (model[1], model[4]):
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.normal_(norm.bias)
    model(torch.randn(4, 3, 8, 8))
    return model


def test_to_group_norm():
    model = net()
    weight, bias = model[1].weight.clone(), model[1].bias.clone()
    report = convert_norm(model, nn.BatchNorm2d, "group", example=(1, 3, 8, 8))
    assert (model[1].num_groups, model[4].num_groups) == (24, 7)
    assert model[1].eps == 0.01
    assert torch.equal(model[1].weight, weight)
    assert torch.equal(model[1].bias, bias)
    assert "running statistics of 2 norms were dropped" in str(report)
    report.undo()
    assert isinstance(model[1], nn.BatchNorm2d)


def test_to_layer_norm_is_that_of_all_channels():
    model = nn.Sequential(nn.BatchNorm1d(6))
    convert_norm(model, "0", "layer")
    x = torch.randn(3, 6)
    torch.testing.assert_close(model(x), nn.functional.layer_norm(x, (6,)))


def test_to_sync_and_back_keeps_the_statistics():
    model = net()
    x = torch.randn(2, 3, 8, 8)
    before = model.eval()(x)
    convert_norm(model, nn.BatchNorm2d, "sync")
    assert isinstance(model[1], nn.SyncBatchNorm)
    assert model[1].momentum == 0.3
    assert not model[1].training
    torch.testing.assert_close(model(x), before)
    convert_norm(model, nn.SyncBatchNorm, "batch")
    assert type(model[1]) is nn.BatchNorm2d
    assert torch.equal(model(x), before)


@pytest.mark.parametrize(
    ("old", "shape", "expected"),
    [
        (nn.InstanceNorm1d(4, affine=True), (2, 4, 5), nn.BatchNorm1d),
        (nn.InstanceNorm3d(4), (2, 4, 5, 5, 5), nn.BatchNorm3d),
        (nn.GroupNorm(2, 4), (2, 4, 5, 5), nn.BatchNorm2d),
    ],
)
def test_to_batch_norm(old, shape, expected):
    model = nn.Sequential(old)
    report = convert_norm(model, "0", "batch", example=shape)
    assert type(model[0]) is expected
    assert (model[0].weight is None) == (old.weight is None)
    assert "start at mean 0 and variance 1" in str(report)


def test_dimensions_are_those_of_the_convolutions():
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.GroupNorm(2, 4))
    convert_norm(model, "1", "batch", example=(2, 3, 8))
    assert type(model[1]) is nn.BatchNorm1d


def test_dtype_mode_and_the_optimizer():
    model = net().half().eval()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    convert_norm(model, nn.BatchNorm2d, "group", optimizer=optimizer)
    assert model[1].weight.dtype == torch.float16
    assert not model[1].training
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == set(map(id, model.parameters()))


def test_all_norms_of_a_network():
    model = torchvision.models.resnet18(num_classes=3)
    convert_norm(model, "layer1", "group")
    kinds = [type(module).__name__ for module in model.modules() if "Norm" in type(module).__name__]
    assert kinds.count("GroupNorm") == 4
    convert_norm(model, "**", "group", example=(2, 3, 64, 64))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    model(torch.randn(2, 3, 64, 64)).sum().backward()


def test_tied_norms_stay_tied():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())
    model.append(model[0])
    convert_norm(model, nn.BatchNorm2d, "group")
    assert model[0] is model[2]


def test_what_can_not_be_converted():
    model = net()
    with pytest.raises(EditError, match=r"to='instance' must be one of 'group', 'sync', 'batch', 'layer'"):
        convert_norm(model, nn.BatchNorm2d, "instance")
    with pytest.raises(EditError, match="no normalisation layer at '0'; nothing was changed"):
        convert_norm(model, "0", "group")
    with pytest.raises(NoMatchError, match="nothing at"):
        convert_norm(model, "norm", "group")
    encoder = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    with pytest.raises(
        EditError, match=r'"1" is a LayerNorm over the last dimensions.*Try: replace\(model, "1"'
    ) as raised:
        convert_norm(encoder, "**", "batch")
    line = str(raised.value).partition("Try: ")[2]
    eval(line, {"replace": lambda model, path, new: replace(model, path, nn.Identity), "model": encoder})


@pytest.mark.models
def test_timm_s_norms_keep_their_activation():
    timm = pytest.importorskip("timm")
    for name in ("efficientnet_b0", "cs3darknet_s"):
        model = timm.create_model(name, num_classes=3)
        acts = sum(isinstance(module, nn.SiLU) for module in model.modules())
        convert_norm(model, "**", "group", example=(2, 3, 64, 64))
        assert sum(isinstance(module, nn.SiLU) for module in model.modules()) == acts
        assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
