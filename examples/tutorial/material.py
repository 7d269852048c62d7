"""What the tutorial's scripts work on: pictures of the user's, or drawn here."""

from pathlib import Path
from random import Random
from typing import Any

from PIL import Image, ImageDraw
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10, ImageFolder

CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
INSECTS = {"ants": 124, "bees": 121}
HELD = {"ants": 70, "bees": 83}
INSECTS_NEEDED = "a folder with train/ants and train/bees; left out, some are drawn"
CIFAR_NEEDED = (
    "a folder with cifar-10-batches-py or test/<class>/*; left out, some are drawn"
)


def insects(given: Path | None, scratch: Path) -> Path:
    """A folder with train/ants and train/bees; if drawn, with val/ of both too.

    Args:
        given: The folder that the user named; None draws as many as the real set has.
        scratch: Where they are drawn.

    Raises:
        SystemExit: `given` is no such folder; the message says what it needs.
    """
    if given is not None:
        if not all(any((given / "train" / name).glob("*.jpg")) for name in INSECTS):
            raise SystemExit(
                f"--data {given}: it needs train/ants/*.jpg and train/bees/*.jpg"
            )
        return given
    for split, counts in (("train", INSECTS), ("val", HELD)):
        for name, count in counts.items():
            folder = scratch / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                _insect(name, Random(f"{split} {name} {number}")).save(
                    folder / f"{number:04}.jpg"
                )
    return scratch


def _insect(name: str, chance: Random) -> Image.Image:
    """Three ovals and six legs; a bee is striped and has wings."""
    width, height = chance.randrange(120, 200), chance.randrange(90, 150)
    picture = Image.new(
        "RGB", (width, height), tuple(chance.randrange(150, 240) for _ in range(3))
    )
    draw = ImageDraw.Draw(picture)
    middle, step = height // 2 + chance.randrange(-10, 10), width // 5
    body = "goldenrod" if name == "bees" else "maroon"
    for part in range(1, 4):
        draw.line(
            (part * step, middle + 30, (part + 1) * step, middle - 30), "black", 3
        )
        draw.ellipse(
            (part * step, middle - 16, part * step + step + 6, middle + 16),
            body,
            "black",
        )
    if name == "bees":
        draw.ellipse((2 * step, middle - 44, 3 * step, middle - 10), "white", "gray")
        for stripe in range(3 * step, 4 * step, 10):
            draw.line((stripe, middle - 12, stripe, middle + 12), "black", 4)
    return picture


def cifar(given: Path | None, scratch: Path, transform: Any = None) -> Dataset[Any]:
    """Pictures of CIFAR-10's ten classes, 32 x 32, in RGB; `.classes` names them.

    Args:
        given: A folder as in CIFAR_NEEDED; None draws 20 pictures of each class.
        scratch: Where they are drawn.
        transform: Applied to each picture.
    """
    if given is not None and (given / CIFAR10.base_folder).is_dir():
        batches: Dataset[Any] = CIFAR10(str(given), train=False, transform=transform)
        return batches
    if given is None:
        for label, name in enumerate(CLASSES):
            folder = scratch / "test" / name
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(20):
                _emblem(label, Random(f"{name} {number}")).save(
                    folder / f"{number:04}.png"
                )
    folder = (given or scratch) / "test"
    if not folder.is_dir():
        raise SystemExit(
            f"--data {given}: it needs {CIFAR10.base_folder}/ or test/<class>/*.png"
        )
    pictures: Dataset[Any] = ImageFolder(str(folder), transform=transform)
    return pictures


def _emblem(label: int, chance: Random) -> Image.Image:
    """Ten classes: a shape of 3 to 7 corners, light on dark or dark on light."""
    ground, figure = (chance.randrange(0, 70), chance.randrange(180, 256))[
        :: 1 if label < 5 else -1
    ]
    picture = Image.new("RGB", (32, 32), (ground, ground, chance.randrange(256)))
    centre = (
        chance.randrange(14, 18),
        chance.randrange(14, 18),
        chance.randrange(8, 12),
    )
    ImageDraw.Draw(picture).regular_polygon(
        centre, 3 + label % 5, chance.randrange(360), (figure, figure, figure)
    )
    return picture
