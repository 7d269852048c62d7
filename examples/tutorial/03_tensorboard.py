"""TensorBoard: two curves, and one picture in each of the two orders of its axes."""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter  # type: ignore[attr-defined]  # torch does not list it

from material import INSECTS_NEEDED, insects


def main() -> None:
    """Write the logs, and say how to look at them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--logs", type=Path, default="runs/tutorial/logs")
    parser.add_argument("--data", type=Path, help=INSECTS_NEEDED)
    options = parser.parse_args()
    writer = SummaryWriter(str(options.logs))
    with tempfile.TemporaryDirectory() as scratch, writer:
        for step in range(100):
            writer.add_scalar("y = x", step, step)
            writer.add_scalar("y = x^2", step**2, step)
        ants = sorted((insects(options.data, Path(scratch)) / "train/ants").iterdir())
        for step, file in enumerate(ants[:2], 1):
            by_height = np.asarray(Image.open(file).convert("RGB"))
            by_channel = by_height.transpose(2, 0, 1)
            writer.add_image("picture HWC", by_height, step, dataformats="HWC")
            writer.add_image("picture CHW", by_channel, step)
            print(f"step {step}: HWC {by_height.shape}, CHW {by_channel.shape}")
    print("100 points of y = x and of y = x^2")
    print(f"look at them: tensorboard --logdir={options.logs} --port=6007")


if __name__ == "__main__":
    main()
