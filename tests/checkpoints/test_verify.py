"""A bit that flipped anywhere is found, and named."""

import random

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn

from modsurg import load_state, save_state, verify
from modsurg.checkpoints.formats.safetensors.header import read_header
from modsurg.errors import IntegrityError, ModsurgError


def net():
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".safetensors.index.json"])
def test_a_good_file(suffix, tmp_path):
    model = net()
    path = save_state(model, tmp_path / f"a{suffix}")
    found = verify(path)
    assert found
    assert found.checked == tuple(model.state_dict())
    assert str(found) == f"{path}: 9 tensors hold what was written"
    assert load_state(net(), path, verify=True)


def test_a_bit_flipped_in_any_tensor_names_it(tmp_path):
    model = net()
    path = save_state(model, tmp_path / "a.safetensors")
    raw = path.read_bytes()
    for key, record in read_header(path).records.items():
        flipped = bytearray(raw)
        flipped[record.offset + record.nbytes // 2] ^= 1 << 3
        path.write_bytes(flipped)
        found = verify(path)
        assert not found
        assert found.damaged == (key,)
        assert str(found).endswith(f"1 is damaged: {key}")
        with pytest.raises(IntegrityError, match=rf"1 is damaged: {key}; nothing was loaded"):
            load_state(net(), path, verify=True)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_bit_flipped_anywhere(suffix, tmp_path):
    path = save_state(net(), tmp_path / f"a{suffix}", metadata={"epoch": "3"})
    raw = path.read_bytes()
    missed = []
    for place in random.Random(0).sample(range(len(raw) * 8), 250):
        flipped = bytearray(raw)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        if verify(path):
            missed.append(place // 8)
    assert not missed or suffix == ".pt"  # a zip archive has bytes that mean nothing


def test_a_file_of_one_tensor(tmp_path):
    path = save_state({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    assert str(verify(path)) == f"{path}: 1 tensor holds what was written"
    save_file({"a": torch.ones(2)}, path)
    assert str(verify(path)) == f"{path}: 1 has no stored hash (places and sizes are right)"


def test_a_file_without_hashes(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(net().state_dict(), path)
    found = verify(path)
    assert found
    assert len(found.unhashed) == 9
    assert str(found) == f"{path}: 9 have no stored hash (places and sizes are right)"
    with pytest.raises(IntegrityError, match=r"0\.weight has no stored hash.*Load without verify=True"):
        load_state(net(), path, verify=True)


def test_what_is_not_loaded_need_not_be_whole(tmp_path):
    path = save_state(net(), tmp_path / "a.safetensors")
    raw = bytearray(path.read_bytes())
    raw[read_header(path).records["2.weight"].offset] ^= 1
    path.write_bytes(raw)
    load_state(net(), path, only="0", verify=True)
    with pytest.raises(IntegrityError, match=r"2\.weight"):
        load_state(net(), path, verify=True)


def test_what_lies_beside_the_state_is_checked_too(tmp_path):
    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    run = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(run, tmp_path / "run.pt")
    dcp.save(run, checkpoint_id=tmp_path / "run")
    momentum = optimizer.state_dict()["state"][0]["exp_avg"].numpy().tobytes()
    assert verify(tmp_path / "run.pt")
    assert verify(tmp_path / "run")
    for path in (tmp_path / "run.pt", next((tmp_path / "run").glob("*.distcp"))):
        raw = path.read_bytes()
        path.write_bytes(raw.replace(momentum, momentum[:-1] + b"~"))
    for name in ("run.pt", "run"):
        assert verify(tmp_path / name).problem.endswith("is damaged: its checksum does not hold")
        assert load_state(net(), tmp_path / name, verify=True)


def test_a_broken_file_is_false_and_says_why(tmp_path):
    path = save_state(net(), tmp_path / "a.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    assert not verify(path)
    assert "cut off" in str(verify(path))
    path.write_bytes(b"<html>")
    assert "is an HTML page" in str(verify(path))
    with pytest.raises(FileNotFoundError, match="there is no file"):
        verify(tmp_path / "b.safetensors")


def test_a_damaged_shard(tmp_path):
    index = save_state(net(), tmp_path / "a.safetensors", shard_size=300)
    shard = sorted(tmp_path.glob("*-of-*"))[0]
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    assert verify(index).damaged == ("0.bias",)


def test_a_tie_is_checked_by_either_name(tmp_path):
    weight = torch.randn(4)
    path = save_state({"a": weight, "b": weight}, tmp_path / "a.safetensors")
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert verify(path).damaged == ("a", "b")


def test_no_tensors(tmp_path):
    path = save_state({}, tmp_path / "a.safetensors")
    assert str(verify(path)) == f"{path}: no tensors"
    assert load_state(nn.ReLU(), path, verify=True)


def test_a_hundred_lengths(tmp_path):
    path = save_state(net(), tmp_path / "a.safetensors")
    raw = path.read_bytes()
    for length in random.Random(1).sample(range(len(raw)), 100):
        path.write_bytes(raw[:length])
        assert not verify(path)
        with pytest.raises(ModsurgError, match="cut off"):
            load_state(net(), path)
