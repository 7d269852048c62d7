"""Optimizer and epochs: a training loop by hand, and the same training by Trainer."""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchvision.transforms import ToTensor

from material import CIFAR_NEEDED, cifar
from modsurg import Trainer
from networks import CifarNet


def by_hand(network: nn.Module, loader: DataLoader[Any], epochs: int) -> list[float]:
    """The mean loss of each epoch."""
    loss_of, optimizer = nn.CrossEntropyLoss(), torch.optim.Adam(network.parameters())
    losses = []
    for _ in range(epochs):
        total = torch.zeros(())
        for pictures, labels in loader:
            loss = loss_of(network(pictures), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()  # the loss itself would keep every graph alive
        losses.append(total.item() / len(loader))
    return losses


def accuracy(scores: Tensor, labels: Tensor) -> Tensor:
    """For each picture, 1 where the highest score is the right one."""
    return (scores.argmax(1) == labels).float()


def main() -> None:
    """Train twice from the same start; print both losses, and draw the curves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help=CIFAR_NEEDED)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--limit", type=int, default=160, help="train on so many")
    parser.add_argument("--out", type=Path, default="runs/tutorial/curves.png")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        pictures: Any = cifar(options.data, Path(scratch), ToTensor())
        torch.manual_seed(0)
        order, limit = torch.randperm(len(pictures)).tolist(), options.limit
        loader = DataLoader(Subset(pictures, order[:limit]), 32)
        held = DataLoader(Subset(pictures, order[limit:][: limit // 4]), 32)
        network = CifarNet()
        start = {key: value.clone() for key, value in network.state_dict().items()}
        hand = by_hand(network, loader, options.epochs)

        network.load_state_dict(start)
        optimizer = torch.optim.Adam(network.parameters())
        loss = nn.CrossEntropyLoss()
        trainer = Trainer(
            network, optimizer, loss, metrics=[accuracy], device="cpu", progress=False
        )
        history = trainer.fit(loader, held, epochs=options.epochs)
    print("epoch  by hand  Trainer")
    for epoch, (left, right) in enumerate(zip(hand, history["loss"], strict=True), 1):
        print(f"{epoch:5}  {left:7.4f}  {right:7.4f}")
    print(f"pictures held out: {history['val_accuracy'][-1]:.0%} right")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    history.plot(options.out)
    print("curves:", options.out)


if __name__ == "__main__":
    main()
