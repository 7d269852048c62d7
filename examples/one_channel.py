"""A resnet18 for gray pictures: its first layer takes one channel instead of three, and what it learned is kept.

The three input channels become their sum, so that a gray picture gets the answer that it got as red = green = blue.
The script proves that, keeps the model, and has a fresh process open it and answer again.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from plainly import told_plainly

from modsurg import load_state, resize, save_model

ANSWER = """
import sys, torch
from modsurg import load_model
print(load_model(sys.argv[1])(torch.load(sys.argv[2])).double().sum().item())
"""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--weights", type=Path, metavar="FILE", help="torchvision's resnet18-*.pth; default: random ones"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/one_channel"), help="default: runs/one_channel")
    return parser.parse_args(arguments)


@torch.no_grad()
def run(options: argparse.Namespace) -> None:
    """Resize, compare, keep, open elsewhere."""
    from torchvision.models import resnet18

    torch.manual_seed(0)
    model = resnet18().eval()
    if options.weights:
        print(load_state(model, options.weights))
    gray = torch.rand(4, 1, 224, 224)
    before = model(gray.expand(-1, 3, -1, -1))

    print(resize(model, "conv1", in_channels=1, example=(1, 1, 224, 224)))
    after = model(gray)
    largest = (after - before).abs().max() / before.abs().max()
    print(f"four gray pictures: answers differ by {largest:.1e} of the largest, which is rounding\n")

    options.out.mkdir(parents=True, exist_ok=True)
    file, pictures = options.out / "gray.safetensors", options.out / "pictures.pt"
    save_model(model, file)
    torch.save(gray, pictures)
    there = subprocess.run([sys.executable, "-c", ANSWER, file, pictures], capture_output=True, text=True, check=True)
    print(f"kept in {file}; the sum of its answers: here {after.double().sum().item()!r}")
    print(f"  in a fresh process, without this script: {there.stdout.strip()}")


def main(arguments: list[str] | None = None) -> None:
    """Run the whole of it; what goes wrong is one line."""
    options = parse(arguments)
    with told_plainly():
        run(options)


if __name__ == "__main__":
    main()
