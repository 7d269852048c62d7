"""Kill a run with `kill -9` in the middle of an epoch, start it again, and end with the very same bits.

The script starts itself three times: once to the end, once until it is killed, and once more to go on. The network has
dropout, the loader shuffles and the learning rate follows a cycle, so that a single batch, random number or step of
momentum that was lost would show.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from pictures import load_pictures
from plainly import told_plainly
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from modsurg import Trainer, diff, read_state

EPOCHS, EVERY = 3, 5


def train(folder: Path) -> None:
    """One run, from wherever it is; this is all that a script of yours needs."""
    torch.set_num_threads(1)  # fastest for a network this small
    torch.manual_seed(0)
    pictures = load_pictures("digits", limit=640).train
    data = TensorDataset(pictures.images.permute(0, 3, 1, 2) / 255, pictures.labels)
    loader = DataLoader(data, batch_size=32, shuffle=True)
    layers = [nn.Conv2d(3, 16, 5, 2), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 5, 2), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Dropout(0.2), nn.Flatten(), nn.LazyLinear(10))
    model(data[:2][0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=EPOCHS * len(loader))
    trainer = Trainer(
        model,
        optimizer,
        nn.CrossEntropyLoss(),
        scheduler=cycle,
        checkpoint_dir=folder,
        save_every=EVERY,
        seed=0,
        progress=False,
    )
    trainer.fit(loader, epochs=EPOCHS, resume=True, on_step=lambda trainer: print("step", trainer.step, flush=True))


def start(folder: Path, kill_at: int | None = None) -> list[int]:
    """Run in a process of its own, killed when it has made this step; the steps that it made."""
    command = [sys.executable, __file__, "--worker", str(folder)]
    steps = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            steps.append(int(line.split()[-1]))
            if steps[-1] == kill_at:
                process.kill()
                break
    if process.returncode and not kill_at:
        raise SystemExit(process.returncode)
    return steps


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kill-at", type=int, default=33, metavar="STEP", help="of 60 (default: 33)")
    parser.add_argument("--out", type=Path, default=Path("runs/resume"), help="default: runs/resume")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Train whole, train and kill, go on, compare."""
    whole, killed = options.out / "whole", options.out / "killed"
    for file in (*whole.glob("*.safetensors"), *killed.glob("*.safetensors")):
        file.unlink()
    print(f"never interrupted: steps 1 to {start(whole)[-1]}")
    last = start(killed, options.kill_at)[-1]
    print(f"kill -9 after step {last}, within an epoch of 20 steps; the state is kept every {EVERY}")
    steps = start(killed)
    print(f"started again: steps {steps[0]} to {steps[-1]}")
    ends = [folder / "last.safetensors" for folder in (whole, killed)]
    differs = diff(*(read_state(end) for end in ends))
    print(f"weights, momentum, random states: {differs if differs else 'the same, bit for bit'}")


def main(arguments: list[str] | None = None) -> None:
    """Run the whole of it; what goes wrong is one line."""
    options = parse(arguments)
    with told_plainly():
        train(options.worker) if options.worker else run(options)


if __name__ == "__main__":
    main()
