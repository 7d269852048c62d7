"""Convolution: from 3 channels to 6 with 3 x 3 kernels, on a 5 x 5 picture."""

import argparse

import torch
from torch import nn

from modsurg import summary


def main() -> None:
    """Print the shapes, and what one kernel does that can be checked by head."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.manual_seed(0)
    picture = torch.arange(1.0, 6.0).expand(3, 5, 5)
    print("one channel of the picture:", picture[0], sep="\n")
    convolution = nn.Conv2d(3, 6, kernel_size=3, stride=1, padding=0)
    print(tuple(picture.shape), "->", tuple(convolution(picture).shape))
    nn.init.ones_(convolution.weight)
    nn.init.zeros_(convolution.bias)
    print("with every weight 1, a pixel is the sum of 27:")
    print(convolution(picture)[0])
    print(summary(convolution, example=(1, 3, 5, 5)))


if __name__ == "__main__":
    main()
