"""Sets of files with an index, as Hugging Face's tools read and write them."""

import errno
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from modsurg import load_state, read_state, save_state, verify
from modsurg.checkpoints.formats.safetensors.sharded import parse_size
from modsurg.errors import FormatError, SaveError


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(*[nn.Linear(16, 16) for _ in range(6)])


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def shard_names(count, stem="net", mark=""):
    return [f"{stem}{mark}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def save(path, model=None):
    return save_state(model or net(), path, shard_size="3KB")


def same(model, path):
    with read_state(path) as state:
        return all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_the_layout_that_others_read(tmp_path):
    index = save(tmp_path / "net.safetensors")
    assert index == tmp_path / "net.safetensors.index.json"
    assert names(tmp_path) == sorted([*shard_names(3), index.name])
    data = json.loads(index.read_text())
    assert list(data["weight_map"]) == list(net().state_dict())
    assert data["metadata"]["total_size"] == sum(value.nbytes for value in net().state_dict().values())
    theirs = {}
    for name in shard_names(3):
        assert (tmp_path / name).stat().st_size < 3000 + 2000
        theirs |= load_file(tmp_path / name)
    assert all(torch.equal(theirs[key], value) for key, value in net().state_dict().items())


def test_loaded_by_either_name(tmp_path):
    index = save(tmp_path / "net.safetensors")
    for path in (index, tmp_path / "net.safetensors"):
        model = net(1)
        assert load_state(model, path, verify=True)
        assert same(model, index)


def test_what_fits_into_one_file(tmp_path):
    assert save_state(net(), tmp_path / "net.safetensors", shard_size="1GB") == tmp_path / "net.safetensors"
    index = save_state(net(), tmp_path / "set.safetensors.index.json", shard_size="1GB")
    assert names(tmp_path) == sorted(["net.safetensors", index.name, *shard_names(1, "set")])


def test_a_tensor_larger_than_the_limit_is_alone(tmp_path):
    save_state(
        {"a": torch.ones(2), "b": torch.ones(1000), "c": torch.ones(2)}, tmp_path / "net.safetensors", shard_size=100
    )
    homes = json.loads((tmp_path / "net.safetensors.index.json").read_text())["weight_map"]
    assert homes == dict(zip("abc", shard_names(3), strict=True))


def test_ties_extra_state_and_metadata(tmp_path):
    weight = torch.randn(30, 30)
    state = {"a": weight, "x._extra_state": {"n": (1, 2)}, "b": torch.ones(900), "c": weight}
    index = save_state(state, tmp_path / "net.safetensors", shard_size="3KB", metadata={"epoch": "3"})
    with read_state(index) as found:
        assert list(found) == list(state)
        assert found.source.notes.ties == {"c": "a"}
        assert found["x._extra_state"] == {"n": (1, 2)}
        assert found.metadata == {"epoch": "3"}
    assert verify(index)


def test_same_input_same_bytes(tmp_path):
    for directory in ("one", "two"):
        (tmp_path / directory).mkdir()
        save(tmp_path / directory / "net.safetensors")
    save(tmp_path / "two" / "net.safetensors")
    assert names(tmp_path / "one") == names(tmp_path / "two")
    for name in names(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_new_set_takes_the_place_of_the_old(tmp_path):
    opened = read_state(save(tmp_path / "net.safetensors"))
    index = save(tmp_path / "net.safetensors", net(1))
    assert same(net(1), index)
    assert len(names(tmp_path)) == 4
    assert not set(names(tmp_path)) & set(shard_names(3))
    assert torch.equal(opened["0.weight"], net().state_dict()["0.weight"])
    assert same(net(2), save(tmp_path / "net.safetensors", net(2)))
    assert names(tmp_path) == sorted([*shard_names(3), index.name])


def test_a_set_takes_the_place_of_a_file_of_its_name(tmp_path):
    save_state(net(1), tmp_path / "net.safetensors")
    save(tmp_path / "net.safetensors")
    assert not (tmp_path / "net.safetensors").exists()
    assert same(net(), tmp_path / "net.safetensors")


def test_a_file_takes_the_place_of_a_set_of_its_name(tmp_path):
    save(tmp_path / "net.safetensors")
    save(tmp_path / "other.safetensors")
    save_state(net(1), tmp_path / "net.safetensors", shard_size="1GB")
    assert names(tmp_path) == sorted(["net.safetensors", "other.safetensors.index.json", *shard_names(3, "other")])
    assert same(net(1), tmp_path / "net.safetensors")


def test_a_full_disk_says_how_much_is_missing_of_the_set(tmp_path, monkeypatch):
    def write(fd, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    size = sum(path.stat().st_size for path in save(tmp_path / "net.safetensors").parent.glob("*-of-*"))
    monkeypatch.setattr(os, "write", write)
    with pytest.raises(SaveError, match=rf"at least {size:,} more bytes are needed"):
        save(tmp_path / "net.safetensors")


def test_sizes_in_an_index_need_not_be_whole_numbers(tmp_path):
    index = save(tmp_path / "net.safetensors")
    data = json.loads(index.read_text())
    index.write_text(json.dumps({"metadata": {"total_size": 6528.0}, "weight_map": data["weight_map"]}))
    assert same(net(), index)


def test_the_old_set_is_whole_while_the_new_one_fails(tmp_path, monkeypatch):
    index = save(tmp_path / "net.safetensors")
    real = os.replace

    def rename(old, new):
        if str(new).endswith(".index.json"):
            raise OSError(errno.EIO, "Input/output error")
        real(old, new)

    monkeypatch.setattr(os, "replace", rename)
    with pytest.raises(SaveError, match=r"can't be written \(Input/output error\); it is unchanged"):
        save(tmp_path / "net.safetensors", net(1))
    monkeypatch.undo()
    assert verify(index)
    assert same(net(), index)
    save(tmp_path / "net.safetensors", net(1))
    assert len(names(tmp_path)) == 4
    assert same(net(1), index)


@pytest.mark.parametrize("flushed", range(4))
def test_a_disk_that_is_full_when_it_is_flushed(tmp_path, monkeypatch, flushed):
    """Whether at one of the three files or at the index: nothing is left to take the room that the next save needs."""
    index = save(tmp_path / "net.safetensors")
    real, before = os.fsync, names(tmp_path)
    left = iter(range(flushed))

    def fsync(fd):
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(SaveError, match="no room for it"):
        save(tmp_path / "net.safetensors", net(1))
    monkeypatch.undo()
    assert names(tmp_path) == before
    assert same(net(), index)


def test_files_of_others_are_left_alone(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "net-00001-of-00003.safetensors")
    save_state(net(), tmp_path / "net-00009-of-00009.safetensors.txt.safetensors")
    index = save(tmp_path / "net.safetensors")
    assert same(net(), index)
    assert load_file(tmp_path / "net-00001-of-00003.safetensors").keys() == {"a"}
    assert len(names(tmp_path)) == 6


class TestWrongSets:
    def test_a_missing_file(self, tmp_path):
        index = save(tmp_path / "net.safetensors")
        (tmp_path / shard_names(3)[1]).unlink()
        with pytest.raises(
            FormatError, match=r"names 'net-00002-of-00003\.safetensors', which is not there: get the whole set"
        ):
            load_state(net(), index)

    def test_a_file_of_another_save(self, tmp_path):
        index = save(tmp_path / "net.safetensors")
        (tmp_path / "other").mkdir()
        save(tmp_path / "other" / "net.safetensors", net(1))
        name = shard_names(3)[1]
        (tmp_path / name).write_bytes((tmp_path / "other" / name).read_bytes())
        with pytest.raises(
            FormatError, match=r"net-00002-of-00003\.safetensors is a file of another save than the index"
        ):
            read_state(index)

    def test_marks_of_the_files_that_are_no_text(self, tmp_path):
        index = save(tmp_path / "net.safetensors")
        data = json.loads(index.read_text())
        data["metadata"]["modsurg.shards"] = "\ud800"
        index.write_text(json.dumps(data))
        with pytest.raises(FormatError, match="where a JSON object has to be"):
            read_state(index)

    def test_a_file_that_lacks_a_key(self, tmp_path):
        index = save(tmp_path / "net.safetensors")
        save_file({"a": torch.ones(1)}, tmp_path / shard_names(3)[1])
        with pytest.raises(
            FormatError, match=r"says that net-00002-of-00003.safetensors holds '2\.\w+', and it does not"
        ):
            read_state(index)

    @pytest.mark.parametrize(
        "name", ["../a.safetensors", "/etc/passwd", "a/../../b.safetensors", "..\\a", "", "a\0b", 3, None]
    )
    def test_an_index_that_points_outside(self, name, tmp_path):
        index = tmp_path / "net.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(FormatError, match="points outside its directory: 'a' is in"):
            read_state(index)

    @pytest.mark.parametrize(
        "text, message",
        [
            ("{}", "it has no weight_map"),
            ('{"weight_map": []}', "it has no weight_map"),
            ('{"weight_map": {}, "metadata": 3}', "it has no weight_map"),
            ('{"weight_map": {"a": "x"}, "weight_map": {}}', "'weight_map' twice"),
            ('{"a": ' + "[" * 100_000, "nested far too deeply"),
            ("<html>", "is an HTML page"),
            ("version https://git-lfs.github.com/spec/v1", "is a git-LFS pointer"),
            ("", "where a JSON object has to be"),
            ('{"weight_map": {"a": "net.safetensors.index.json"}}', "points at another index"),
        ],
    )
    def test_an_index_that_is_none(self, text, message, tmp_path):
        index = tmp_path / "net.safetensors.index.json"
        index.write_text(text)
        with pytest.raises(FormatError, match=rf"net\.safetensors\.index\.json.*{message}"):
            read_state(index)

    def test_a_changed_index_is_told(self, tmp_path):
        index = save_state(net(), tmp_path / "net.safetensors", shard_size="3KB", metadata={"epoch": "3"})
        assert verify(index)
        index.write_text(index.read_text().replace('"epoch": "3"', '"epoch": "4"'))
        found = verify(index)
        assert not found
        assert "the header is not the one that was written" in str(found)


@pytest.mark.parametrize(
    "size, count", [("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), ("1.5GiB", 3 * 2**29), (7, 7), ("7", 7), ("2KB", 2000)]
)
def test_sizes(size, count):
    assert parse_size(size) == count


@pytest.mark.parametrize("size", ["", "five", "5XB", 0, -3, "-1GB", "nan", 2.5e-1])
def test_no_size(size, tmp_path):
    with pytest.raises(SaveError, match='is not a size: give bytes, or a text such as "5GB"'):
        save_state(net(), tmp_path / "net.safetensors", shard_size=size)
    assert names(tmp_path) == []


def test_only_safetensors_are_split(tmp_path):
    with pytest.raises(SaveError, match=r"only safetensors are split.*name it net\.safetensors"):
        save_state(net(), tmp_path / "net.pt", shard_size="1MB")


def test_no_directory(tmp_path):
    with pytest.raises(SaveError, match="there is no directory"):
        save(tmp_path / "nowhere" / "net.safetensors")


@pytest.mark.models
def test_others_read_ours_and_we_theirs(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    hub = pytest.importorskip("huggingface_hub")
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=99
    )
    model, other = transformers.BertForMaskedLM(config).eval(), transformers.BertForMaskedLM(config).eval()
    save_state(model, tmp_path / "model.safetensors", shard_size="20KB")
    config.save_pretrained(tmp_path)
    theirs = transformers.BertForMaskedLM.from_pretrained(tmp_path).eval()
    tokens = torch.arange(10)[None]
    assert torch.equal(theirs(tokens).logits, model(tokens).logits)
    accelerate.load_checkpoint_in_model(other, str(tmp_path / "model.safetensors.index.json"))
    other.tie_weights()
    assert torch.equal(other(tokens).logits, model(tokens).logits)

    (tmp_path / "theirs").mkdir()
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    fresh = transformers.BertForMaskedLM(config).eval()
    load_state(fresh, tmp_path / "theirs" / "model.safetensors.index.json")
    assert torch.equal(fresh(tokens).logits, model(tokens).logits)

    (tmp_path / "hub").mkdir()
    hub.save_torch_state_dict(model.state_dict(), str(tmp_path / "hub"), max_shard_size="20KB")
    fresh = transformers.BertForMaskedLM(config).eval()
    load_state(fresh, tmp_path / "hub" / "model.safetensors.index.json")
    assert torch.equal(fresh(tokens).logits, model(tokens).logits)


def test_a_link_or_a_directory_is_no_target(tmp_path):
    (tmp_path / "net.safetensors").mkdir()
    with pytest.raises(SaveError, match=r"net\.safetensors is a link or a directory: give a file name"):
        save(tmp_path / "net.safetensors")
    (tmp_path / "x.safetensors.index.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(SaveError, match=r"x\.safetensors\.index\.json is a link"):
        save(tmp_path / "x.safetensors")


def test_only_files_of_our_own_are_removed(tmp_path):
    """An index from somewhere else may name anything."""
    (tmp_path / "sub").mkdir()
    others = ["sub/a.safetensors", "other.safetensors", "notes.txt", "m-00001-of-00003.safetensors"]
    for name in others:
        (tmp_path / name).write_text("x")
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict(zip("abcd", others, strict=True))}))
    save_state(net(), index, shard_size=16)
    assert all((tmp_path / name).read_text() == "x" for name in others)
    save_state(net(), tmp_path / "m.safetensors")
    assert all((tmp_path / name).read_text() == "x" for name in others)


def test_a_file_takes_the_place_of_a_set(tmp_path):
    save(tmp_path / "net.safetensors")
    save_state(net(1), tmp_path / "net.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["net.safetensors"]
    assert same(net(1), tmp_path / "net.safetensors")


def test_one_file_under_many_names(tmp_path):
    save_state(net(), tmp_path / "a.safetensors")
    index = tmp_path / "m.safetensors.index.json"
    keys = list(net().state_dict())
    index.write_text(json.dumps({"weight_map": dict(zip(keys, ["a.safetensors", "./a.safetensors"], strict=False))}))
    with pytest.raises(FormatError, match="points outside its directory"):
        read_state(index)
    os.link(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    index.write_text(json.dumps({"weight_map": dict(zip(keys, ["a.safetensors", "b.safetensors"], strict=False))}))
    with pytest.raises(FormatError, match="has one file under two names"):
        read_state(index)
