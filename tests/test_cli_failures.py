"""What the command line says and returns where a file is refused, foreign or damaged."""

import json

import numpy
import pytest
import torch
from torch import nn

import modsurg
from modsurg.cli import main


def run(capsys, *arguments):
    status = main([str(each) for each in arguments])
    return status, *capsys.readouterr()


class Evil:
    def __reduce__(self):
        return print, ("executed",)


@pytest.fixture
def folder(tmp_path):
    torch.save({"w": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "page.pt").write_text("<!doctype html><html>")
    (tmp_path / "model.onnx").write_bytes(b"\x08\x07\x12\x07pytorch")
    (tmp_path / "model.gguf").write_bytes(b"GGUF\x03" + bytes(range(40)))
    numpy.savez(tmp_path / "state.npz", w=numpy.ones(2))
    (tmp_path / "text.pt").write_text("just a text that is somewhat longer")
    return tmp_path


@pytest.mark.parametrize("name", ["evil.pt", "page.pt", "model.onnx", "model.gguf", "state.npz", "text.pt", "."])
def test_verify_of_what_is_refused_or_foreign_is_2(capsys, folder, name):
    status, out, _ = run(capsys, "verify", folder / name)
    assert (status, "executed" in out) == (2, False)
    status, out, _ = run(capsys, "verify", folder / name, "--json")
    assert status == 2
    assert not json.loads(out)["good"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.gguf", b"GGUF\x03\0"),
        ("a.h5", b"\x89HDF\r\n\x1a\n"),
        ("a.onnx", b"\x08\x07"),
        ("a.txt", b"x"),
        ("a.pt", b"a text"),
    ],
)
def test_verify_of_a_short_foreign_file_is_2(capsys, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert run(capsys, "verify", tmp_path / name)[0] == 2


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_verify_of_what_is_cut_off_is_1(capsys, tmp_path, suffix):
    path = modsurg.save_state(nn.Linear(9, 9), tmp_path / f"a{suffix}")
    raw = path.read_bytes()
    for length in (0, 5, 100, len(raw) - 1):
        path.write_bytes(raw[:length])
        assert run(capsys, "verify", path)[0] == 1
    path.write_bytes(bytes(len(raw)))
    assert run(capsys, "verify", path)[0] == 1


def test_a_directory_says_which_file_to_open(capsys, tmp_path):
    modsurg.save_state(nn.Linear(2, 2), tmp_path / "model.safetensors")
    for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pt", "ema.pt"):
        torch.save({}, tmp_path / name)
    status, out, _ = run(capsys, "verify", tmp_path)
    assert status == 2
    assert out.strip().endswith(f"In it: model.safetensors, ema.pt. Try: '{tmp_path / 'model.safetensors'}'")


def test_a_part_that_is_a_value(capsys, tmp_path):
    run_file = {"model": nn.Linear(2, 2).state_dict(), "epoch": 12, "name": "a\x1b[2J", "best": float("nan")}
    torch.save(run_file, tmp_path / "run.pt")
    assert run(capsys, "summary", tmp_path / "run.pt", "--part", "epoch") == (0, "epoch = 12\n", "")
    assert "\x1b" not in run(capsys, "summary", tmp_path / "run.pt", "--part", "name")[1]
    out = run(capsys, "summary", tmp_path / "run.pt", "--part", "best", "--json")[1]
    assert json.loads(out) == {"part": "best", "value": "nan"}


@pytest.mark.parametrize("command", [["summary"], ["verify"], ["diff", "b.pt"], ["convert", "b.pt"]])
def test_failures_as_json(capsys, tmp_path, command):
    verb, *more = command
    status, out, err = run(capsys, verb, tmp_path / "gone.pt", *(tmp_path / name for name in more), "--json")
    assert status == 2
    assert json.loads(out)["error"] == "FileNotFoundError"
    assert "there is no file" in json.loads(out)["message"]
    assert err.startswith("modsurg: ")


def test_convert_of_a_part(capsys, tmp_path):
    ema = nn.Linear(2, 2)
    torch.save({"state_dict": nn.Linear(2, 2).state_dict(), "state_dict_ema": ema.state_dict()}, tmp_path / "t.pth")
    done = run(capsys, "convert", tmp_path / "t.pth", tmp_path / "e.safetensors", "--part", "state_dict_ema")
    assert done[0] == 0
    assert torch.equal(modsurg.read_state(tmp_path / "e.safetensors")["weight"], ema.weight)
    large = modsurg.save_state({"w": torch.tensor([1e5])}, tmp_path / "l.pt")
    wanted = ["convert", large, tmp_path / "h.safetensors", "--dtype", "fp16"]
    assert run(capsys, *wanted)[0] == 2
    assert run(capsys, *wanted, "--allow-overflow")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["diff", "a.pt", "--json"], "the following arguments are required: B"),
        (["convert", "--json", "a.pt", "b.pt", "--half"], "unrecognized arguments: --half"),
        (["summary", "a.pt", "--depth", "x", "--json"], "argument --depth: invalid int value: 'x'"),
        (["nothing", "--json"], "invalid choice: 'nothing'"),
    ],
)
def test_wrong_arguments_as_json(capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    out, err = capsys.readouterr()
    assert json.loads(out)["error"] == "UsageError"
    assert message in json.loads(out)["message"]
    assert "usage: modsurg" in err


def test_plain_values_inside_one_another(tmp_path, capsys):
    twice: list[object] = [1]
    for _ in range(40):
        twice = [twice, twice]
    values = {"lr": 0.1, "layers": [2, 3], "inf": float("inf")}
    torch.save({"model": {"w": torch.ones(1)}, "hparams": values, "huge": twice}, tmp_path / "run.pt")
    assert run(capsys, "summary", tmp_path / "run.pt", "--part", "hparams") == (0, f"hparams = {values}\n", "")
    code, out, _ = run(capsys, "summary", tmp_path / "run.pt", "--part", "hparams", "--json")
    assert (code, json.loads(out)["value"]) == (0, repr(values))
    assert run(capsys, "summary", tmp_path / "run.pt", "--part", "huge")[0] == 2
