"""CIFAR-10 and DataLoader: classes, one sample, and batches of 64."""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import ToTensor
from torchvision.utils import save_image

from material import CIFAR_NEEDED, cifar


def sizes(pictures: Dataset[Any], drop_last: bool) -> list[int]:
    """How many pictures each batch of 64 holds."""
    loader = DataLoader(pictures, batch_size=64, shuffle=True, drop_last=drop_last)
    return [len(labels) for _, labels in loader]


def main() -> None:
    """Print the classes, a sample and the sizes of the batches; draw one batch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help=CIFAR_NEEDED)
    parser.add_argument("--out", type=Path, default="runs/tutorial/batch.png")
    options = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        plain: Any = cifar(options.data, Path(scratch))
        tensors: Any = cifar(options.data, Path(scratch), ToTensor())
        picture, label = plain[0]
        print(plain.classes)
        print("a sample:", picture.mode, picture.size, label, plain.classes[label])
        print("as a tensor:", tuple(tensors[0][0].shape), tensors[0][0].dtype)
        for drop_last in (False, True):
            counts = sizes(tensors, drop_last)
            found = f"{len(counts)} batches, the last of {counts[-1]}"
            print(f"drop_last={drop_last}: {found}, {sum(counts)} pictures")
        pictures, labels = next(iter(DataLoader(tensors, batch_size=64, shuffle=True)))
    print("a batch:", tuple(pictures.shape), "labels:", labels[:8].tolist(), "...")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_image(pictures, options.out)
    print("drawn, eight in a row:", options.out)


if __name__ == "__main__":
    main()
