"""Environment: versions, devices, and a first computation on the best of them."""

import argparse

import torch

from modsurg.views.environment import environment, table


def main() -> None:
    """Print the table, or JSON, and compute on the device that a training would use."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--brief", action="store_true", help="leave out the table")
    if not parser.parse_args().brief:
        print(table(environment()))
    print("torch.cuda.is_available():", torch.cuda.is_available())
    device = torch.device("cpu")
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
    print(f"1 + 1 on {device}:", int(torch.ones((), device=device) + 1))
    pooling = [name for name in dir(torch.nn) if name.startswith("MaxPool")]
    print("what torch.nn has for pooling:", *pooling)


if __name__ == "__main__":
    main()
