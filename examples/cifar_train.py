"""Build the tutorial's CIFAR-10 network, train it, keep it, edit it, and train it on.

The network has no activation behind its convolutions. After the first half of the run, one line puts a ReLU behind
each (with --batch-norm, a BatchNorm2d too): the trained weights stay, the optimizer follows, training goes on, and a
table at the end shows what the edit was worth.
"""

import argparse
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cifar_net import EXAMPLE, MODELS, STATES, CifarNet, accuracy
from pictures import Batches, Data, PicturesError, load_pictures
from predictions import draw_predictions
from rich.console import Console
from rich.table import Table
from torch import nn

from modsurg import Trainer, save_model, save_state, summary
from modsurg.errors import ModsurgError

EPILOG = """
examples:
  cifar_train.py                                   torchvision's CIFAR-10, or the digits without a network
  cifar_train.py --data ../cifar --batch-norm      your pictures: train/<class>/* and test/<class>/*
  cifar_train.py --data ../cifar --resume          go on from where that run was stopped or killed
  tensorboard --logdir runs/cifar/tensorboard      watch it
"""


def positive(text: str) -> int:
    """A whole number from 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def rate(text: str) -> float:
    """A learning rate."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no learning rate")
    return number


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="CIFAR-10's batches as torchvision unpacks them, or train/<class>/* and test/<class>/* pictures; the word "
        '"digits" for the embedded ones. Default: download CIFAR-10 into ./data, else the digits',
    )
    parser.add_argument("--epochs", type=positive, default=8, help="before the edit, and as many after it (default: 8)")
    parser.add_argument("--batch-size", type=positive, default=64, help="pictures in a batch (default: 64)")
    parser.add_argument("--lr", type=rate, default=0.05, help="the highest learning rate of each cycle (default: 0.05)")
    parser.add_argument("--batch-norm", action="store_true", help="also put a BatchNorm2d behind every convolution")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps, ... (default: what is there)")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"), help="default: fp32")
    parser.add_argument("--out", type=Path, default=Path("runs/cifar"), help="for what is kept (default: runs/cifar)")
    parser.add_argument("--log-dir", type=Path, help="for TensorBoard (default: OUT/tensorboard)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation (default: 0)")
    parser.add_argument("--limit", type=positive, metavar="N", help="at most N training and N test pictures")
    parser.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        metavar="FILE",
        help="go on with the run in OUT, or with this checkpoint of it; the other options as they were",
    )
    return parser.parse_args(arguments)


def one_cycle(step: int, steps: int) -> float:
    """The share of the highest learning rate at a step: a quarter of the cycle up, the rest down; then again.

    Example:
        >>> [round(one_cycle(step, 100), 2) for step in (0, 25, 50, 99, 100)]
        [0.04, 1.0, 0.75, 0.0, 0.04]
    """
    part = step % steps / steps
    return 0.04 + 0.96 * part / 0.25 if part < 0.25 else (1 + math.cos(math.pi * (part - 0.25) / 0.75)) / 2


def make_trainer(options: argparse.Namespace, batches: Batches) -> Trainer:
    """The network, its optimizer and schedule, and what trains them."""
    torch.manual_seed(options.seed)
    network = CifarNet()
    optimizer = torch.optim.SGD(network.parameters(), options.lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = options.epochs * len(batches)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: one_cycle(step, steps))
    return Trainer(
        network,
        optimizer,
        nn.CrossEntropyLoss(),
        device=options.device,
        precision=options.precision,
        scheduler={"step": scheduler},
        metrics={"accuracy": accuracy},
        clip_norm=1.0,
        log_dir=options.log_dir or options.out / "tensorboard",
        checkpoint_dir=options.out / "checkpoints",
        seed=options.seed,
        best="val_accuracy",
    )


def draw_test_pictures(trainer: Trainer, test: Batches) -> None:
    """Show on TensorBoard what the network makes of the first test pictures."""
    images, labels = next(iter(test))
    draw_predictions(trainer, images, labels, test.dataset.classes)


