"""CIFAR-10 and DataLoader: the classes, one sample, and batches of 64 with the last one kept or dropped."""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from material import cifar
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import ToTensor
from torchvision.utils import save_image


def sizes(pictures: Dataset[Any], drop_last: bool) -> list[int]:
    """How many pictures each batch of 64 holds."""
    loader = DataLoader(pictures, batch_size=64, shuffle=True, drop_last=drop_last)
    return [len(labels) for _, labels in loader]


def main() -> None:
    """Print the classes, one sample before and after ToTensor and the sizes of the batches; draw a batch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", type=Path, help="a folder with cifar-10-batches-py, or with test/<class>/*; left out, some are drawn"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/tutorial/batch.png"), help="the picture of one batch")
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
            print(f"drop_last={drop_last}: {len(counts)} batches, the last of {counts[-1]}, {sum(counts)} pictures")
        pictures, labels = next(iter(DataLoader(tensors, batch_size=64, shuffle=True)))
    print("a batch:", tuple(pictures.shape), "and its labels:", labels[:8].tolist(), "...")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_image(pictures, options.out)
    print("drawn, eight in a row:", options.out)


if __name__ == "__main__":
    main()
