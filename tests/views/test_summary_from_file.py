"""A file is looked at without its code, and without reading a tensor."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from modsurg import convert, diff, save_checkpoint, save_model, save_state, summary
from modsurg.checkpoints.formats.derived import DerivedSource
from modsurg.checkpoints.formats.memory import MemorySource
from modsurg.checkpoints.formats.safetensors.source import SafetensorsSource, write_safetensors
from modsurg.errors import FormatError, NoMatchError, SummaryError
from modsurg.structure.schema import KEY

torchvision = pytest.importorskip("torchvision")


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_state_without_its_code(tmp_path, suffix):
    model = torchvision.models.resnet18()
    model.conv1.half()
    save_state(model, tmp_path / f"state.{suffix}")
    found = summary(tmp_path / f"state.{suffix}")
    total = found.to_dict()["total"]
    assert (total["params"], total["buffers"]) == (11_689_512, 9_620)
    assert total["macs"] is None
    assert "weight 64x3x7x7" in str(found)
    assert "float16" in str(found)
    assert "2 x the same" in str(found)


def test_a_part_of_a_checkpoint_is_named(tmp_path):
    state = nn.Linear(2, 3).state_dict()
    torch.save({"epoch": 3, "model": {"state_dict": state, "name": "a"}, "optimizer": {}}, tmp_path / "last.pth")
    torch.save(state, tmp_path / "state.pth")
    text = summary(tmp_path / "last.pth").render(100)
    note = "Showing 'model.state_dict'. Also in the file: epoch = 3, model.name = 'a'; optimizer (--part NAME)"
    assert text.splitlines()[-1] == note
    assert "shown is" not in str(summary(tmp_path / "state.pth"))


def trained(path, epoch):
    model = nn.Linear(2, 3)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}, path)
    return path


def test_an_optimizer_as_the_part(tmp_path):
    text = summary(trained(tmp_path / "a.pth", 1), part="optimizer").render(200)
    assert "step scalar, exp_avg 3x2, exp_avg_sq 3x2" in text
    assert "Showing 'optimizer'. Also in the file: param_groups.0.lr = 0.001" in text


def test_a_part_that_is_not_shown_is_not_there_to_choose_in(tmp_path):
    path = trained(tmp_path / "a.pth", 1)
    told = (
        r"nothing at 'optimizer' in .*a.pth; Showing 'model'\. Also in the file: epoch = 1; optimizer \(--part NAME\)"
    )
    with pytest.raises(NoMatchError, match=told):
        summary(path, where="optimizer")
    with pytest.raises(SummaryError, match="part='fc' is for a file; of a model take where='fc'"):
        summary(nn.Linear(1, 1), part="fc")


def test_the_params_of_a_run_are_those_of_its_models(tmp_path):
    models = {"generator": nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), "critic": nn.Linear(3, 1)}
    optimizer = torch.optim.Adam([weight for model in models.values() for weight in model.parameters()])
    models["critic"](models["generator"](torch.rand(4, 2))).sum().backward()
    optimizer.step()
    save_checkpoint(
        tmp_path / "run.safetensors", step=1200, **models, optimizer=optimizer, notes={"w": [torch.ones(2)]}
    )
    found = summary(tmp_path / "run.safetensors")
    assert found.to_dict()["total"]["params"] == sum(p.numel() for model in models.values() for p in model.parameters())
    lines = [" ".join(line.split()) for line in found.render(100).splitlines()]
    assert "notes 1 tensor, 8 B . ." in lines
    assert "optimizer Adam, 18 tensors, 176 B . ." in lines
    assert any(line.startswith("random 2 tensors, 7.") for line in lines)
    assert lines[-1] == "a run at step 1,200"
    assert "generator.0" in {row["path"] for row in found.to_dict()["rows"]}


def test_a_run_that_says_nothing_of_itself(tmp_path):
    for text in ("{", "{}", "[]", '{"states": [], "classes": {}, "step": 1}', '{"states": {"a": 1}}', "[" * 100_000):
        write_safetensors(tmp_path / "run.safetensors", MemorySource({"a": torch.ones(1)}, {"modsurg.run": text}))
        with pytest.raises(FormatError, match="its run metadata is corrupt"):
            summary(tmp_path / "run.safetensors")


def test_the_directory_one_is_in(tmp_path, monkeypatch):
    convert(save_state(nn.Linear(2, 3), tmp_path / "a.pt"), tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    assert summary(".").to_dict()["total"]["params"] == 9
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FormatError, match="is a directory, not a checkpoint"):
        summary("")


def test_ties_in_a_file(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    save_state(model, tmp_path / "state.safetensors")
    found = summary(tmp_path / "state.safetensors")
    assert "= 0.weight" in str(found)
    assert found.to_dict()["total"]["params"] == 24


def test_a_whole_model_without_its_code(tmp_path):
    model = torchvision.models.resnet18()
    model.layer4.requires_grad_(False)
    save_model(model, tmp_path / "model.safetensors")
    found = summary(tmp_path / "model.safetensors").to_dict()
    live = summary(model).to_dict()
    assert found["total"]["frozen_params"] == live["total"]["frozen_params"] == 8_393_728
    assert [(row["path"], row["class"], row["detail"]) for row in found["rows"]] == [
        (row["path"], row["class"], row["detail"]) for row in live["rows"]
    ]


def test_shards(tmp_path):
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))
    save_state(model, tmp_path / "state.safetensors", shard_size=40_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    for name in ("state.safetensors", "state.safetensors.index.json"):
        assert summary(tmp_path / name).to_dict()["total"]["params"] == 8 * 64 * 65


def test_a_file_is_selected_by_pattern(tmp_path):
    save_state(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3)), tmp_path / "a.safetensors")
    rows = summary(tmp_path / "a.safetensors", where="re:1").to_dict()["rows"]
    assert [row["path"] for row in rows] == ["", "1"]
    with pytest.raises(NoMatchError, match="nothing at 'head'"):
        summary(tmp_path / "a.safetensors", where="head")
    with pytest.raises(SummaryError, match="in a file it is a path, a glob or a regular expression"):
        summary(tmp_path / "a.safetensors", where=nn.Linear)
    with pytest.raises(SummaryError, match=r"summary\(load_model\(path\), example\)"):
        summary(tmp_path / "a.safetensors", (1, 2))


def test_a_damaged_file(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(FormatError, match=r"a\.safetensors"):
        summary(tmp_path / "a.safetensors")
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors"):
        summary(tmp_path / "gone.safetensors")


def test_a_hundred_gigabytes_are_not_read_and_torch_is_not_imported(tmp_path):
    shape, size = [8192, 8192], 8192 * 8192 * 2
    header = {
        f"layers.{index}.weight": {"dtype": "BF16", "shape": shape, "data_offsets": [index * size, (index + 1) * size]}
        for index in range(745)
    }
    text = json.dumps(header).encode()
    with open(tmp_path / "big.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 745 * size)
    code = "import sys, modsurg; print(modsurg.summary(sys.argv[1])); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "big.safetensors"], capture_output=True, text=True, check=True
    )
    assert "745 x weight 8192x8192" in done.stdout
    assert "params 49,996,103,680" in done.stdout
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("name", ["gone.safetensors", "", "../a.safetensors", 3])
def test_an_index_that_names_what_is_not_there(tmp_path, name):
    index = tmp_path / "a.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(FormatError, match="which is not there: get the whole set|outside its directory"):
        summary(index)


@pytest.mark.parametrize("value", [{"name": 7}, {}, {"list": 3}, {"dict": []}])
def test_attributes_that_no_model_has(tmp_path, value):
    save_model(nn.Linear(1, 1), tmp_path / "a.safetensors")
    with SafetensorsSource(tmp_path / "a.safetensors") as source:
        tree = json.loads(source.header.metadata[KEY])
        tree["modules"][0]["attributes"] = {"training": True, "odd": value}
        write_safetensors(tmp_path / "b.safetensors", DerivedSource(source, metadata={KEY: json.dumps(tree)}))
    with pytest.raises(FormatError, match="damaged"):
        diff(tmp_path / "b.safetensors", tmp_path / "b.safetensors")
