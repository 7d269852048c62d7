"""A grid of pictures with what a network makes of them, for TensorBoard."""

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure

from modsurg import Trainer

_SHOWN, _IN_A_ROW = 16, 4
_LONGEST = 14
_RIGHT, _WRONG = "#1a7f37", "#b3261e"


def pictures(images: torch.Tensor, output: torch.Tensor, target: torch.Tensor, names: Sequence[str]) -> Figure:
    """Give a matplotlib figure of up to 16 pictures: what was predicted, and below it what it is where that was wrong.

    Args:
        images: `(n, 1 or 3, height, width)`; stretched to their own darkest and brightest.
        output: `(n, classes)` scores.
        target: `(n,)` class numbers.
        names: What the classes are called; numbers where there are none.
    """
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


def draw_predictions(trainer: Trainer, images: torch.Tensor, target: torch.Tensor, names: Sequence[str]) -> None:
    """Add the grid to the TensorBoard of a run that has one."""
    if trainer.board is not None:
        figure = pictures(images, trainer.predict(images[:_SHOWN]), target, names)
        trainer.board.writer.add_figure("predictions", figure, trainer.step)


def _name(names: Sequence[str], number: int) -> str:
    name = str(names[number]) if number < len(names) else str(number)
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1].rstrip()}…"
