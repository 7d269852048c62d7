"""The two networks of the tutorial that several sections use."""

from torch import Tensor, nn


def body() -> nn.Sequential:
    """(B, 3, 32, 32) pictures to (B, 10) scores: convolved and pooled, then linear."""
    return nn.Sequential(
        nn.Conv2d(in_channels=3, out_channels=32, kernel_size=5, padding=2),
        nn.MaxPool2d(2),
        nn.Conv2d(in_channels=32, out_channels=32, kernel_size=5, padding=2),
        nn.MaxPool2d(2),
        nn.Conv2d(in_channels=32, out_channels=64, kernel_size=5, padding=2),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(1024, 64),
        nn.Linear(64, 10),
    )


class CifarNet(nn.Module):
    """The network of sections 10, 12 and 13."""

    def __init__(self) -> None:
        super().__init__()
        self.sequential = body()

    def forward(self, pictures: Tensor) -> Tensor:
        """Scores of the ten classes."""
        scores: Tensor = self.sequential(pictures)
        return scores


class Mynn(nn.Module):
    """The network of sections 14 and 15; its last child is spelled as in the course."""

    def __init__(self) -> None:
        super().__init__()
        self.sequential1 = body()
        self.sequential2 = nn.Linear(10, 10)
        self.classfication = nn.Sequential(
            nn.Linear(10, 10), nn.Linear(10, 10), nn.Linear(10, 10)
        )

    def forward(self, pictures: Tensor) -> Tensor:
        """Scores of the ten classes."""
        scores: Tensor = self.classfication(
            self.sequential2(self.sequential1(pictures))
        )
        return scores
