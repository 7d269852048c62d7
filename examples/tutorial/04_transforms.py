"""Transforms: ToTensor, Normalize, Resize and Compose on one picture, side by side."""

import argparse
import tempfile
from pathlib import Path

from PIL import Image
from torch import Tensor
from torch.nn import functional
from torchvision.transforms import Compose, Normalize, Resize, ToTensor
from torchvision.utils import save_image

from material import INSECTS_NEEDED, insects

SIDE = 128


def shown(picture: Tensor) -> Tensor:
    """Any (3, H, W) picture as (3, SIDE, SIDE) with values from 0 to 1."""
    spread = (picture - picture.min()) / (picture.max() - picture.min())
    return functional.interpolate(spread[None], (SIDE, SIDE))[0]


def main() -> None:
    """Print what each transform makes of the picture, and write the sheet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help=INSECTS_NEEDED)
    parser.add_argument("--out", type=Path, default="runs/tutorial/transforms.png")
    options = parser.parse_args()
    normalize = Normalize(mean=[0.5, 0.5, 0.5], std=[0.25, 0.25, 0.25])
    transforms = {
        "ToTensor": ToTensor(),
        "Normalize": Compose([ToTensor(), normalize]),
        "Resize": Compose([Resize((24, 24)), ToTensor()]),
        "Compose": Compose([Resize((24, 24)), ToTensor(), normalize]),
    }
    with tempfile.TemporaryDirectory() as scratch:
        file = min((insects(options.data, Path(scratch)) / "train/bees").iterdir())
        picture = Image.open(file).convert("RGB")
    made = {name: transform(picture) for name, transform in transforms.items()}
    for name, tensor in made.items():
        lowest, highest = tensor.min(), tensor.max()
        shape = str(tuple(tensor.shape))
        print(f"{name:9}  {shape:14}  from {lowest:5.2f} to {highest:5.2f}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_image([shown(tensor) for tensor in made.values()], options.out)
    print("contact sheet:", options.out)


if __name__ == "__main__":
    main()
