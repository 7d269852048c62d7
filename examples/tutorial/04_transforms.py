"""Transforms: ToTensor, Normalize, Resize and Compose on one picture, side by side in a contact sheet."""

import argparse
import tempfile
from pathlib import Path

from material import insects
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torchvision.transforms import Compose, Normalize, Resize, ToTensor
from torchvision.utils import make_grid, save_image

SIDE = 128


def shown(picture: Tensor) -> Tensor:
    """Any (3, H, W) picture as one of (3, SIDE, SIDE) with values from 0 to 1, for the sheet."""
    spread = (picture - picture.min()) / (picture.max() - picture.min())
    return functional.interpolate(spread[None], (SIDE, SIDE))[0]


def main() -> None:
    """Print what each transform makes of the picture, and write the sheet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="a folder with train/ants and train/bees; left out, some are drawn")
    parser.add_argument("--out", type=Path, default=Path("runs/tutorial/transforms.png"), help="the contact sheet")
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
        print(f"{name:9}  {tuple(tensor.shape)!s:14}  from {tensor.min():5.2f} to {tensor.max():5.2f}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_image(make_grid([shown(tensor) for tensor in made.values()], nrow=len(made)), options.out)
    print("contact sheet:", options.out)


if __name__ == "__main__":
    main()
