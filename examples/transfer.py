"""Transfer learning: a resnet18 that was made for ImageNet learns to tell ants from bees.

The head is replaced, the body frozen, and thawed block by block while the head settles. The best epoch is kept as one
file, which a fresh process opens without any of this code.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from cifar_net import accuracy
from pictures import Batches, Data, load_pictures, unreachable
from plainly import told_plainly
from torch import nn

from modsurg import Trainer, freeze, load_checkpoint, load_model, load_state, replace, save_model, select, summary

THAW = {1: "layer4.1", 2: "layer4.0", 3: "layer3"}  # after so many epochs
MEAN, DEVIATION = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="DIR", help="train/<class>/* and val/<class>/*; default: insects drawn here")
    parser.add_argument(
        "--weights", type=Path, metavar="FILE", help="torchvision's resnet18-*.pth (default: fetched once)"
    )
    parser.add_argument("--size", type=int, default=96, help="side of the pictures in pixels (default: 96)")
    parser.add_argument("--epochs", type=int, default=5, help="default: 5")
    parser.add_argument("--limit", type=int, metavar="N", help="at most N training and N test pictures")
    parser.add_argument("--out", type=Path, default=Path("runs/transfer"), help="default: runs/transfer")
    parser.add_argument("--check", action="store_true", help="train nothing, measure what is in OUT")
    return parser.parse_args(arguments)


def body(weights: Path | None) -> tuple[nn.Module, str]:
    """A resnet18, and a line that says with which weights."""
    from torchvision.models import ResNet18_Weights, resnet18

    url = ResNet18_Weights.DEFAULT.url
    cached = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    model = resnet18()
    if weights or cached.exists():
        return model, f"Weights: {weights or cached}, {load_state(model, weights or cached)}."
    if trouble := unreachable(url):
        return model, f"Weights: RANDOM, expect little. {url}: {trouble}. Fetch it elsewhere: --weights {cached.name}"
    return resnet18(weights="DEFAULT"), f"Weights: {url}"


def load(options: argparse.Namespace) -> Data:
    """The pictures in --data, or drawn ones."""
    if options.data:
        return load_pictures(options.data, options.limit, options.size)
    from tutorial.material import insects

    with tempfile.TemporaryDirectory() as folder:
        return load_pictures(str(insects(None, Path(folder))), options.limit, options.size)


def batches(data: Data) -> tuple[Batches, Batches]:
    """To train on and to test with, normalised as the weights expect."""
    both = Batches(data.train, 32, data.train, augment=True), Batches(data.test, 32, data.train)
    for part in both:
        part.mean, part.deviation = MEAN, DEVIATION
    return both


def make_trainer(model: nn.Module, out: Path | None = None) -> Trainer:
    """AdamW; what is frozen waits in a group of its own, for a tenth of the head's learning rate."""
    head, frozen = ([p for p in model.parameters() if p.requires_grad is trains] for trains in (True, False))
    optimizer = torch.optim.AdamW([{"params": head, "lr": 2e-3}, {"params": frozen, "lr": 2e-4}])
    loss, metrics = nn.CrossEntropyLoss(), {"accuracy": accuracy}
    return Trainer(model, optimizer, loss, metrics=metrics, checkpoint_dir=out, best="val_accuracy")


def run(options: argparse.Namespace) -> None:
    """Replace, freeze, train, keep the best, have it opened elsewhere."""
    torch.manual_seed(0)
    data = load(options)
    train, test = batches(data)
    file = options.out / "model.safetensors"
    if options.check:
        print(f"{make_trainer(load_model(file)).evaluate(test)['accuracy']:.4f}")
        return
    model, origin = body(options.weights)
    print(f"{data.source}\n{origin}\n")
    example = (2, 3, options.size, options.size)
    classes = len(data.train.classes)
    head = replace(model, "fc", lambda old: nn.Linear(old.in_features, classes), count=1, example=example)
    freeze(model, select(model, "*") - select(model, "fc"))
    print(f"{head}\n\n{summary(model, example, depth=1)}\n")

    trainer = make_trainer(model, options.out)
    trainer.fit(train, test, options.epochs, thaw=THAW)
    load_checkpoint(options.out / "best.safetensors", model=model)
    print(f"\nthe best epoch: {trainer.evaluate(test)['accuracy']:.4f} of {len(data.test)} pictures right")
    save_model(model, file)
    command = [sys.executable, __file__, "--check", "--out", options.out, "--size", str(options.size)]
    command += ["--data", options.data] if options.data else []
    command += ["--limit", str(options.limit)] if options.limit else []
    there = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    print(f"{file} in a fresh process: {there.stdout.strip()}")


def main(arguments: list[str] | None = None) -> None:
    """Run the whole of it; what goes wrong is one line."""
    options = parse(arguments)
    with told_plainly():
        run(options)


if __name__ == "__main__":
    main()
