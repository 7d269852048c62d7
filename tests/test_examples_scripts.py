"""The examples, as their users start them: what they promise is what they print."""

import re
import tarfile
from pathlib import Path

import lora
import one_channel
import open_foreign
import parallel
import prune
import pytest
import resume
import torch
import transfer
from torchvision.models import resnet18

from modsurg import load_state, read_state, save_state

INSECTS = Path(__file__).parents[2] / "shared/data/hymenoptera.tar"
ALL = (lora, one_channel, open_foreign, parallel, prune, resume, transfer)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Start an example in an empty folder; what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "nothing"))

    def start(example, *arguments):
        example.main(list(map(str, arguments)))
        return capsys.readouterr().out

    return start


def percentages(text):
    return [float(found) for found in re.findall(r"([\d.]+)%", text)]


@pytest.mark.parametrize("example", ALL, ids=lambda example: example.__name__)
def test_help(example, run, capsys):
    with pytest.raises(SystemExit, match="^0$"):
        run(example, "--help")
    assert "usage:" in capsys.readouterr().out


@pytest.mark.parametrize("example", [lora, prune, transfer], ids=lambda example: example.__name__)
def test_no_such_folder_is_one_line(example, run):
    with pytest.raises(SystemExit, match=r"--data nowhere: there is no such folder"):
        run(example, "--data", "nowhere")


def test_lora(run):
    said = run(lora, "--limit", 300, "--epochs", 2)
    assert len(re.findall(r"self_attention\.(?:query|key|value|out) .* in 3 places", said)) == 4
    assert "the same answers, bit for bit: True" in said
    assert float(re.search(r"merged: answers differ by at most (\S+)", said)[1]) < 1e-4
    assert "taken back, the same answers again: True" in said
    assert read_state("runs/lora/upside_down.safetensors").keys() == {
        f"encoder.layers.encoder_layer_{block}.self_attention.{layer}.lora_{side}.weight"
        for block in range(3)
        for layer in ("query", "key", "value", "out")
        for side in "ab"
    }


@pytest.mark.examples
def test_lora_learns(run):
    upright, upside_down, adapted = percentages(run(lora))[:3]
    assert upright > 90
    assert adapted > upside_down + 15


def test_one_channel(run, tmp_path):
    weights = save_state(resnet18(), tmp_path / "resnet18.pth")
    said = run(one_channel, "--weights", weights)
    assert float(re.search(r"answers differ by (\S+)", said)[1]) < 1e-5
    here, there = re.search(r"here (\S+)", said)[1], re.search(r"this script: (\S+)", said)[1]
    assert here == there


def test_one_channel_of_weights_that_are_not_there(run):
    with pytest.raises(SystemExit, match=r"nowhere\.pth"):
        run(one_channel, "--weights", "nowhere.pth")


def test_open_foreign(run):
    said = run(open_foreign)
    assert "taken: state_dict; left: epoch, global_step, state_dict_ema, optimizer_states, hyper_parameters" in said
    assert "nothing was loaded" in said
    kept, file = (int(found.replace(",", "")) for found in re.findall(r"([\d,]+) bytes instead of ([\d,]+)", said)[0])
    assert kept < file / 3


def test_prune(run):
    said = run(prune, "--epochs", 1, "--limit", 200)
    assert re.search(r"^~ conv1  Conv2d  out_channels 64 -> 32$", said, re.MULTILINE)
    rows = re.findall(r"(trained|narrowed|trained on) *│ *([\d,]+) *│ *([\d.]+) M *│ *\d+ ms *│ *[\d.]+%", said)
    assert [row[0] for row in rows] == ["trained", "narrowed", "trained on"]
    (before, macs), (after, fewer), then = ((int(row[1].replace(",", "")), float(row[2])) for row in rows)
    assert after < before / 3
    assert fewer < macs / 3
    assert then == (after, fewer)


@pytest.mark.examples
def test_prune_comes_back(run):
    trained, narrowed, after = percentages(run(prune))[:3]
    assert narrowed < after
    assert after > trained - 10


def test_resume(run):
    said = run(resume)
    assert "never interrupted: steps 1 to 60" in said
    assert "started again: steps 31 to 60" in said
    assert "the same, bit for bit" in said


@pytest.mark.examples
def test_parallel(run):
    said = run(parallel, "--compare", "--epochs", 1)
    apart = [float(found) for found in re.findall(r"at most (\S+) from one process", said)]
    assert len(apart) == 2
    assert max(apart) < 1e-5


def test_transfer(run):
    said = run(transfer, "--limit", 16, "--epochs", 2, "--size", 32)
    assert "Weights: RANDOM" in said
    assert "--weights resnet18-f37072fd.pth" in said
    here, there = re.search(r"best epoch: (\S+)", said)[1], re.search(r"in a fresh process: (\S+)", said)[1]
    assert here == there


def test_transfer_with_weights_of_ones_own(run, tmp_path):
    weights = save_state(resnet18(), tmp_path / "resnet18.pth")
    said = run(transfer, "--limit", 8, "--epochs", 1, "--size", 32, "--weights", weights)
    assert f"Weights: {weights}, " in said
    model = transfer.load_model("runs/transfer/model.safetensors")
    body = resnet18()
    load_state(body, weights)
    assert torch.equal(model.conv1.weight, body.conv1.weight)


@pytest.mark.examples
@pytest.mark.skipif(not INSECTS.exists(), reason="the photographs of ants and bees are not beside the checkout")
def test_transfer_on_photographs(run, tmp_path):
    with tarfile.open(INSECTS) as file:
        file.extractall(tmp_path / "insects", filter="data")
    said = run(transfer, "--data", tmp_path / "insects", "--epochs", 2)
    assert "245 + 153 pictures" in said
