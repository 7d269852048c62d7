"""The command line as a user has it: output, exit status, one line an error."""

import json
import os
import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import modsurg
from modsurg.cli import _parser, main


@pytest.fixture
def files(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    modsurg.save_state(model, tmp_path / "a.safetensors")
    torch.save(model.state_dict(), tmp_path / "same.pt")
    with torch.no_grad():
        model[2].bias[1] = 3
    modsurg.save_state(model, tmp_path / "b.safetensors")
    return tmp_path


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return status, out, err


def process(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, **options)


def test_summary(capsys, files):
    status, out, err = run(capsys, "summary", files / "a.safetensors")
    assert (status, err) == (0, "")
    assert "params 58" in out
    assert "\x1b" not in out


def test_summary_as_json_with_where(capsys, files):
    status, out, _ = run(capsys, "summary", files / "a.safetensors", "--where", "2", "--json")
    assert status == 0
    assert json.loads(out)["total"]["params"] == 58


def test_names_in_a_file_do_not_steer_the_terminal(capsys, tmp_path):
    names = ["a\x1b[2J", "b\nparams 0", "c\u202e"]
    torch.save({f"{name}.w.v": torch.ones(2) for name in names} | {"d\x07": 1}, tmp_path / "strange.pt")
    modsurg.save_state({"b\nparams 0.w.v": torch.ones(2)}, tmp_path / "other.safetensors")
    asked = [
        ("summary", tmp_path / "strange.pt"),
        ("summary", tmp_path / "strange.pt", "--where", "nowhere"),
        ("diff", tmp_path / "strange.pt", tmp_path / "other.safetensors"),
        ("convert", tmp_path / "strange.pt", tmp_path / "out.pt", "--only", "\x1b[2J"),
        ("verify", tmp_path / "strange.pt"),
    ]
    for arguments in asked:
        _, out, err = run(capsys, *arguments)
        assert all(line.isprintable() for line in (out + err).split("\n"))
    out = run(capsys, *asked[0])[1]
    assert r"a\x1b[2J " in out
    assert r"b\nparams 0 " in out
    ElementTree.fromstring(modsurg.summary(tmp_path / "strange.pt").to_svg())


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)]
)
def test_short_names_of_dtypes(capsys, files, name, dtype):
    assert run(capsys, "convert", files / "a.safetensors", files / "c.pt", "--dtype", name)[0] == 0
    assert torch.load(files / "c.pt")["0.weight"].dtype == dtype


def test_an_option_that_a_command_has_not_shows_the_usage_of_that_command(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["convert", "a.pt", "b.safetensors", "--half"])
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert "usage: modsurg convert" in err
    assert "modsurg convert: error: unrecognized arguments: --half" in err


def test_a_part_of_a_checkpoint(capsys, tmp_path):
    for name, value in (("a", 1.0), ("b", 2.0)):
        state = {0: {"exp_avg": torch.full((3,), value)}}
        data = {"model": {"w": torch.ones(2)}, "optimizer": {"state": state}, "epoch": int(value)}
        torch.save(data, tmp_path / f"{name}.pth")
    a, b = tmp_path / "a.pth", tmp_path / "b.pth"
    assert "exp_avg 3" in run(capsys, "summary", a, "--part", "optimizer")[1]
    status, out, _ = run(capsys, "diff", a, b, "--part", "optimizer")
    assert (status, out.splitlines()[0]) == (1, "~ state.0.exp_avg  all 3 differ, by up to 1 (relative 0.5)")
    status, out, _ = run(capsys, "diff", a, b)
    assert (status, "! beside what was compared, epoch 1 -> 2" in out) == (1, True)
    assert "only model was compared, not optimizer" in out.replace("\n ", "")
    assert run(capsys, "diff", a, a)[:2] == (0, "same: 1 tensor, 8 B\n")


def test_a_part_that_only_one_of_two_has(capsys, tmp_path):
    model = nn.Linear(2, 2)
    run_of, state = tmp_path / "run.safetensors", tmp_path / "state.safetensors"
    modsurg.save_checkpoint(run_of, step=1, ema=model)
    modsurg.save_state(model, state)
    for paths in ((run_of, state), (state, run_of)):
        status, _, err = run(capsys, "diff", *paths, "--part", "ema")
        assert (status, err) == (
            2,
            f"modsurg: {state} has one state and no parts: leave the part out. "
            "--part is for both files; in Python: diff(read_state(A, part=...), read_state(B))\n",
        )
    assert not modsurg.diff(modsurg.read_state(run_of, part="ema"), modsurg.read_state(state))


