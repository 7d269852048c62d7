"""The main job, end to end, as a user would type it; and what happens when it is stopped, killed or given nonsense."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import cifar_train
import pytest
import torch
from cifar_net import CifarNet

from modsurg import load_model, verify

SCRIPT = Path(cifar_train.__file__)
SMALL = ("--data", "digits", "--limit", "96", "--epochs", "1", "--batch-size", "32")


def start(out, *options):
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *SMALL, "--out", str(out), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def printed(process):
    output, _ = process.communicate(timeout=300)
    return output


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run with batch normalisation, and what it printed."""
    out = tmp_path_factory.mktemp("run")
    process = start(out, "--batch-norm")
    output = printed(process)
    assert process.returncode == 0, output
    return out, output


def test_the_network_is_the_tutorials():
    network = CifarNet()
    assert network(torch.zeros(64, 3, 32, 32)).shape == (64, 10)
    assert sum(parameter.numel() for parameter in network.parameters()) == 145_578


def test_the_output(finished):
    _, output = finished
    assert "digits that scikit-learn ships" in output
    assert output.count("the same") == 8
    assert "DIFFERENT" not in output
    assert re.search(r"as it was .* 1 .* 145,578 .* \d+\.\d\d%", output)
    assert re.search(r"edited .* 2 .* 145,834 .* \d+\.\d\d%", output)
    for line in (
        "+ sequential.*  ReLU  in 3 places",
        "+ sequential.1  BatchNorm2d(32",
        "+ sequential.9  BatchNorm2d(64",
    ):
        assert line in output


def test_what_is_kept(finished):
    out, _ = finished
    network = load_model(out / "edited" / "model.safetensors", trust=(CifarNet,))
    names = [type(module).__name__ for module in network.sequential]
    assert names[:4] == ["Conv2d", "BatchNorm2d", "ReLU", "MaxPool2d"]
    verify(out / "checkpoints" / "last.safetensors")
    verify(out / "checkpoints" / "best.safetensors")
    assert list((out / "tensorboard").glob("events*"))


def test_tensorboard_has_scalars_and_pictures(finished):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(finished[0] / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert "accuracy/val" in tags["scalars"]
    assert "predictions" in tags["images"]


def test_a_finished_run_resumed_prints_the_same_table(finished):
    out, output = finished
    again = printed(start(out, "--batch-norm", "--resume"))
    table = re.compile(r"│ (?:as it was|edited).*")
    assert table.findall(again) == table.findall(output)
    assert len(table.findall(again)) == 2


LATER = [pytest.param(moment, marks=pytest.mark.examples) for moment in ("epoch 1/", "The edit")]


@pytest.mark.parametrize("moment", ["epoch 2/", *LATER])
def test_kill_and_resume(tmp_path, moment):
    process = start(tmp_path)
    for line in process.stdout:
        if moment in line:
            break
    process.kill()
    process.communicate()
    for file in tmp_path.rglob("*.safetensors"):
        verify(file)
    process = start(tmp_path, "--resume")
    output = printed(process)
    assert process.returncode == 0, output
    assert re.search(r"edited .* 2 .* 145,578", output)


def test_ctrl_c_keeps_the_run(tmp_path):
    process = start(tmp_path, "--limit", "1400", "--epochs", "3")
    for line in process.stdout:
        if "epoch 1" in line:
            break
    process.send_signal(signal.SIGINT)
    rest = process.stdout.read()
    process.wait(timeout=60)
    assert process.returncode == 130
    assert "--resume goes on from here" in rest
    verify(tmp_path / "checkpoints" / "last.safetensors")


class TestBadInput:
    """One line, and the exit status 2."""

    def told(self, capsys, *options):
        try:
            status = cifar_train.main([*SMALL, *options])
        except SystemExit as stopped:
            status = stopped.code
        error = capsys.readouterr().err
        assert status == 2
        assert "Traceback" not in error
        return error

    def test_data_that_is_not_there(self, capsys, tmp_path):
        error = self.told(capsys, "--data", str(tmp_path / "x"))
        assert error.count("\n") == 1
        assert "there is no such folder" in error

    def test_data_without_pictures(self, capsys, tmp_path):
        assert "no pictures there" in self.told(capsys, "--data", str(tmp_path))

    @pytest.mark.parametrize("device", ["cuda:9", "nonsense"])
    def test_a_device_that_is_not_there(self, capsys, tmp_path, device):
        error = self.told(capsys, "--device", device, "--out", str(tmp_path))
        assert error.count("\n") == 1
        assert device in error

    def test_a_resume_file_that_is_not_there(self, capsys, tmp_path):
        error = self.told(capsys, "--resume", str(tmp_path / "x.safetensors"), "--out", str(tmp_path))
        assert "the file does not exist" in error

    @pytest.mark.parametrize("length", [0, 7, 500, -1])
    def test_a_cut_off_resume_file(self, capsys, tmp_path, finished, length):
        whole = (finished[0] / "checkpoints" / "last.safetensors").read_bytes()
        (tmp_path / "cut.safetensors").write_bytes(whole[:length])
        error = self.told(capsys, "--resume", str(tmp_path / "cut.safetensors"), "--out", str(tmp_path))
        assert error.count("\n") == 1
        assert "cut.safetensors" in error

    @pytest.mark.parametrize(
        "option", [("--epochs", "0"), ("--batch-size", "-3"), ("--lr", "nan"), ("--limit", "x"), ("--precision", "fp8")]
    )
    def test_numbers_that_make_no_sense(self, capsys, option):
        assert f"argument {option[0]}" in self.told(capsys, *option)

    def test_a_folder_that_can_not_be_written(self, capsys, tmp_path):
        (tmp_path / "file").write_text("")
        assert "file" in self.told(capsys, "--out", str(tmp_path / "file" / "out"))


def test_help_is_worth_reading(capsys):
    with pytest.raises(SystemExit, match="0"):
        cifar_train.main(["--help"])
    text = capsys.readouterr().out
    for option in ("data", "epochs", "lr", "device", "precision", "log-dir", "out", "seed", "resume", "limit"):
        assert f"--{option}" in text
