"""Pictures for the examples: found, decoded once, kept in memory as bytes, and drawn into augmented batches.

`load_pictures` knows three sources: a folder that the user names, torchvision's CIFAR-10 download, and the 1,797 real
handwritten digits that scikit-learn ships, enlarged to 32x32 RGB.
"""

import io
import pickle
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

SIDE = 32
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".gif"}
REACH_SECONDS = 5.0


class PicturesError(ValueError):
    """Pictures that can't be read; the message is one line for the user."""


@dataclass(frozen=True)
class Pictures:
    """Decoded pictures: `images` is uint8 (N, side, side, 3), `labels` int64 (N,), both on the CPU."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def may_flip(self) -> bool:
        """Whether a mirrored picture still belongs to its class: a frog does, a digit or a letter does not."""
        return all(len(name) > 1 for name in self.classes)

    def first(self, count: int | None) -> "Pictures":
        """`count` pictures drawn evenly over the whole, or all of them; always the same, in the same mixed order."""
        chosen = mixed(len(self), count)
        return replace(self, images=self.images[chosen], labels=self.labels[chosen])


@dataclass(frozen=True)
class Data:
    """Training and test pictures, and one line that says where they come from."""

    train: Pictures
    test: Pictures
    source: str


def mixed(count: int, limit: int | None = None) -> Tensor:
    """The numbers below `count` in an order that is always the same, at most `limit` of them."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:limit]


