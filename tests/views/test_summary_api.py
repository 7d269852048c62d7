"""What people see when they look at a model."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from printed import cifar, resnet
from torch import nn

from modsurg import summary
from modsurg.errors import SummaryError
from modsurg.views.text import cells

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("make", [cifar, resnet], ids=lambda make: make.__name__)
@pytest.mark.parametrize("form", ["txt", "wide.txt", "md", "html", "svg"])
def test_golden(make, form):
    """To accept a new look: MODSURG_GOLDEN=write make test, then read the difference."""
    found = make()
    forms = {
        "txt": lambda: found.render(80) + "\n",
        "wide.txt": lambda: found.render(120, bars=True) + "\n",
        "md": found.to_markdown,
        "html": found._repr_html_,
        "svg": found.to_svg,
    }
    file = GOLDEN / f"{make.__name__}.{form}"
    text = forms[form]()
    if os.environ.get("MODSURG_GOLDEN") == "write":
        file.write_text(text)
    assert text == file.read_text()


def test_totals_of_the_tutorials_network():
    total = cifar().to_dict()["total"]
    assert total == {
        "params": 145_578,
        "trainable_params": 145_578,
        "frozen_params": 0,
        "shared_params": 0,
        "param_bytes": 582_312,
        "buffers": 0,
        "buffer_bytes": 0,
        "modules": 11,
        "macs": 12_354_176,
        "activation_bytes": 225_576,
    }


def test_rows_are_plain_data():
    data = json.loads(json.dumps(cifar().to_dict()))
    assert [row["path"] for row in data["rows"]] == ["", "model", *(f"model.{index}" for index in range(9))]
    assert data["rows"][2] == {
        "path": "model.0",
        "class": "Conv2d",
        "detail": "3->32 k5 p2",
        "params": 2432,
        "trainable": 2432,
        "buffers": 0,
        "inputs": [[1, 3, 32, 32]],
        "outputs": [[1, 32, 32, 32]],
        "macs": 2_457_600,
        "activations": 131_072,
        "calls": 1,
        "notes": [],
    }


def test_printed_plain_in_a_pipe_and_in_colour_at_a_terminal(monkeypatch):
    found = cifar()
    assert "\x1b" not in str(found)
    assert "\x1b[36mConv2d 3->32 k5 p2\x1b[0m" in found.render(color=True)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert "\x1b" in str(found)
    assert "\x1b" not in found.render(), "what goes to a file is plain, wherever the program runs"
    monkeypatch.setenv("NO_COLOR", "")
    assert "\x1b" in str(found)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    assert "\x1b" not in str(found)
    assert "█" in str(found)
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("NO_COLOR", "")
    assert str(found) == found.render()


def test_the_terminals_width_is_kept(monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    assert max(map(len, str(cifar()).splitlines())) <= 50


def test_depth_is_a_number_of_levels():
    with pytest.raises(SummaryError, match="depth=0: it is a number of levels, from 1"):
        summary(nn.Linear(2, 2), depth=0)


def test_an_error_shows_the_tree_as_far_as_it_ran():
    model = torchvision.models.resnet18()
    model.layer2[1].conv1 = nn.Conv2d(64, 128, 3)
    with pytest.raises(SummaryError, match=r"fails at layer2\.1\.conv1 \(Conv2d, weight 128x64x3x3") as caught:
        summary(model, (1, 3, 64, 64))
    text = str(caught.value)
    assert "on 1x128x8x8" in text
    assert text.splitlines()[-3].endswith("fails here")
    assert "layer3" not in text


def test_the_model_is_left_as_it_was():
    model = torchvision.models.resnet18()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    summary(model, torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.training


@pytest.mark.parametrize("name", torchvision.models.list_models(module=torchvision.models))
def test_every_classification_model(name):
    if name == "regnet_y_128gf":
        pytest.skip("its constructor does not run on meta, and it has 2.6 GB of weights")
    with torch.device("cpu" if name.startswith("regnet") else "meta"):
        model = torchvision.models.get_model(name, weights=None, **_quick(name)).eval()
    found = summary(model, (1, 3, 224, 224))
    total = found.to_dict()["total"]
    assert total["params"] == sum(each.numel() for each in model.parameters())
    assert total["macs"] > 10**7
    assert found.to_dict()["note"] == ""
    assert max(map(cells, found.render(80).splitlines())) <= 80


def _quick(name):
    return {"init_weights": False} if name in ("googlenet", "inception_v3") else {}


def test_a_detection_model_runs_as_a_copy():
    model = torchvision.models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None).eval()
    found = summary(model, ([torch.zeros(3, 320, 320)],), depth=1)
    assert found.to_dict()["total"]["macs"] > 500_000_000
    assert "ran a real copy" in str(found)


def test_seventy_billion_parameters_on_meta():
    with torch.device("meta"):
        block = [nn.Sequential(nn.Linear(8192, 28672), nn.GELU(), nn.Linear(28672, 8192)) for _ in range(150)]
        model = nn.Sequential(*block)
    text = summary(model, (1, 8192)).render(80)
    assert "0-149  150 x Sequential" in text
    assert "params 70," in text


@pytest.mark.parametrize("example", [[(1, 3)], ({"x": (1, 3)},), {"inputs": [(1, 3)]}, [1, 3]])
def test_sizes_that_are_no_argument_of_their_own(example):
    class Model(nn.Linear):
        def forward(self, inputs):
            return super().forward(inputs["x"] if isinstance(inputs, dict) else inputs[0])

    with pytest.raises(SummaryError, match=r"only where it is an argument itself; anywhere, pass torch.ones\(1, 3\)\."):
        summary(Model(3, 2), example)
    assert "1x3 -> 1x2" in str(summary(Model(3, 2), [torch.ones(1, 3)]))


class TakesADict(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, batch):
        return self.conv(batch["image"])


def test_a_dict_that_forward_takes_itself_goes_into_a_tuple():
    batch = {"image": torch.rand(2, 3, 8, 8)}
    told = r"A dict is keyword arguments\. If forward takes the dict itself, pass it in a tuple: \(\{\.\.\.\},\)\."
    with pytest.raises(SummaryError, match=told):
        summary(TakesADict(), batch)
    assert summary(TakesADict(), (batch,)).to_dict()["total"]["macs"] > 0


def test_a_list_of_shapes_is_one_argument():
    told = r"A list is one argument\. For several, use a tuple: \(\(1, 4\), \(1, 5\)\)\."
    with pytest.raises(SummaryError, match=told):
        summary(nn.Bilinear(4, 5, 2), [(1, 4), (1, 5)])
