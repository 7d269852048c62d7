"""The pictures of the examples: every source, every bad input, and batches that can be drawn again."""

import pickle
from pathlib import Path

import numpy as np
import pictures
import pytest
import torch
from PIL import Image

REAL = Path(__file__).parents[2] / "shared" / "data" / "cifar10-jpeg.tar.xz"


def write_pictures(root, splits=("train", "test"), classes=("cat", "dog"), size=(40, 36), count=3):
    for split in splits:
        for number, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", size, (number * 100, index, 7)).save(root / split / name / f"{index}.png")


def write_batches(folder, rows=4, labels=None):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("data_batch_1", "data_batch_2", "test_batch"):
        data = rng.integers(0, 256, (rows, 3072), dtype=np.uint8)
        batch = {b"data": data, b"labels": labels or [index % 2 for index in range(rows)]}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": [b"cat", b"dog"]}, protocol=2))
    return data


def shortened(picture):
    """A PNG that says of its pixels that they are 8 bytes fewer."""
    at = picture.index(b"IDAT") - 4
    return picture[:at] + (int.from_bytes(picture[at : at + 4], "big") - 8).to_bytes(4, "big") + picture[at + 4 :]


def test_a_folder_of_classes(tmp_path):
    write_pictures(tmp_path)
    data = pictures.load_pictures(str(tmp_path))
    assert data.train.classes == ("cat", "dog")
    assert data.train.images.shape == (6, 32, 32, 3)
    assert data.train.images.dtype == torch.uint8
    assert data.train.labels.bincount().tolist() == [3, 3]
    assert data.train.images[data.train.labels == 1][:, 0, 0, 0].tolist() == [100, 100, 100]
    assert data.train.may_flip
    assert len(pictures.load_pictures(str(tmp_path), limit=2).train) == 2


def test_a_folder_in_another_size(tmp_path):
    write_pictures(tmp_path)
    assert pictures.load_pictures(str(tmp_path), side=48).test.images.shape == (6, 48, 48, 3)


def test_what_a_desktop_leaves_in_folders_is_no_picture(tmp_path):
    write_pictures(tmp_path)
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "train" / "cat" / "._0.png").write_bytes(b"not a picture")
    data = pictures.load_pictures(str(tmp_path))
    assert (data.train.classes, len(data.train)) == (("cat", "dog"), 6)


def test_val_may_stand_for_test(tmp_path):
    write_pictures(tmp_path, splits=("train", "val"))
    assert len(pictures.load_pictures(str(tmp_path)).test) == 6


@pytest.mark.parametrize("inner", ["", "cifar-10-batches-py"])
def test_cifars_own_batches(tmp_path, inner):
    last = write_batches(tmp_path / "data" / inner)
    data = pictures.load_pictures(str(tmp_path / "data"))
    assert (len(data.train), len(data.test)) == (8, 4)
    first = data.test.images[pictures.mixed(4).argsort()][0]
    assert torch.equal(first.permute(2, 0, 1).reshape(-1), torch.from_numpy(last[0]))


def test_the_digits():
    data = pictures.load_pictures("digits")
    assert len(data.train) + len(data.test) == 1797
    assert data.train.images.shape[1:] == (32, 32, 3)
    assert not data.train.may_flip
    assert torch.equal(data.test.images, pictures.load_pictures("digits").test.images)


def test_without_a_network_the_digits_stand_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pictures, "unreachable", lambda url: "no network")
    assert "can't be downloaded" in pictures.load_pictures(None).source


