"""Backward: from the loss to a gradient of every parameter."""

import argparse
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import ToTensor

from material import CIFAR_NEEDED, cifar
from networks import CifarNet


def main() -> None:
    """Print a gradient before a backward pass, after one and after two: they add up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help=CIFAR_NEEDED)
    options = parser.parse_args()
    torch.manual_seed(0)
    network, loss = CifarNet(), nn.CrossEntropyLoss()
    with tempfile.TemporaryDirectory() as scratch:
        data = cifar(options.data, Path(scratch), ToTensor())
        pictures, labels = next(iter(DataLoader(data, 64, shuffle=True)))
    weight = network.sequential[0].weight
    print("before:", weight.grad)
    for times in ("one pass:  ", "two passes:"):
        loss(network(pictures), labels).backward()
        print(times, tuple(weight.grad.shape), f"length {weight.grad.norm():.5f}")
    network.zero_grad()
    print("after zero_grad:", weight.grad)


if __name__ == "__main__":
    main()
