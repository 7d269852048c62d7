"""Losses: how far an answer is from the right one, as one number."""

import argparse

import torch
from torch import nn


def main() -> None:
    """Print three losses, and cross entropy made by hand beside torch's."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    inputs = torch.tensor([1.0, 2.0, 3.0]).reshape(-1, 1, 1, 3)
    targets = torch.tensor([1.0, 2.0, 5.0]).reshape(-1, 1, 1, 3)
    print("L1, sum: ", nn.L1Loss(reduction="sum")(inputs, targets))
    print("L1, mean:", nn.L1Loss(reduction="mean")(inputs, targets))
    print("MSE:     ", nn.MSELoss()(inputs, targets))

    torch.manual_seed(0)
    scores, classes = torch.randn(10, 4), torch.randint(0, 4, (10,))
    by_hand = -scores.log_softmax(1)[torch.arange(10), classes].mean()
    loss = nn.CrossEntropyLoss()(scores, classes)
    print(f"cross entropy: {loss:.4f}, by hand {by_hand:.4f}")


if __name__ == "__main__":
    main()