def test_a_download_that_is_there_is_used(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_batches(tmp_path / "data" / "cifar-10-batches-py")
    assert len(pictures.load_pictures(None).train) == 8


def test_nothing_answers_at_a_closed_port():
    assert pictures.unreachable("http://127.0.0.1:9/x")


class TestBadInput:
    def test_no_folder(self, tmp_path):
        with pytest.raises(pictures.PicturesError, match=r"--data .*nowhere: there is no such folder"):
            pictures.load_pictures(str(tmp_path / "nowhere"))

    def test_no_pictures(self, tmp_path):
        with pytest.raises(pictures.PicturesError, match="no pictures there; it needs"):
            pictures.load_pictures(str(tmp_path))

    def test_empty_classes(self, tmp_path):
        write_pictures(tmp_path)
        (tmp_path / "test" / "eel").mkdir()
        with pytest.raises(pictures.PicturesError, match=r"no pictures in \S*test/eel$"):
            pictures.load_pictures(str(tmp_path))

    def test_no_classes(self, tmp_path):
        write_pictures(tmp_path, classes=())
        (tmp_path / "train").mkdir()
        (tmp_path / "test").mkdir()
        with pytest.raises(pictures.PicturesError, match=r"no pictures in .*train/<class>/"):
            pictures.load_pictures(str(tmp_path))

    def test_other_classes_in_the_test(self, tmp_path):
        write_pictures(tmp_path, splits=("train",))
        write_pictures(tmp_path, splits=("test",), classes=("cat", "eel"))
        with pytest.raises(pictures.PicturesError, match="different classes: dog, eel"):
            pictures.load_pictures(str(tmp_path))

    @pytest.mark.parametrize(
        ("name", "broken"),
        [
            ("1.png", lambda picture: b"<html>"),
            ("1.png", shortened),
            ("1.ppm", lambda picture: b"P6 2x 2 255 "),
        ],
    )
    def test_a_broken_picture(self, tmp_path, name, broken):
        write_pictures(tmp_path)
        picture = (tmp_path / "train" / "cat" / "1.png").read_bytes()
        (tmp_path / "train" / "cat" / name).write_bytes(broken(picture))
        with pytest.raises(pictures.PicturesError, match=rf"cat/{name} is not a picture that can be read"):
            pictures.load_pictures(str(tmp_path))

    def test_a_hostile_batch_runs_nothing(self, tmp_path):
        write_batches(tmp_path / "data")
        (tmp_path / "data" / "data_batch_1").write_bytes(b"cos\nsystem\n(S'touch hacked'\ntR.")
        with pytest.raises(pictures.PicturesError, match=r"data_batch_1 .*asks for os\.system"):
            pictures.load_pictures(str(tmp_path / "data"))

    def test_a_cut_off_batch(self, tmp_path):
        write_batches(tmp_path / "data")
        file = tmp_path / "data" / "test_batch"
        file.write_bytes(file.read_bytes()[:500])
        with pytest.raises(pictures.PicturesError, match="test_batch is not one of CIFAR-10's batches"):
            pictures.load_pictures(str(tmp_path / "data"))

    def test_labels_that_do_not_fit(self, tmp_path):
        write_batches(tmp_path / "data", labels=[0, 1, 2, 9])
        with pytest.raises(pictures.PicturesError, match="labels do not fit"):
            pictures.load_pictures(str(tmp_path / "data"))


class TestBatches:
    def batches(self, **options):
        data = pictures.load_pictures("digits", limit=70)
        return pictures.Batches(data.train, 32, like=data.train, **options)

    def test_shapes_and_scale(self):
        sizes, inputs = zip(*((len(labels), inputs) for inputs, labels in self.batches()), strict=True)
        assert sizes == (32, 32, 6)
        assert len(self.batches()) == 3
        whole = torch.cat(inputs)
        assert whole.shape[1:] == (3, 32, 32)
        torch.testing.assert_close(whole.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)

    def test_an_epoch_can_be_drawn_again(self):
        first, second = self.batches(augment=True, seed=3), self.batches(augment=True, seed=3)
        second.set_epoch(1)
        _, other = list(first), list(second)
        first.set_epoch(1)
        for (inputs, labels), (same, names) in zip(first, other, strict=True):
            assert torch.equal(inputs, same)
            assert torch.equal(labels, names)

    def test_epochs_differ_and_the_generator_of_torch_is_left_alone(self):
        batches = self.batches(augment=True)
        before = torch.get_rng_state()
        first = next(iter(batches))[0]
        batches.set_epoch(1)
        assert not torch.equal(first, next(iter(batches))[0])
        assert torch.equal(before, torch.get_rng_state())


def test_shift_and_flip_moves_whole_pictures():
    images = torch.arange(8 * 8, dtype=torch.uint8).reshape(1, 8, 8, 1).expand(50, 8, 8, 1)
    moved = pictures.shift_and_flip(images, torch.Generator().manual_seed(0), flip=True, reach=0)
    kinds = {bytes(picture.numpy().tobytes()) for picture in moved}
    assert kinds == {images[0].numpy().tobytes(), images[0].flip(1).numpy().tobytes()}
    shifted = pictures.shift_and_flip(images, torch.Generator().manual_seed(0), flip=False, reach=2)
    assert len({picture.numpy().tobytes() for picture in shifted}) > 5