def edit(trainer: Trainer, batch_norm: bool) -> None:
    """One line for each kind of layer; the optimizer follows, and the kept run knows the edit."""
    with trainer.edit(example=EXAMPLE) as e:
        e.insert_after(nn.Conv2d, nn.ReLU)
        if batch_norm:
            e.insert_after(nn.Conv2d, lambda conv: nn.BatchNorm2d(conv.out_channels))
    print(f"\nThe edit:\n{e.report}")


def keep(trainer: Trainer, folder: Path) -> None:
    """Write the network in four forms, and what was edited, each file whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in STATES:
        save_state(trainer.model, folder / name)
    for name in MODELS:
        save_model(trainer.model, folder / name)
    if trainer.reports:
        half = folder / ".edit.json"
        half.write_text(trainer.reports[-1].recipe.to_json())
        os.replace(half, folder / "edit.json")


def check(folder: Path, here: float, options: argparse.Namespace) -> bool:
    """Have a fresh process open each file and measure it; whether all agree with `here` to the last digit."""
    command = [sys.executable, str(Path(__file__).with_name("cifar_check.py")), str(folder)]
    for name in ("data", "limit", "batch_size", "device", "precision"):
        if getattr(options, name) is not None:
            command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    print(f"\nKept in {folder}, opened by a fresh process (test accuracy here: {here!r}):")
    same = [line.split()[1] == repr(here) for line in done.stdout.splitlines()]
    for line, equal in zip(done.stdout.splitlines(), same, strict=True):
        name, there = line.split()
        print(f"  {name:<18}  {there}  {'the same' if equal else 'DIFFERENT'}")
    return done.returncode == 0 and len(same) == 4 and all(same)


def keep_and_check(trainer: Trainer, name: str, test: Batches, options: argparse.Namespace) -> None:
    """Keep the network as it is now, and check the files."""
    keep(trainer, options.out / name)
    if not check(options.out / name, trainer.evaluate(test)["accuracy"], options):
        raise PicturesError(f"the files in {options.out / name} do not give the accuracy that was measured here")


def show(trainer: Trainer, epochs: int) -> None:
    """The table at the end."""
    table = Table(title="Before and after the edit", title_justify="left")
    for column in ("network", "epochs", "parameters", "test accuracy"):
        table.add_column(column, justify="left" if column == "network" else "right")
    for name, network, row in (
        ("as it was", CifarNet(), trainer.history[epochs - 1]),
        ("edited", trainer.model, trainer.history[-1]),
    ):
        parameters = summary(network).to_dict()["total"]["params"]
        table.add_row(name, f"{row['epoch']:.0f}", f"{parameters:,}", f"{row['val_accuracy']:.2%}")
    Console().print(table)


def run(options: argparse.Namespace, data: Data) -> int:
    """Train, keep, edit, train on; the exit status."""
    train = Batches(data.train, options.batch_size, like=data.train, augment=True, seed=options.seed)
    test = Batches(data.test, options.batch_size, like=data.train)
    trainer = make_trainer(options, train)
    print(summary(trainer.model, EXAMPLE), end="\n\n")
    seen: dict[str, Any] = {"resume": options.resume, "on_epoch": partial(draw_test_pictures, test=test)}
    history = trainer.fit(train, test, options.epochs, **seen)
    if trainer.reports:
        history = trainer.fit(train, test, 2 * options.epochs, **seen)
    elif not history.stopped:
        keep_and_check(trainer, "trained", test, options)
        edit(trainer, options.batch_norm)
        print(summary(trainer.model, EXAMPLE), end="\n\n")
        history = trainer.fit(train, test, options.epochs, **seen | {"resume": False})
    if history.stopped:
        return interrupted()
    keep_and_check(trainer, "edited", test, options)
    show(trainer, options.epochs)
    return 0


def interrupted() -> int:
    """Say how to go on."""
    print("\nStopped, and kept. The same command with --resume goes on from here.")
    return 130


def main(arguments: list[str] | None = None) -> int:
    """Run the whole of it; bad input is one line and the exit status 2."""
    options = parse(arguments)
    try:
        data = load_pictures(options.data, options.limit)
        print(data.source)
        return run(options, data)
    except (PicturesError, ModsurgError, OSError) as error:
        print(f"cifar_train.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return interrupted()


if __name__ == "__main__":
    sys.exit(main())
