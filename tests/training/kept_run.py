"""A run to be stopped, as a script: `kept_run.py DIRECTORY WORKERS new|resume on|SIGNAL`."""

import os
import signal
import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from modsurg import Trainer


class Noisy(Dataset):
    def __len__(self):
        return 30

    def __getitem__(self, i):
        x = torch.randn(6, generator=torch.Generator().manual_seed(i))
        return x + torch.randn(6) * 0.1, int(x[:3].argmax())


def build(directory, workers=0, seed=0, **options):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=3 * 4)
    accuracy = {"accuracy": lambda output, target: output.argmax(1) == target}
    trainer = Trainer(
        model,
        optimizer,
        nn.CrossEntropyLoss(),
        scheduler=scheduler,
        accumulate=2,
        metrics=accuracy,
        clip_norm=1.0,
        checkpoint_dir=directory,
        progress=False,
        **options,
    )
    return trainer, DataLoader(Noisy(), batch_size=4, shuffle=True, num_workers=workers)


def run(trainer, loader, resume=False, on_step=None):
    return trainer.fit(loader, DataLoader(Noisy(), batch_size=8), 3, resume=resume, patience=2, on_step=on_step)


if __name__ == "__main__":
    directory, workers, resume, how = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "resume", sys.argv[4]
    trainer, loader = build(directory, workers, seed=5 if resume else 0, save_every=1)

    def on_step(trainer):
        if trainer.step == 6 and how != "on":
            os.kill(os.getpid(), getattr(signal, how))

    history = run(trainer, loader, resume, on_step)
    print(history.stopped, trainer.step)
