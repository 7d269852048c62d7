"""The networks that are printed and compared with golden files."""

import torch
import torchvision
from torch import nn

from modsurg import Summary, summary


class CifarNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(
            *(nn.Conv2d(3, 32, 5, padding=2), nn.MaxPool2d(2), nn.Conv2d(32, 32, 5, padding=2), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 5, padding=2), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(1024, 64), nn.Linear(64, 10)),
        )

    def forward(self, x):
        return self.model(x)


def cifar() -> Summary:
    return summary(CifarNet(), (1, 3, 32, 32))


def resnet() -> Summary:
    with torch.device("meta"):
        model = torchvision.models.resnet18()
    return summary(model, (1, 3, 224, 224))
