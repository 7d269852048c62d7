"""A run for torchrun: `data_parallel.py DIRECTORY ddp|fsdp STEP new|resume`; one process is killed at STEP."""

import json
import os
import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

from modsurg import Trainer

directory, strategy, end, resume = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "resume"
world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))

torch.manual_seed(0)
x = torch.randn(48, 6)
data = TensorDataset(x, x[:, :3].argmax(1))
model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=9)
trainer = Trainer(
    model,
    optimizer,
    nn.CrossEntropyLoss(),
    device="cpu",
    scheduler=scheduler,
    clip_norm=1.0,
    strategy=strategy,
    checkpoint_dir=directory,
    metrics={"accuracy": lambda output, target: output.argmax(1) == target},
    progress=False,
)


def on_step(trainer):
    if trainer.step == end and rank == 1:
        os.kill(os.getpid(), 9)


validation = DataLoader(data, batch_size=8, sampler=SubsetRandomSampler(range(37)))
history = trainer.fit(DataLoader(data, batch_size=16 // world), validation, 3, resume=resume, on_step=on_step)
if rank == 0:
    print(json.dumps([[row["loss"], row["val_loss"], row["val_accuracy"]] for row in history]))
