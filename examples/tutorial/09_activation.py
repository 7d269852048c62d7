"""Activation: ReLU makes negative numbers zero, and leaves the others."""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn


def main() -> None:
    """Print four numbers before and after each of four activations; draw the curves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default="runs/tutorial/activation.png")
    options = parser.parse_args()
    numbers = torch.tensor([[1.0, -0.5], [-1.0, 3.0]]).reshape(-1, 1, 2, 2)
    print("input:", tuple(numbers.shape), numbers.flatten().tolist())
    figure = Figure(figsize=(8, 3), layout="constrained")
    axis, line = figure.subplots(), torch.linspace(-3, 3, 121)
    for activation in (nn.ReLU(), nn.LeakyReLU(0.1), nn.Sigmoid(), nn.Tanh()):
        values = activation(numbers).flatten().tolist()
        print(f"{activation!s:30}", *(f"{value:5.2f}" for value in values))
        axis.plot(line, activation(line), label=str(activation))
    axis.grid()
    axis.legend()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out)
    print("curves:", options.out)


if __name__ == "__main__":
    main()
