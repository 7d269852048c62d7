"""Sequential: the network for CIFAR-10, printed, and 64 pictures sent through it."""

import argparse
from pathlib import Path

import torch

from modsurg import summary
from networks import CifarNet


def main() -> None:
    """Print the network as torch does and as modsurg does, and both shapes; draw it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default="runs/tutorial/network.svg")
    options = parser.parse_args()
    network = CifarNet()
    print(network)
    pictures = torch.ones(64, 3, 32, 32)
    print(tuple(pictures.shape), "->", tuple(network(pictures).shape))
    print()
    table = summary(network, example=(64, 3, 32, 32))
    print(table)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(table.to_svg())
    print("the same as a picture:", options.out)


if __name__ == "__main__":
    main()
