"""Devices and precisions that are there, and those that are not."""

import pytest
import torch
from torch import nn

from modsurg.errors import DeviceError
from modsurg.training.device import check_precision, pick_device, place


def test_auto_is_the_accelerator_or_the_cpu():
    expected = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    assert pick_device("auto") == expected


def test_the_kind_that_is_there_is_not_tried_on_the_first_of_several(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "empty", lambda *sizes, device: pytest.fail(f"allocated on {device}"))
    assert pick_device("cuda") == torch.device("cuda")


@pytest.mark.parametrize("name", ["nonsense", "xpu:9", "cpu:x"])
def test_a_device_that_is_not_there(name):
    with pytest.raises(DeviceError, match=rf"device='{name}' is not there; here are cpu.*device=\"auto\""):
        pick_device(name)


def test_meta_is_refused():
    with pytest.raises(DeviceError, match='device="meta" computes nothing'):
        pick_device("meta")


def test_an_unknown_precision():
    with pytest.raises(DeviceError, match=r"precision='int8': one of \"fp32\", \"bf16\", \"fp16\""):
        check_precision(torch.device("cpu"), "int8")


def test_a_device_that_cannot(monkeypatch):
    monkeypatch.setattr(torch.amp, "is_autocast_available", lambda kind: False)
    with pytest.raises(DeviceError, match='cpu can\'t compute in bf16: precision="fp32"'):
        check_precision(torch.device("cpu"), "bf16")


def test_place_keeps_parameters_themselves_and_other_layouts():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv3d(3, 4, 3), nn.Linear(2, 2))
    before = list(model.parameters())
    place(model, torch.device("cpu"), channels_last=True)
    assert all(a is b for a, b in zip(model.parameters(), before, strict=True))
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert model[1].weight.is_contiguous()
