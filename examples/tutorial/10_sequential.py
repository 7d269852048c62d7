"""Sequential: the network for CIFAR-10, printed, and 64 pictures sent through it."""

import argparse

import torch
from networks import CifarNet

from modsurg import summary


def main() -> None:
    """Print the network as torch does and as modsurg does, and both shapes."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    network = CifarNet()
    print(network)
    pictures = torch.ones(64, 3, 32, 32)
    print(tuple(pictures.shape), "->", tuple(network(pictures).shape))
    print()
    print(summary(network, example=(64, 3, 32, 32)))


if __name__ == "__main__":
    main()