def test_summary_does_not_import_torch(files):
    code = (
        "import sys; from modsurg.cli import _parser, main; status = main(sys.argv[1:]); "
        "heavy = {'torch', 'numpy', 'rich', 'safetensors'} & set(sys.modules); sys.exit(str(heavy or '') or status)"
    )
    done = process("-c", code, "summary", str(files / "a.safetensors"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "params 58" in done.stdout


def test_diff_same(capsys, files):
    status, out, err = run(capsys, "diff", files / "a.safetensors", files / "same.pt")
    assert (status, out, err) == (0, "same: 4 tensors, 232 B\n", "")


def test_diff_different(capsys, files):
    status, out, _ = run(capsys, "diff", files / "a.safetensors", files / "b.safetensors")
    assert status == 1
    assert out.startswith("~ 2.bias  1 of 2 differs at [1]: ")


def test_diff_as_json(capsys, files):
    status, out, _ = run(capsys, "diff", "--json", files / "a.safetensors", files / "b.safetensors")
    assert status == 1
    assert json.loads(out)["changes"][0]["values"]["index"] == [1]
    status, out, _ = run(capsys, "diff", "--json", files / "a.safetensors", files / "same.pt")
    assert status == 0
    assert json.loads(out)["same"] is True


def test_convert(capsys, files):
    status, out, _ = run(
        capsys, "convert", files / "a.safetensors", files / "c.pt", "--dtype", "float16", "--rename", "2.=head."
    )
    assert status == 0
    assert "4 tensors, 116 B" in out
    state = torch.load(files / "c.pt")
    assert list(state) == ["0.weight", "0.bias", "head.weight", "head.bias"]
    assert state["head.bias"].dtype == torch.float16


def test_convert_by_rules(capsys, files):
    rules = ['Transpose(["0", "2"])', 'Split("0", ["a", "b"])']
    status, _, err = run(capsys, "convert", files / "a.safetensors", files / "c.pt", "--rule", rules[0], "--rule", "2")
    assert status == 2
    assert err.startswith("modsurg: 2 is not a rule")
    options = [word for rule in rules for word in ("--rule", rule)]
    status, _, err = run(capsys, "convert", files / "a.safetensors", files / "c.pt", *options)
    old, new = (modsurg.read_state(files / name) for name in ("a.safetensors", "c.pt"))
    assert (status, err) == (0, "")
    assert torch.equal(torch.cat([new["a.weight"], new["b.weight"]]), old["0.weight"].t())


def test_a_rename_without_a_new_name(capsys, files):
    status, _, err = run(capsys, "convert", files / "a.safetensors", files / "c.pt", "--rename", "2")
    assert (status, err) == (2, "modsurg: --rename 2: give OLD=NEW, as in --rename 2=head\n")
    assert not (files / "c.pt").exists()


def test_standard_output_that_is_closed(files):
    done = subprocess.run(
        f'"{sys.executable}" -m modsurg summary "{files}/a.safetensors" >&-', shell=True, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_convert_only_and_shards_as_json(capsys, files):
    status, out, _ = run(
        capsys,
        "convert",
        files / "a.safetensors",
        files / "d.safetensors",
        "--only",
        "0",
        "--shard-size",
        "100",
        "--json",
    )
    data = json.loads(out)
    assert status == 0
    assert data["tensors"] == 2
    assert data["left"] == ["2.weight", "2.bias"]
    assert list(modsurg.read_state(data["target"])) == ["0.weight", "0.bias"]


def test_verify(capsys, files):
    assert run(capsys, "verify", files / "a.safetensors")[0] == 0
    with open(files / "a.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    status, out, _ = run(capsys, "verify", files / "a.safetensors")
    assert status == 1
    assert "damaged" in out
    status, out, _ = run(capsys, "verify", files / "a.safetensors", "--json")
    assert status == 1
    assert len(json.loads(out)["damaged"]) == 1


def test_env(capsys):
    status, out, _ = run(capsys, "env")
    assert status == 0
    assert torch.__version__ in out
    status, out, _ = run(capsys, "env", "--json")
    assert json.loads(out)["torch"]["version"] == torch.__version__


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["diff", "gone.pt", "a.safetensors"], "there is no file"),
        (["summary", "gone.safetensors"], "there is no file"),
        (["verify", "gone.safetensors"], "there is no file"),
        (["summary", "page.safetensors"], "HTML page"),
        (["diff", "page.safetensors", "a.safetensors"], "HTML page"),
        (["summary", "a.safetensors", "--depth", "0"], "depth=0"),
        (["convert", "a.safetensors", "c.pt", "--dtype", "float3"], "torch has no such dtype"),
        (["convert", "a.safetensors", "c.pt", "--only", "nothing"], "matches no key"),
        (["convert", "a.safetensors", "c.unknown"], "c.unknown"),
    ],
)
def test_errors_are_one_line_and_status_2(capsys, files, monkeypatch, arguments, message):
    (files / "page.safetensors").write_text("<!doctype html>")
    monkeypatch.chdir(files)
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("modsurg: ")
    assert message in err
    assert err.count("\n") == 1


def test_wrong_arguments_are_status_2(capsys):
    for arguments in ([], ["diff", "a"], ["nonsense"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
        assert "usage: modsurg" in capsys.readouterr().err


def test_version():
    done = process("-m", "modsurg", "--version")
    assert done.returncode == 0
    assert done.stdout.startswith("modsurg ")


def test_a_closed_pipe_is_quiet(files):
    names = [f"layer{i}.weight" for i in range(3000)]
    modsurg.save_state({name: torch.zeros(1) for name in names}, files / "many.safetensors")
    command = [sys.executable, "-m", "modsurg", "summary", str(files / "many.safetensors"), "--depth", "9"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.readline()
    child.stdout.close()
    assert child.wait(60) == 141
    assert child.stderr.read() == b""


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_ctrl_c_is_130():
    code = (
        "import signal, sys; from modsurg import cli; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "cli._env = lambda options: signal.raise_signal(signal.SIGINT); sys.exit(cli.main(['env']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"modsurg: interrupted\n")


def test_warnings_are_one_line(capsys, monkeypatch):
    import warnings

    from modsurg import cli
    from modsurg.errors import ModsurgWarning

    monkeypatch.setattr(cli, "_env", lambda options: warnings.warn("mind the gap", ModsurgWarning, stacklevel=1) or 0)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        status, _, err = run(capsys, "env")
    assert (status, err) == (0, "modsurg: warning: mind the gap\n")


def test_the_bar_shows_at_a_terminal_after_a_second(monkeypatch):
    import io

    from modsurg import cli

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    bar = cli._Bar("comparing")
    with bar as show:
        show(1, 10)
        assert sys.stderr.getvalue() == ""
        bar._start -= 2
        show(5, 10)
    assert "comparing" in sys.stderr.getvalue()
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with cli._Bar("comparing") as show:
        assert show is None


def test_merge(capsys, files):
    a, target = files / "a.safetensors", files / "merged.safetensors"
    status, out, _ = run(capsys, "merge", target, f"{a}=0.25", f"{a}=0.75")
    assert (status, out.startswith(f"linear -> {target}: ")) == (0, True)
    assert run(capsys, "diff", a, target)[0] == 0
    status, out, _ = run(capsys, "merge", target, f"{a}=1", "--method", "task", "--base", a, "--json")
    assert (status, json.loads(out)["method"]) == (0, "task")
    status, _, err = run(capsys, "merge", target, a)
    assert (status, f"give FILE=WEIGHT, as in {a}=0.5" in err) == (2, True)


def test_a_view_in_other_forms(capsys, files):
    a, b = files / "a.safetensors", files / "b.safetensors"
    assert run(capsys, "summary", a, "--markdown")[1].startswith("a.safetensors, float32")
    for command in (("summary", a), ("diff", a, b)):
        page, picture = files / "out.html", files / "out.svg"
        run(capsys, *command, "--html", page, "--svg", picture)
        assert page.read_text().startswith("<!doctype html>")
        assert picture.read_text().startswith("<svg ")
    status, out, _ = run(capsys, "diff", a, b, "--width", "60")
    assert max(map(len, out.splitlines())) <= 60
    assert (status, run(capsys, "diff", a, b, "--atol", "1e9")[0]) == (1, 0)


def test_every_help_has_an_example_that_parses(capsys):
    for name in ("summary", "diff", "convert", "merge", "verify", "env"):
        with pytest.raises(SystemExit, match="0"):
            main([name, "--help"])
        example = re.search("^example: modsurg (.+)$", capsys.readouterr().out, re.MULTILINE)[1]
        assert _parser().parse_args(example.split()).command
