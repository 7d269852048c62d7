"""Narrow a trained resnet18 by half, and train on with the same optimizer.

Half of the channels of every convolution go, those with the smallest weights, and everything that is coupled to them
follows: norms, residual sums, the layers that read them, and what the optimizer remembers. Accuracy, parameters,
multiply-adds and the measured time of a batch are printed before, after, and after training on.
"""

import argparse
import statistics
import time

import torch
from cifar_net import accuracy
from pictures import Batches, load_pictures
from plainly import told_plainly
from rich.console import Console
from rich.table import Table
from torch import nn

from modsurg import Trainer, summary

EXAMPLE = (2, 3, 32, 32)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="DIR", default="digits", help="train/<class>/* and test/<class>/* (digits)")
    parser.add_argument("--epochs", type=int, default=3, help="before, and as many after (default: 3)")
    parser.add_argument("--share", type=float, default=0.5, help="of the channels that stay (default: 0.5)")
    parser.add_argument("--keep", choices=("first", "l1", "l2"), default="l1", help="which channels stay (default: l1)")
    parser.add_argument("--limit", type=int, metavar="N", help="at most N training and N test pictures")
    return parser.parse_args(arguments)


def make_trainer(classes: int) -> Trainer:
    """Make a resnet18 and what trains it."""
    from torchvision.models import resnet18

    torch.manual_seed(0)
    model = resnet18(num_classes=classes)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    return Trainer(model, optimizer, nn.CrossEntropyLoss(), metrics={"accuracy": accuracy}, progress=False)


@torch.no_grad()
def measure(model: nn.Module, pictures: torch.Tensor, repeats: int = 9) -> float:
    """Milliseconds of a forward in evaluation mode: the median of several."""
    was = model.training
    model.eval()
    taken = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        model(pictures)
        taken.append(time.perf_counter() - start)
    model.train(was)
    return 1000 * statistics.median(taken[2:])


def run(options: argparse.Namespace) -> None:
    """Train, narrow, train on."""
    data = load_pictures(options.data, options.limit)
    print(data.source)
    train, test = Batches(data.train, 64, data.train, augment=True), Batches(data.test, 64, data.train)
    batch = torch.randn(64, 3, 32, 32)
    table = Table("resnet18", "parameters", "MACs", "64 pictures", "test accuracy")

    def row(name: str) -> None:
        total = summary(trainer.model, EXAMPLE).to_dict()["total"]
        device = next(trainer.model.parameters()).device
        speed = measure(trainer.model, batch.to(device))
        found = trainer.evaluate(test)["accuracy"]
        macs = f"{total['macs'] / 2e6:.1f} M"
        table.add_row(name, f"{total['params']:,}", macs, f"{speed:.0f} ms", f"{found:.1%}")

    trainer = make_trainer(len(data.train.classes))
    trainer.fit(train, epochs=options.epochs)
    row("trained")
    with trainer.edit(example=EXAMPLE) as e:
        e.resize(nn.Conv2d, out_channels=options.share, follow=True, keep=options.keep)
    print(f"\n{e.report}\n")
    row("narrowed")
    trainer.fit(train, epochs=options.epochs)
    row("trained on")
    Console().print(table)


def main(arguments: list[str] | None = None) -> None:
    """Run the whole of it; what goes wrong is one line."""
    options = parse(arguments)
    with told_plainly():
        run(options)


if __name__ == "__main__":
    main()
