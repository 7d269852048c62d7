"""One script for one process or several: data-parallel (DDP) or sharded (FSDP2) under torchrun, the same losses.

python parallel.py                                            one process
torchrun --nproc-per-node 2 parallel.py                       two, each with the whole model
torchrun --nproc-per-node 2 parallel.py --strategy fsdp       two, each with half of the weights
python parallel.py --compare                                  all three, and how far their losses are apart
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from cifar_net import accuracy
from pictures import Batches, load_pictures
from plainly import told_plainly
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from modsurg import Trainer

WAYS = ((1, "ddp"), (2, "ddp"), (2, "fsdp"))


def train(options: argparse.Namespace) -> None:
    """Nothing in here knows how many processes there are, but the size of a batch: 64 pictures in all."""
    torch.manual_seed(0)
    data = load_pictures("digits")
    train, test = (TensorDataset(*next(iter(Batches(part, len(part), data.train)))) for part in (data.train, data.test))
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    trainer = Trainer(
        model,
        optimizer,
        nn.CrossEntropyLoss(),
        device=options.device,
        strategy=options.strategy,
        metrics={"accuracy": accuracy},
        checkpoint_dir=options.out,
        progress=False,
    )
    batch = 64 // int(os.environ.get("WORLD_SIZE", "1"))
    history = trainer.fit(DataLoader(train, batch, drop_last=True), DataLoader(test, 64), epochs=options.epochs)
    if os.environ.get("RANK", "0") == "0":
        for row in history:
            shown = (f"{name} {row[name]:.9f}" for name in ("loss", "val_loss", "val_accuracy"))
            print(f"epoch {row['epoch']:.0f}", *shown, sep="  ")


def losses(processes: int, strategy: str, options: argparse.Namespace) -> torch.Tensor:
    """Start this script in so many processes; the numbers that it printed, (epochs, 4)."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    ours = ["--strategy", strategy, "--epochs", str(options.epochs), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *launcher, __file__, *ours, "--out", folder]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
        files = ", ".join(sorted(path.name for path in Path(folder).iterdir()))
    if done.returncode:
        raise SystemExit(done.returncode)
    print(f"\n--- {processes} x {strategy}; it kept {files}\n{done.stdout}", end="", flush=True)
    return torch.tensor([[float(word) for word in line.split()[1::2]] for line in done.stdout.splitlines()])


def compare(options: argparse.Namespace) -> None:
    """Run all three ways, each a command that could be typed."""
    alone, *others = (losses(processes, strategy, options) for processes, strategy in WAYS)
    print()
    for (processes, strategy), numbers in zip(WAYS[1:], others, strict=True):
        print(f"{processes} x {strategy}: at most {(numbers - alone).abs().max():.1e} from one process")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", choices=("ddp", "fsdp"), default="ddp", help="default: ddp")
    parser.add_argument("--compare", action="store_true", help="run in one process, two with ddp, two with fsdp")
    parser.add_argument("--epochs", type=int, default=3, help="default: 3")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: what is there)")
    parser.add_argument("--out", type=Path, default=Path("runs/parallel"), help="default: runs/parallel")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Train here, or compare; what goes wrong is one line."""
    options = parse(arguments)
    with told_plainly():
        compare(options) if options.compare else train(options)


if __name__ == "__main__":
    main()
