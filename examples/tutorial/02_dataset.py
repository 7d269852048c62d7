"""Dataset: a folder of pictures and a label; two of them joined by a plus."""

import argparse
import tempfile
from pathlib import Path

from PIL import Image
from torch.utils.data import Dataset

from material import INSECTS_NEEDED, insects


class Labelled(Dataset[tuple[Image.Image, str]]):
    """The pictures of one folder, all with one label.

    A data set needs `__getitem__`; with `__len__` a loader can shuffle it.
    """

    def __init__(self, folder: Path, label: str) -> None:
        self.files = sorted(folder.iterdir())
        self.label = label

    def __getitem__(self, index: int) -> tuple[Image.Image, str]:
        return Image.open(self.files[index]), self.label

    def __len__(self) -> int:
        return len(self.files)


def main() -> None:
    """Count ants, bees and both; look at both sides of where the folders meet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help=INSECTS_NEEDED)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = insects(options.data, Path(scratch)) / "train"
        train_ants = Labelled(folder / "ants", "ants")
        train_bees = Labelled(folder / "bees", "bees")
        train = train_ants + train_bees
        print("ants, bees, both:", len(train_ants), len(train_bees), len(train))
        for index in (len(train_ants) - 1, len(train_ants)):
            picture, label = train[index]
            with picture:
                print(f"train[{index}]:", picture.format, picture.size, label)


if __name__ == "__main__":
    main()
