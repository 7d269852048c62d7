"""Keeping: a whole model or its state_dict, what each weighs and needs to be opened."""

import argparse
import pickle
import tempfile
from pathlib import Path

import torch

from modsurg import load_model, load_state, save_model, save_state
from modsurg.errors import TrustError
from networks import Mynn


def keep(folder: Path) -> Mynn:
    """Write one network in four ways, and print the sizes."""
    torch.manual_seed(0)
    network = Mynn()
    torch.save(network, folder / "my_model.pth")
    torch.save(network.state_dict(), folder / "model_state_dict.pth")
    save_model(network, folder / "my_model.safetensors")
    save_state(network, folder / "model_state_dict.safetensors")
    weights = sum(parameter.nbytes for parameter in network.parameters())
    print(f"{weights:9,} bytes  the weights alone")
    for path in sorted(folder.iterdir()):
        print(f"{path.stat().st_size:9,} bytes  {path.name}")
    return network


def open_pickle(folder: Path) -> None:
    """The usual line, why it fails, and what opens the file without trusting it all."""
    try:
        torch.load(folder / "my_model.pth")
    except pickle.UnpicklingError as error:
        print("torch.load('my_model.pth'):", type(error).__name__)
        print(" ", str(error).partition(".")[0])
    try:
        load_model(folder / "my_model.pth")
    except TrustError as error:
        print("load_model without trust:", str(error).replace(str(folder), "..."))
    opened = load_model(folder / "my_model.pth", trust=(Mynn,))
    print("load_model with trust=(Mynn,):", type(opened).__name__)


def main() -> None:
    """Keep, open again, and compare every weight."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        network = keep(folder)
        open_pickle(folder)
        from_state = Mynn()  # a state_dict holds no structure: build it first
        from_state.load_state_dict(torch.load(folder / "model_state_dict.pth"))
        checked = Mynn()
        print(load_state(checked, folder / "model_state_dict.safetensors"))
        whole = load_model(folder / "my_model.safetensors", trust=(Mynn,))
        pictures = torch.rand(4, 3, 32, 32)
        answers = [model(pictures) for model in (from_state, checked, whole)]
        same = [torch.equal(network(pictures), answer) for answer in answers]
        print("the answers of what was loaded are the same:", same)


if __name__ == "__main__":
    main()
