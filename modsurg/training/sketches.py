"""Pictures of a run for TensorBoard: predictions, and the model's graph."""

from collections.abc import Sequence
from typing import Any

import torch

from modsurg.errors import TrainingError

_SHOWN, _IN_A_ROW = 16, 4
_LONGEST = 14
_RIGHT, _WRONG = "#1a7f37", "#b3261e"


def pictures(images: torch.Tensor, output: torch.Tensor, target: Any, names: Sequence[str]) -> Any:
    """Give a matplotlib figure of up to 16 pictures: what was predicted, and below it what it is where that was wrong.

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
    count = min(len(images), _SHOWN)
    rows = -(-count // _IN_A_ROW)
    figure = Figure(figsize=(8, 2.5 * rows), layout="constrained")
    chance, guess = output.detach().float().softmax(1).max(1)
    axes = list(figure.subplots(rows, _IN_A_ROW, squeeze=False).flat)
    for axis in axes:
        axis.axis("off")
    for i, axis in zip(range(count), axes, strict=False):
        image = images[i].detach().float().cpu()
        image = (image - image.min()) / (image.max() - image.min()).clamp(min=1e-6)
        axis.imshow(image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray" if image.shape[0] == 1 else None)
        right = int(guess[i]) == int(target[i])
        text = f"{_name(names, int(guess[i]))}, {chance[i]:.0%}\n"
        text += "" if right else f"is {_name(names, int(target[i]))}"
        axis.set_title(text, fontsize=12, color=_RIGHT if right else _WRONG)
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
    name = str(names[number]) if number < len(names) else str(number)
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1].rstrip()}…"
