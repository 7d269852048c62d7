"""The tutorial's CIFAR-10 network, and the edit that it gets: shared by `cifar_train.py` and `cifar_check.py`."""

from torch import Tensor, nn

EXAMPLE = (1, 3, 32, 32)
STATES = ("state.safetensors", "state.pt")
MODELS = ("model.safetensors", "model.pt")


class CifarNet(nn.Module):
    """(B, 3, 32, 32) pictures to (B, 10) scores; there is no activation between the convolutions yet.

    Example:
        >>> CifarNet()(torch.zeros(64, 3, 32, 32)).shape
        torch.Size([64, 10])
    """

    def __init__(self) -> None:
        super().__init__()
        self.sequential = nn.Sequential(
            nn.Conv2d(3, 32, 5, padding=2),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 32, 5, padding=2),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 5, padding=2),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(1024, 64),
            nn.Linear(64, 10),
        )

    def forward(self, pictures: Tensor) -> Tensor:
        """Scores of the ten classes."""
        scores: Tensor = self.sequential(pictures)
        return scores


def accuracy(scores: Tensor, labels: Tensor) -> Tensor:
    """For each sample, 1 where the highest score is the right one.

    Example:
        >>> accuracy(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1]))
        tensor([1., 0.])
    """
    return (scores.argmax(1) == labels).float()
