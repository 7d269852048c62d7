"""Activation: ReLU makes negative numbers zero, and leaves the others."""

import argparse

import torch
from torch import nn


def main() -> None:
    """Print the tutorial's numbers before and after, and other activations beside them."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    numbers = torch.tensor([[1.0, -0.5], [-1.0, 3.0]]).reshape(-1, 1, 2, 2)
    print("input:", tuple(numbers.shape), numbers.flatten().tolist())
    for activation in (nn.ReLU(), nn.LeakyReLU(0.1), nn.Sigmoid(), nn.Tanh()):
        values = " ".join(f"{value:5.2f}" for value in activation(numbers).flatten().tolist())
        print(f"{activation!s:30} {values}")


if __name__ == "__main__":
    main()