class Batches:
    """Normalised batches of pictures: (inputs float32 (B, 3, side, side), labels int64 (B,)).

    Order and augmentation are a function of the seed, the epoch and the batch alone, so that a run resumed in a new
    process sees the very batches that it would have seen. `set_epoch` says which epoch comes next.

    Args:
        pictures: What to draw from.
        batch_size: Pictures in a batch; the last batch holds what is left.
        like: The pictures whose mean and deviation normalise these; the training pictures.
        augment: Shuffle, crop (up to 2 pixels each way) and, where the classes allow it, flip.
        seed: Of order and augmentation.
    """

    def __init__(
        self, pictures: Pictures, batch_size: int, like: Pictures, augment: bool = False, seed: int = 0
    ) -> None:
        self.dataset, self.batch_size, self.augment, self.seed, self.epoch = pictures, batch_size, augment, seed, 0
        scaled = like.images[:: max(1, len(like) // 10_000)].float() / 255
        self.mean, self.deviation = scaled.mean((0, 1, 2)), scaled.std((0, 1, 2)).clamp_min(1e-3)

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Draw the batches of this epoch, counted from 0, from now on."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.dataset), generator=generator) if self.augment else None
        for start in range(0, len(self.dataset), self.batch_size):
            chosen: slice | Tensor = slice(start, start + self.batch_size)
            images = self.dataset.images[chosen if order is None else order[chosen]]
            labels = self.dataset.labels[chosen if order is None else order[chosen]]
            if self.augment:
                images = shift_and_flip(images, generator, self.dataset.may_flip)
            yield ((images.float() / 255 - self.mean) / self.deviation).permute(0, 3, 1, 2), labels


def shift_and_flip(images: Tensor, generator: torch.Generator, flip: bool, reach: int = 2) -> Tensor:
    """Move each picture by up to `reach` pixels, its edge repeated, and mirror about half of them.

    Args:
        images: uint8 (B, H, W, C).
        generator: Where the chances come from.
        flip: Mirror at all.
        reach: The furthest move, in pixels.

    Returns:
        uint8 (B, H, W, C), by one gather.

    Example:
        >>> images = torch.arange(18, dtype=torch.uint8).reshape(1, 3, 3, 2)
        >>> shift_and_flip(images, torch.Generator().manual_seed(0), flip=True).shape
        torch.Size([1, 3, 3, 2])
    """
    count, height, width, _ = images.shape
    moves = torch.randint(-reach, reach + 1, (2, count, 1), generator=generator)
    rows = (torch.arange(height) + moves[0]).clamp_(0, height - 1)
    columns = (torch.arange(width) + moves[1]).clamp_(0, width - 1)
    if flip:
        mirrored = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    return images[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]


def load_pictures(data: str | None, limit: int | None = None, side: int = SIDE) -> Data:
    """Find, decode and keep the pictures.

    Args:
        data: A folder with CIFAR-10's batches or with train/<class>/* and test/<class>/* pictures; "digits" for the
            embedded ones; None for torchvision's download, with the digits where it can't be reached.
        limit: At most so many training and so many test pictures.
        side: Of a folder's pictures, in pixels; the other sources have 32.

    Raises:
        PicturesError: The folder is not there, or holds no pictures, or one that can't be read.
    """
    if data is None:
        found = _downloaded()
    elif data == "digits":
        found = _digits("Data: the 1,797 handwritten digits that scikit-learn ships, as 32x32 RGB.")
    else:
        found = _folder(Path(data).expanduser(), limit, side)
    return replace(found, train=found.train.first(limit), test=found.test.first(limit))


def _folder(folder: Path, limit: int | None, side: int) -> Data:
    if not folder.is_dir():
        raise PicturesError(f"--data {folder}: there is no such folder")
    for batches in (folder, folder / "cifar-10-batches-py"):
        if (batches / "data_batch_1").is_file():
            return _cifar_batches(batches)
    test = next((folder / name for name in ("test", "val") if (folder / name).is_dir()), None)
    if test is None or not (folder / "train").is_dir():
        raise PicturesError(
            f"--data {folder}: no pictures there; it needs CIFAR-10's data_batch_1 ... test_batch, "
            "or train/<class>/* and test/<class>/*"
        )
    train, held = _decode_split(folder / "train", limit, side), _decode_split(test, limit, side)
    if train.classes != held.classes:
        odd = sorted(set(train.classes) ^ set(held.classes))
        raise PicturesError(f"--data {folder}: train and {test.name} have different classes: {', '.join(odd)}")
    return Data(train, held, f"Data: {len(train):,} + {len(held):,} pictures in {folder}.")


def _decode_split(split: Path, limit: int | None, side: int) -> Pictures:
    """Decode at most `limit` of split/<class>/*, of all classes alike."""
    folders = sorted(path for path in split.iterdir() if path.is_dir() and not path.name.startswith("."))
    found = [
        [path for path in sorted(folder.iterdir()) if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")]
        for folder in folders
    ]
    empty = [str(folder) for folder, paths in zip(folders, found, strict=True) if not paths]
    if empty or not folders:
        raise PicturesError(f"--data {split.parent}: no pictures in {', '.join(empty) or f'{split}/<class>/'}")
    files = [(path, label) for label, paths in enumerate(found) for path in paths]
    files = [files[number] for number in mixed(len(files), limit).tolist()]
    images = np.empty((len(files), side, side, 3), np.uint8)
    for row, (path, _) in enumerate(files):
        images[row] = _decode(path, side)
    labels = torch.tensor([label for _, label in files])
    return Pictures(torch.from_numpy(images), labels, tuple(folder.name for folder in folders))


def _decode(path: Path, side: int) -> np.ndarray:
    """One picture as (side, side, 3) bytes: its shorter side scaled to that, its middle kept."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            picture = file.convert("RGB")
            return np.asarray(picture if picture.size == (side, side) else ImageOps.fit(picture, (side, side)))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise PicturesError(f"--data: {path} is not a picture that can be read ({error})") from None


class _BatchUnpickler(pickle.Unpickler):
    """Reads CIFAR-10's pickles (dicts of bytes, lists and one numpy array) and nothing else."""

    ALLOWED = frozenset({"_reconstruct", "ndarray", "dtype", "_frombuffer", "encode"})

    def find_class(self, module: str, name: str) -> Any:
        """Numpy's own rebuilding functions; every other name is refused."""
        if name in self.ALLOWED and module.split(".")[0] in {"numpy", "_codecs"}:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _read_batch(path: Path) -> dict[bytes, Any]:
    try:
        batch = _BatchUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except (OSError, ValueError, EOFError, AttributeError, ImportError, IndexError, pickle.UnpicklingError) as error:
        raise PicturesError(f"--data: {path} is not one of CIFAR-10's batches ({error})") from None
    if not isinstance(batch, dict):
        raise PicturesError(f"--data: {path} is not one of CIFAR-10's batches (a {type(batch).__name__}, no dict)")
    return batch


def _cifar_batches(folder: Path) -> Data:
    names = [name for name in sorted(path.name for path in folder.iterdir()) if name.startswith("data_batch_")]
    meta = _read_batch(folder / "batches.meta")
    classes = tuple(name.decode() for name in meta.get(b"label_names", ()))
    train = _join([_read_batch(folder / name) for name in names], classes, folder)
    test = _join([_read_batch(folder / "test_batch")], classes, folder)
    return Data(train, test, f"Data: {len(train):,} + {len(test):,} CIFAR-10 pictures in {folder}.")


def _join(batches: list[dict[bytes, Any]], classes: tuple[str, ...], folder: Path) -> Pictures:
    try:
        rows = np.concatenate([batch[b"data"] for batch in batches]).reshape(-1, 3, SIDE, SIDE)
        labels = torch.tensor([label for batch in batches for label in batch[b"labels"]])
    except (KeyError, ValueError, TypeError) as error:
        raise PicturesError(f"--data {folder}: a batch does not hold CIFAR-10's pictures ({error!r})") from None
    images = torch.from_numpy(np.ascontiguousarray(rows.transpose(0, 2, 3, 1), dtype=np.uint8))
    if len(images) != len(labels) or not len(labels) or not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
        raise PicturesError(f"--data {folder}: the labels do not fit the pictures")
    return Pictures(images, labels, classes)


def _downloaded() -> Data:
    """The CIFAR-10 of torchvision in ./data, or the digits where it can't be had."""
    from torchvision.datasets import CIFAR10

    root = Path("data")
    if not (root / CIFAR10.base_folder / "test_batch").is_file():
        trouble = unreachable(CIFAR10.url)
        if not trouble:
            try:
                CIFAR10(str(root), download=True)
            except (OSError, RuntimeError) as error:
                trouble = str(error)
        if trouble:
            return _digits(
                "Data: CIFAR-10 can't be downloaded here; going on with the 1,797 handwritten digits "
                "that scikit-learn ships, as 32x32 RGB."
            )
    return _cifar_batches(root / CIFAR10.base_folder)


def unreachable(url: str) -> str:
    """Why `url` does not answer within a few seconds, looking its name up included; "" when it does."""
    outcome = ["no answer"]

    def ask() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD")
            with urllib.request.urlopen(request, timeout=REACH_SECONDS):
                outcome[0] = ""
        except (OSError, ValueError) as error:
            outcome[0] = str(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(REACH_SECONDS)
    return outcome[0]


def _digits(source: str) -> Data:
    """Four of five digits to train on, the fifth to test."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise PicturesError('the digits need scikit-learn: pip install "modsurg[vision]"') from None

    digits = load_digits()
    small = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
    large = functional.interpolate(small, (SIDE, SIDE), mode="bilinear").round().to(torch.uint8)
    images = large.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).contiguous()
    labels = torch.from_numpy(digits.target).long()
    order = mixed(len(labels))
    held, kept = order[: len(order) // 5], order[len(order) // 5 :]
    classes = tuple(str(name) for name in digits.target_names)
    return Data(Pictures(images[kept], labels[kept], classes), Pictures(images[held], labels[held], classes), source)
