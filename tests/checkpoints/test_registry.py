"""Which format a name has."""

import json
import os

import pytest
import torch

from modsurg import load_model, read_state, save_state, verify
from modsurg.errors import FormatError


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(FormatError, match=r"a\.safetensors is not a file"):
        read_state(tmp_path / "a.safetensors")


def test_strings_and_paths(tmp_path):
    path = save_state({"a": torch.ones(1)}, str(tmp_path / "a.safetensors"))
    assert list(read_state(str(path))) == list(read_state(path)) == ["a"]


def test_a_file_goes_before_a_set_of_its_name(tmp_path):
    save_state({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "x.safetensors", shard_size=4)
    save_state({"c": torch.ones(1)}, tmp_path / "y.safetensors").rename(tmp_path / "x.safetensors")
    assert list(read_state(tmp_path / "x.safetensors")) == ["c"]
    assert list(read_state(tmp_path / "x.safetensors.index.json")) == ["a", "b"]


def test_a_directory_with_something_to_open(tmp_path):
    save_state({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match=r"is a directory, not a checkpoint.*Try: '.*model\.safetensors'"):
        read_state(tmp_path)
    save_state({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "set.safetensors", shard_size=4)
    with pytest.raises(FormatError, match=r"Try: '.*set\.safetensors\.index\.json'"):
        read_state(tmp_path)


def test_a_set_of_torchs_own_files(tmp_path):
    """As Hugging Face wrote it before safetensors; its index sorts behind its files."""
    homes = {"a": "net-00001-of-00002.bin", "b": "net-00002-of-00002.bin"}
    for key, name in homes.items():
        torch.save({key: torch.ones(1)}, tmp_path / name)
    (tmp_path / "net.bin.index.json").write_text(json.dumps({"weight_map": homes}))
    assert list(read_state(tmp_path / "net.bin")) == ["a", "b"]
    with pytest.raises(FormatError, match=r"Try: '.*net\.bin\.index\.json'"):
        read_state(tmp_path)


@pytest.mark.parametrize("name", ["a" * 300 + ".safetensors", "a\0b.safetensors", "\ud800.safetensors"])
def test_names_that_no_file_can_have(name, tmp_path):
    for read in (read_state, load_model, verify):
        with pytest.raises(FileNotFoundError, match="there is no file"):
            read(tmp_path / name)
    (tmp_path / "x.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(FormatError, match="which is not there: get the whole set|points outside its directory"):
        read_state(tmp_path / "x.safetensors")
