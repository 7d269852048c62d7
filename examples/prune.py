"""Take blocks out of a trained resnet18, and train on with the same optimizer.

Each block that can go is tried: taken out, the accuracy measured, put back by `undo`. Those that are missed least then
go for good. Training goes on where it was: what the optimizer remembers of the other layers stays.
"""

import argparse

import torch
from cifar_net import accuracy
from pictures import Batches, load_pictures
from plainly import told_plainly
from rich.console import Console
from rich.table import Table
from torch import nn

from modsurg import Trainer, remove, select, summary

EXAMPLE = (2, 3, 32, 32)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="DIR", default="digits", help="train/<class>/* and test/<class>/* (digits)")
    parser.add_argument("--epochs", type=int, default=3, help="before, and half as many after (default: 3)")
    parser.add_argument("--drop", type=int, default=2, metavar="N", help="blocks to take out (default: 2)")
    parser.add_argument("--limit", type=int, metavar="N", help="at most N training and N test pictures")
    return parser.parse_args(arguments)


def make_trainer(classes: int) -> Trainer:
    """A resnet18 and what trains it."""
    from torchvision.models import resnet18

    torch.manual_seed(0)
    model = resnet18(num_classes=classes)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    return Trainer(model, optimizer, nn.CrossEntropyLoss(), metrics={"accuracy": accuracy}, progress=False)


def worth(trainer: Trainer, test: Batches) -> dict[str, float]:
    """Path of each block that keeps its shape -> accuracy without it, the highest first."""
    found = {}
    for path in select(trainer.model, "layer?.1").paths:
        report = remove(trainer.model, path, example=EXAMPLE)
        found[path] = trainer.evaluate(test)["accuracy"]
        report.undo()
        print(f"without {path}: {found[path]:.1%}")
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def run(options: argparse.Namespace) -> None:
    """Train, try, prune, train on."""
    data = load_pictures(options.data, options.limit)
    print(data.source)
    train, test = Batches(data.train, 64, data.train, augment=True), Batches(data.test, 64, data.train)
    table = Table("resnet18", "parameters", "MACs", "test accuracy")

    def row(name: str) -> None:
        total = summary(trainer.model, EXAMPLE).to_dict()["total"]
        found = trainer.evaluate(test)["accuracy"]
        table.add_row(name, f"{total['params']:,}", f"{total['macs'] / 2e6:.1f} M", f"{found:.1%}")

    trainer = make_trainer(len(data.train.classes))
    trainer.fit(train, epochs=options.epochs)
    row("trained")
    least = list(worth(trainer, test))[: options.drop]
    with trainer.edit(example=EXAMPLE) as e:
        for path in least:
            e.remove(path)
    print(f"\n{e.report}\n")
    row("pruned")
    trainer.fit(train, epochs=-(-options.epochs // 2))
    row("trained on")
    Console().print(table)


def main(arguments: list[str] | None = None) -> None:
    """Run the whole of it; what goes wrong is one line."""
    options = parse(arguments)
    with told_plainly():
        run(options)


if __name__ == "__main__":
    main()
