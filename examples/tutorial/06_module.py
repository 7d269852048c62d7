"""Module: the smallest network there is, which adds one."""

import argparse

import torch
from torch import Tensor, nn


class AddOne(nn.Module):
    """`forward` says what becomes of the input; calling the module calls it."""

    def forward(self, number: Tensor) -> Tensor:
        """The input and one."""
        return number + 1


def main() -> None:
    """Print one plus one."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    print(AddOne()(torch.tensor(1.0)))


if __name__ == "__main__":
    main()
