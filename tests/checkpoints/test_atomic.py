"""After a kill, a full disk or two writers at once there is the old file or the new one, whole."""

import errno
import multiprocessing
import os
import signal
import stat
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from modsurg import load_state, read_state, save_model, save_state, verify
from modsurg.checkpoints.formats import atomic
from modsurg.checkpoints.formats.atomic import pending, writing
from modsurg.errors import SaveError


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_the_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "a"
    with writing(path) as file:
        file.write(b"ab")
        assert file.temporary.parent == tmp_path
        assert not path.exists()
        file.write(memoryview(b"cd"))
        file.seek(1)
        file.write(b"X")
    assert path.read_bytes() == b"aXcd"
    assert names(tmp_path) == ["a"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def fail():
        with writing(path) as file:
            file.write(b"new")
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        fail()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_mode_follows_the_umask(mask, mode, tmp_path):
    before = os.umask(mask)
    try:
        save_state({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == mode


def test_a_symbolic_link_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "a")
    with writing(tmp_path / "link") as file:
        file.write(b"x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "a").read_bytes() == b"x"


def test_places_where_nothing_can_be_written(tmp_path):
    with pytest.raises(SaveError, match=r"no directory .*nowhere: Path\(.*\)\.mkdir\(parents=True\)"):
        pending(tmp_path / "nowhere" / "a").__enter__()
    with pytest.raises(SaveError, match=r"is a directory: save to a file name, as in .*model\.safetensors"):
        pending(tmp_path).__enter__()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SaveError, match="is not a regular file: save to another name"):
        pending(tmp_path / "pipe").__enter__()
    with pytest.raises(SaveError, match="can't be written"):
        pending(Path("/proc/a")).__enter__()
    with pytest.raises(SaveError, match=r"can't be the name of a file \(File name too long\)"):
        pending(tmp_path / ("a" * 300)).__enter__()
    with pytest.raises(SaveError, match=r"a\\x00b' can't be the name of a file \(embedded null byte\)"):
        pending(tmp_path / "a\0b").__enter__()
    with pytest.raises(SaveError, match=r"can't be the name of a file \(.*surrogates not allowed\)"):
        pending(tmp_path / "\ud800").__enter__()


def test_a_directory_that_can_be_written_to_and_not_read(tmp_path, monkeypatch):
    real = os.open

    def refuse(path, flags=0, *rest, **options):
        if flags & os.O_DIRECTORY or not flags:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(os, "listdir", refuse)
    path = save_state({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    monkeypatch.undo()
    assert names(tmp_path) == ["a.safetensors"]
    assert verify(path)


def test_a_long_name(tmp_path):
    path = tmp_path / ("ö" * 120 + ".safetensors")
    save_state({"a": torch.ones(1)}, path)
    assert names(tmp_path) == [path.name]


def test_what_a_dead_writer_left_is_cleared_and_a_living_one_is_not(tmp_path):
    path = tmp_path / "a"
    with pending(path) as living:
        left = tmp_path / living.temporary.name.replace(living.temporary.name.split(".")[-2], "0" * 8)
        left.write_bytes(b"left behind")
        other = tmp_path / ".b.00000000.saving"
        other.write_bytes(b"of another target")
        with writing(path) as file:
            file.write(b"new")
        assert names(tmp_path) == sorted([living.temporary.name, other.name, "a"])
    assert names(tmp_path) == sorted([other.name, "a"])


def full_disk(monkeypatch, room):
    """The disk takes `room` bytes and no more."""
    left = [room]
    write = os.write

    def limited(fd, data):
        if left[0] <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = write(fd, memoryview(data)[: left[0]])
        left[0] -= count
        return count

    monkeypatch.setattr(atomic.os, "write", limited)


@pytest.mark.parametrize("room", [0, 1, 100, 5000])
def test_a_full_disk_says_how_much_was_missing(room, tmp_path, monkeypatch):
    path = save_state({"a": torch.zeros(10)}, tmp_path / "a.safetensors")
    full_disk(monkeypatch, room)
    with pytest.raises(
        SaveError, match=r"no room for it \(No space left.*at least [0-9,]+ more bytes.*unchanged"
    ) as caught:
        save_state({"a": torch.zeros(10_000)}, path)
    assert f"{room:,} bytes were written" in str(caught.value)
    assert names(tmp_path) == ["a.safetensors"]
    assert torch.equal(read_state(path)["a"], torch.zeros(10))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_disk_that_is_really_full(suffix, tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("this container may not mount")
    try:
        path = save_state({"a": torch.zeros(100)}, tmp_path / f"a{suffix}")
        with pytest.raises(SaveError, match=r"no room for it .*more"):
            save_state({"a": torch.zeros(1_000_000)}, path)
        with pytest.raises(SaveError, match=r"no room for it .*at least 2,9[0-9,]+ more bytes"):
            save_model(nn.Linear(1000, 1000), path)
        assert names(tmp_path) == [path.name]
        with read_state(path) as state:
            assert torch.equal(state["a"], torch.zeros(100))
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


def test_a_disk_that_fails_when_it_is_flushed(tmp_path, monkeypatch):
    def fsync(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic.os, "fsync", fsync)
    with pytest.raises(SaveError, match="no room for it"):
        save_state({"a": torch.zeros(10)}, tmp_path / "a.safetensors")
    assert names(tmp_path) == []


def test_saving_over_a_file_that_is_mapped(tmp_path):
    from safetensors.torch import load_file

    path = save_state({"a": torch.zeros(100_000)}, tmp_path / "a.safetensors")
    mapped = load_file(path)
    opened = read_state(path)
    save_state({"a": mapped["a"] + 1}, path)
    save_state(mapped, path)
    save_state(opened, path)
    assert mapped["a"].sum() == 0
    assert opened["a"].sum() == 0
    assert verify(path)


CALLS = ("open", "write", "pwrite", "fsync", "replace", "unlink", "close")


def _state(value):
    return {str(i): torch.full((20_000,), value) for i in range(20)}


def _save(path, value):
    size = "400KB" if path.name.endswith(".index.json") else None
    save_state(_state(value), path, shard_size=size)


def _save_and_die(path, moment):
    """Save, but be killed at a given system call, a write half done."""
    torch.set_num_threads(1)
    count = 0

    def dying(name, call):
        def wrapper(first, *rest, **options):
            nonlocal count
            count += 1
            if count == moment and name in ("write", "pwrite"):
                call(first, rest[0][: len(rest[0]) // 2], *rest[1:])
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(first, *rest, **options)

        return wrapper

    for name in CALLS:
        setattr(os, name, dying(name, getattr(os, name)))
    _save(path, 2.0)


def kill_while_saving(path, moments):
    """Kill a saving process at each of these moments and look at what is there."""
    context = multiprocessing.get_context("fork")
    _save(path, 1.0)
    for moment in moments:
        saver = context.Process(target=_save_and_die, args=(path, moment))
        saver.start()
        saver.join()
        found = verify(path)
        assert found, str(found)
        with read_state(path) as state:
            assert {value.item() for tensor in state.values() for value in tensor.unique()} in ({1.0}, {2.0})
    _save(path, 3.0)
    assert len(names(path.parent)) == (5 if path.name.endswith(".index.json") else 1)


@pytest.mark.parametrize("name", ["a.safetensors", "a.safetensors.index.json", "a.pt"])
def test_killed_while_saving(name, tmp_path):
    kill_while_saving(tmp_path / name, [1, 3, 7, 13, 24])


@pytest.mark.soak
@pytest.mark.parametrize("name", ["a.safetensors", "a.safetensors.index.json", "a.pt"])
def test_killed_while_saving_at_every_moment(name, tmp_path):
    kill_while_saving(tmp_path / name, range(1, 101))


def _save_often(path, value, barrier):
    torch.set_num_threads(1)
    barrier.wait()
    for _ in range(20):
        save_state({"a": torch.full((10_000,), value), "b": torch.full((10_000,), value)}, path, shard_size=_size(path))


def _size(path):
    return "50KB" if "index" in str(path) else None


@pytest.mark.parametrize("name", ["a.safetensors", "a.safetensors.index.json"])
def test_two_processes_save_to_one_target(name, tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    path = tmp_path / name
    savers = [context.Process(target=_save_often, args=(path, value, barrier)) for value in (1.0, 2.0)]
    for saver in savers:
        saver.start()
    for saver in savers:
        saver.join()
        assert saver.exitcode == 0
    assert verify(path)
    with read_state(path) as state:
        assert torch.equal(state["a"], state["b"])
    assert not [name for name in names(tmp_path) if name.endswith(".saving")]
    assert len(names(tmp_path)) == (1 if _size(path) is None else 3)


def test_threads_that_save_to_one_target(tmp_path):
    path = tmp_path / "a.safetensors"
    barrier = threading.Barrier(4)
    threads = [threading.Thread(target=_save_often, args=(path, float(i), barrier)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verify(path)
    assert names(tmp_path) == ["a.safetensors"]


def test_a_saved_best_does_not_change_when_training_goes_on(tmp_path):
    model = torch.nn.Linear(3, 3)
    path = save_state(model, tmp_path / "best.safetensors")
    kept = {key: value.clone() for key, value in model.state_dict().items()}
    load_state(model, path)
    with torch.no_grad():
        model.weight.add_(1)
    assert all(torch.equal(read_state(path)[key], value) for key, value in kept.items())
    assert verify(path)


def test_the_mode_of_a_replaced_file_is_kept(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    path.chmod(0o640)
    with writing(path) as file:
        file.write(b"new")
    assert path.stat().st_mode & 0o777 == 0o640
    path.chmod(0o444)
    with pytest.raises(SaveError, match="is write-protected, so it was not replaced"), writing(path):
        pass
    assert path.read_bytes() == b"new"


def test_what_only_looks_like_a_leftover_stays(tmp_path):
    precious = tmp_path / "precious"
    precious.write_bytes(b"x")
    os.symlink(precious, tmp_path / ".a.deadbeef.saving")
    os.mkfifo(tmp_path / ".a.deadbee0.saving")
    os.link(precious, tmp_path / ".a.deadbee1.saving")
    with writing(tmp_path / "a") as file:
        file.write(b"new")
    left = [".a.deadbee0.saving", ".a.deadbee1.saving", ".a.deadbeef.saving", "a", "precious"]
    assert sorted(names(tmp_path)) == left
    assert precious.read_bytes() == b"x"
