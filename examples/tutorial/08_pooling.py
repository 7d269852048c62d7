"""Pooling: the greatest of each 3 x 3 square, with ceil_mode both ways, and on a picture."""

import argparse
import tempfile
from pathlib import Path

import torch
from material import insects
from PIL import Image
from torch import nn
from torchvision.transforms.functional import to_tensor
from torchvision.utils import save_image


def main() -> None:
    """Print the tutorial's tensor pooled, and write a picture before and after."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="a folder with train/ants and train/bees; left out, some are drawn")
    parser.add_argument("--out", type=Path, default=Path("runs/tutorial/pooling.png"), help="the picture")
    options = parser.parse_args()
    numbers = torch.arange(1.0, 6.0).expand(3, 5, 5)
    for ceil_mode in (True, False):
        pooled = nn.MaxPool2d(kernel_size=3, ceil_mode=ceil_mode)(numbers)
        print(f"ceil_mode={ceil_mode}: {tuple(numbers.shape)} -> {tuple(pooled.shape)}", pooled[0].tolist())
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
