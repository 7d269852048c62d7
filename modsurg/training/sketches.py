"""Pictures of a run for TensorBoard: predictions, and the model's graph."""

from collections.abc import Sequence
from typing import Any

import torch

from modsurg.errors import TrainingError

_SHOWN = 16


def pictures(images: torch.Tensor, output: torch.Tensor, target: Any, names: Sequence[str]) -> Any:
    """Give a matplotlib figure of up to 16 pictures, green where the prediction is right.

    Args:
        images: `(n, 1 or 3, height, width)`; stretched to their own darkest and brightest.
        output: `(n, classes)` scores.
        target: `(n,)` class numbers.
        names: What the classes are called; numbers where there are none.

    Raises:
        TrainingError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise TrainingError('pictures need matplotlib: pip install "modsurg[tensorboard]".') from error
    figure = Figure(figsize=(8, 8.5), layout="constrained")
    chance, guess = output.detach().float().softmax(1).max(1)
    axes = list(figure.subplots(4, 4).flat)
    for axis in axes:
        axis.axis("off")
    for i, axis in zip(range(min(len(images), _SHOWN)), axes, strict=False):
        image = images[i].detach().float().cpu()
        image = (image - image.min()) / (image.max() - image.min()).clamp(min=1e-6)
        axis.imshow(image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray" if image.shape[0] == 1 else None)
        right = int(guess[i]) == int(target[i])
        was = "" if right else f", is {_name(names, int(target[i]))}"
        axis.set_title(
            f"{_name(names, int(guess[i]))} {chance[i]:.0%}{was}", fontsize=8, color="green" if right else "red"
        )
    return figure


def are_pictures(images: Any, output: Any, target: Any) -> bool:
    """Whether a batch can be shown: pictures in, scores of classes out, class numbers beside them."""
    return (
        isinstance(images, torch.Tensor)
        and isinstance(output, torch.Tensor)
        and isinstance(target, torch.Tensor)
        and images.ndim == 4
        and images.shape[1] in (1, 3)
        and output.ndim == 2
        and target.ndim == 1
        and not target.is_floating_point()
    )


def _name(names: Sequence[str], number: int) -> str:
    return str(names[number]) if number < len(names) else str(number)
