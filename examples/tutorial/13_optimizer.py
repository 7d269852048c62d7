"""Optimizer and epochs: the training loop of the tutorial, and the same training by modsurg's Trainer."""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from material import cifar
from networks import CifarNet
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchvision.transforms import ToTensor

from modsurg import Trainer


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
            total += loss.detach()  # the loss itself would keep every batch's graph alive
        losses.append(total.item() / len(loader))
    return losses


def accuracy(scores: Tensor, labels: Tensor) -> Tensor:
    """For each picture, 1 where the highest score is the right one."""
    return (scores.argmax(1) == labels).float()


def main() -> None:
    """Train twice from the same start on the same batches, print the losses side by side, and draw the curves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="as for 05_cifar10_dataloader.py")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--limit", type=int, default=160, help="so many pictures to train on, a quarter more to check")
    parser.add_argument("--out", type=Path, default=Path("runs/tutorial/curves.png"), help="the curves")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        pictures: Any = cifar(options.data, Path(scratch), ToTensor())
        order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0)).tolist()
        loader = DataLoader(Subset(pictures, order[: options.limit]), batch_size=32)
        held = DataLoader(Subset(pictures, order[options.limit :][: options.limit // 4]), batch_size=32)
        torch.manual_seed(0)
        network = CifarNet()
        start = {key: value.clone() for key, value in network.state_dict().items()}
        hand = by_hand(network, loader, options.epochs)

        network.load_state_dict(start)
        optimizer = torch.optim.Adam(network.parameters())
        trainer = Trainer(network, optimizer, nn.CrossEntropyLoss(), metrics=[accuracy], device="cpu", progress=False)
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
