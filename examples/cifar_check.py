"""Open what cifar_train.py kept in a process of its own, and measure it on the test pictures.

Each line of the output is a file and its accuracy, with all its digits. `cifar_train.py` starts this by itself.
"""

import argparse
import sys
from pathlib import Path

import torch
from cifar_net import MODELS, STATES, CifarNet, accuracy
from pictures import Batches, PicturesError, load_pictures
from torch import nn

from modsurg import Recipe, Trainer, load_model, load_state, replay
from modsurg.errors import ModsurgError


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a folder of cifar_train.py, such as runs/cifar/trained")
    parser.add_argument("--data", help="the pictures, as for cifar_train.py")
    parser.add_argument("--limit", type=int, help="as for cifar_train.py")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"))
    return parser.parse_args(arguments)


def opened(folder: Path, name: str) -> nn.Module:
    """The network of one file: whole, or a fresh one that is edited by the kept recipe and filled."""
    if name in MODELS:
        return load_model(folder / name, trust=(CifarNet,))
    network = CifarNet()
    recipe = folder / "edit.json"
    if recipe.exists():
        replay(network, Recipe.from_json(recipe.read_text()))
    load_state(network, folder / name)
    return network


def measure(network: nn.Module, batches: Batches, options: argparse.Namespace) -> float:
    """Test accuracy, by the trainer's own measure."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    trainer = Trainer(
        network,
        optimizer,
        nn.CrossEntropyLoss(),
        device=options.device,
        precision=options.precision,
        metrics={"accuracy": accuracy},
    )
    return trainer.evaluate(batches)["accuracy"]


def main(arguments: list[str] | None = None) -> int:
    """Print each file's accuracy."""
    options = parse(arguments)
    try:
        data = load_pictures(options.data, options.limit)
        batches = Batches(data.test, options.batch_size, like=data.train)
        for name in (*STATES, *MODELS):
            print(name, repr(measure(opened(options.folder, name), batches, options)))
    except (PicturesError, ModsurgError, OSError) as error:
        print(f"cifar_check.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
