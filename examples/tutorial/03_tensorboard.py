"""TensorBoard: two curves, and one picture in each of the two orders of its axes."""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from material import insects
from PIL import Image
from torch.utils.tensorboard import SummaryWriter  # type: ignore[attr-defined]  # torch does not list it


def main() -> None:
    """Write the logs, and say how to look at them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--logs", type=Path, default=Path("runs/tutorial/logs"), help="where the logs go")
    parser.add_argument("--data", type=Path, help="a folder with train/ants and train/bees; left out, some are drawn")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, SummaryWriter(str(options.logs)) as writer:
        for step in range(100):
            writer.add_scalar("y = x", step, step)
            writer.add_scalar("y = x^2", step**2, step)
        ants = sorted((insects(options.data, Path(scratch)) / "train/ants").iterdir())
        for step, file in enumerate(ants[:2], 1):
            array = np.asarray(Image.open(file))
            writer.add_image("picture HWC", array, step, dataformats="HWC")
            writer.add_image("picture CHW", array.transpose(2, 0, 1), step)
            print(f"step {step}: {array.shape} is height, width, channels; {array.transpose(2, 0, 1).shape} is CHW")
    print("100 points of y = x and of y = x^2")
    print(f"look at them: tensorboard --logdir={options.logs} --port=6007")


if __name__ == "__main__":
    main()
