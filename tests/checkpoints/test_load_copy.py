"""What happens when reading fails or is interrupted half-way."""

import errno
import os

import pytest
import torch
from torch import nn

from modsurg import load_state, save_state
from modsurg.checkpoints.formats import file_io as transfer
from modsurg.checkpoints.load import copy as filling
from modsurg.errors import FormatError, IntegrityError, LoadError


def net():
    return nn.Sequential(
        *[nn.Linear(64, 64) for _ in range(5)], nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last)
    )


@pytest.fixture(params=["small", "large"])
def way(request, monkeypatch):
    """Small states are copied aside, large ones are not."""
    monkeypatch.setattr(filling, "JOURNAL_LIMIT", (1 << 30) if request.param == "small" else 0)
    return request.param


def copies(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(model, copied):
    return all(torch.equal(value, copied[key]) for key, value in model.state_dict().items())


def failing(monkeypatch, at, error):
    """The read number `at` fails."""
    real, count = os.preadv, [0]

    def preadv(*arguments):
        count[0] += 1
        if count[0] == at:
            raise error
        return real(*arguments)

    monkeypatch.setattr(transfer.os, "preadv", preadv)
    return count


@pytest.mark.parametrize("suffix, at", [(".safetensors", 1), (".safetensors", 4), (".safetensors", 12), (".pt", 12)])
def test_a_disk_that_fails_half_way(suffix, at, tmp_path, monkeypatch):
    path = save_state(net(), tmp_path / f"a{suffix}")
    model = net()
    before = copies(model)
    failing(monkeypatch, at, OSError(errno.EIO, "Input/output error"))
    with pytest.raises(LoadError, match=r"can't be read \(Input/output error\); nothing was loaded"):
        load_state(model, path)
    assert same(model, before)


def test_a_file_that_is_cut_off_while_it_is_open(tmp_path, way, monkeypatch):
    path = save_state(net(), tmp_path / "a.safetensors")
    model = net()
    before = copies(model)
    plan = filling._distinct

    def cut(fills):
        os.truncate(path, os.path.getsize(path) // 2)
        return plan(fills)

    monkeypatch.setattr(filling, "_distinct", cut)
    with pytest.raises(FormatError, match="cut off while being read"):
        load_state(model, path)
    assert same(model, before)


def test_ctrl_c_leaves_the_old_or_names_what_is_new(tmp_path, way, monkeypatch):
    path = save_state(net(), tmp_path / "a.safetensors")
    model = net()
    before = copies(model)
    failing(monkeypatch, 5, KeyboardInterrupt("Ctrl-C"))
    if way == "small":
        with pytest.raises(KeyboardInterrupt, match="^Ctrl-C$"):
            load_state(model, path)
        assert same(model, before)
    else:
        with pytest.raises(KeyboardInterrupt, match=r"5 of 12 tensors may have new values \(0\.weight to 2\.weight"):
            load_state(model, path)


def test_large_tensors_are_read_in_pieces_by_threads(tmp_path, way, monkeypatch):
    monkeypatch.setattr(transfer, "PIECE", 1000)
    new, model = net(), net()
    path = save_state(new, tmp_path / "a.safetensors")
    load_state(model, path)
    assert same(model, copies(new))


def test_a_failing_thread_stops_the_load(tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "PIECE", 1000)
    path = save_state(net(), tmp_path / "a.safetensors")
    model = net()
    before = copies(model)
    count = failing(monkeypatch, 10, OSError(errno.EIO, "Input/output error"))
    with pytest.raises(LoadError, match="nothing was loaded"):
        load_state(model, path)
    assert same(model, before)
    assert count[0] < 20


def test_a_wrong_hash_is_found_before_anything_is_written(tmp_path, way):
    path = save_state(net(), tmp_path / "a.safetensors")
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    model = net()
    before = copies(model)
    with pytest.raises(IntegrityError, match=r"1 is damaged: 5\.\w+; nothing was loaded\. Get the file again"):
        load_state(model, path, verify=True)
    assert same(model, before)
    load_state(model, path)


def test_no_heap_beyond_one_tensor(tmp_path):
    """Everything that torch allocates passes its allocator, which the profiler sees."""
    model = nn.Sequential(*[nn.Linear(512, 512) for _ in range(40)])
    path = save_state(model, tmp_path / "a.safetensors")
    with torch.profiler.profile(profile_memory=True) as profile:
        load_state(model, path)
    allocated = sum(event.self_cpu_memory_usage for event in profile.key_averages() if event.self_cpu_memory_usage > 0)
    assert allocated <= 512 * 512 * 4


def test_tensors_made_in_inference_mode(tmp_path, way):
    new = net()
    path = save_state(new, tmp_path / "a.safetensors")
    with torch.inference_mode():
        model = net()
    load_state(model, path)
    assert same(model, copies(new))
    half = copies(new)
    with torch.inference_mode():
        model = net().double()
        load_state(model, path)
    assert all(torch.equal(value, half[key].double()) for key, value in model.state_dict().items())


def test_a_large_load_reads_once_and_names_what_was_filled(tmp_path, monkeypatch):
    monkeypatch.setattr(filling, "JOURNAL_LIMIT", 0)
    new, model = net(), net()
    before = copies(model)
    path = save_state(new, tmp_path / "a.safetensors")
    count = failing(monkeypatch, -1, OSError())
    load_state(model, path)
    assert count[0] == len(before)
    model = net()
    before = copies(model)
    failing(monkeypatch, 3, OSError(errno.EIO, "Input/output error"))
    with pytest.raises(LoadError, match=r"Input/output error\); 3 of 12 tensors may have new values \(.*: load again"):
        load_state(model, path)
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    assert len(changed) == 2
