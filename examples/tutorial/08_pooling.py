"""Pooling: the greatest of each 3 x 3 square, ceil_mode both ways, and on a picture."""

import argparse
import tempfile
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torchvision.transforms.functional import to_tensor
from torchvision.utils import save_image

from material import INSECTS_NEEDED, insects


def main() -> None:
    """Print the tutorial's tensor pooled, and write a picture before and after."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help=INSECTS_NEEDED)
    parser.add_argument("--out", type=Path, default="runs/tutorial/pooling.png")
    options = parser.parse_args()
    numbers = torch.arange(1.0, 6.0).expand(3, 5, 5)
    for ceil_mode in (True, False):
        pooled = nn.MaxPool2d(kernel_size=3, ceil_mode=ceil_mode)(numbers)
        shapes = f"{tuple(numbers.shape)} -> {tuple(pooled.shape)}"
        print(f"ceil_mode={ceil_mode}: {shapes}", pooled[0].tolist())
    with tempfile.TemporaryDirectory() as scratch:
        file = min((insects(options.data, Path(scratch)) / "train/bees").iterdir())
        picture = to_tensor(Image.open(file).convert("RGB"))
    pooled = nn.MaxPool2d(kernel_size=3, ceil_mode=True)(picture)
    print("a picture:", tuple(picture.shape), "->", tuple(pooled.shape))
    enlarged = nn.functional.interpolate(pooled[None], picture.shape[1:])[0]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_image([picture, enlarged], options.out)
    print("before and after:", options.out)


if __name__ == "__main__":
    main()
