"""Which format a name has."""

import os

import pytest
import torch

from modsurg import read_state, save_state
from modsurg.errors import FormatError


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(FormatError, match=r"a\.safetensors is no file"):
        read_state(tmp_path / "a.safetensors")


def test_strings_and_paths(tmp_path):
    path = save_state({"a": torch.ones(1)}, str(tmp_path / "a.safetensors"))
    assert list(read_state(str(path))) == list(read_state(path)) == ["a"]


def test_a_file_goes_before_a_set_of_its_name(tmp_path):
    save_state({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "x.safetensors", shard_size=4)
    save_state({"c": torch.ones(1)}, tmp_path / "x.safetensors")
    assert list(read_state(tmp_path / "x.safetensors")) == ["c"]
    assert list(read_state(tmp_path / "x.safetensors.index.json")) == ["a", "b"]


def test_a_directory_with_something_to_open(tmp_path):
    save_state({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match=r"is no file.*; open '.*model\.safetensors'"):
        read_state(tmp_path)
    save_state({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "set.safetensors", shard_size=4)
    with pytest.raises(FormatError, match=r"open '.*set\.safetensors\.index\.json'"):
        read_state(tmp_path)
