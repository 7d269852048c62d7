"""Surgery: a module added to a finished network and one replaced, as torch does it and as modsurg does it."""

import argparse
from pathlib import Path

import torch
from networks import Mynn
from torch import nn

from modsurg import add, edit, replace, summary
from modsurg.errors import ModsurgError

EXAMPLE = (1, 3, 32, 32)


def plainly() -> nn.Module:
    """The tutorial's two edits with torch alone; nothing is checked."""
    network = Mynn()
    print("--- as it was", network, sep="\n")
    network.add_module("add_ReLU", nn.ReLU())
    print("--- add_ReLU added", network, sep="\n")
    network.classfication[1] = nn.ReLU()
    print("--- classfication[1] replaced", network, sep="\n")
    return network


def checked() -> nn.Module:
    """The same edits by modsurg's verbs."""
    network = Mynn()
    optimizer = torch.optim.Adam(network.parameters())
    print("--- the same by modsurg")
    print(add(network, "add_ReLU", nn.ReLU(), example=EXAMPLE))
    print(replace(network, "classfication.1", nn.ReLU(), count=1, optimizer=optimizer, example=EXAMPLE))
    return network


def refused(network: nn.Module) -> None:
    """Slips that are found before anything changes, and an edit taken back."""
    print("--- what is refused")
    slips = {
        "a name with a letter missing": lambda: replace(network, "clasfication.1", nn.ReLU()),
        "a layer that does not fit": lambda: replace(network, "sequential2", nn.Linear(12, 10), example=EXAMPLE),
        "a name that is taken": lambda: add(network, "add_ReLU", nn.ReLU()),
    }
    for slip, attempt in slips.items():
        try:
            attempt()
        except ModsurgError as error:
            print(f"{slip}: {error}")
    print("--- planned, made and taken back")
    with edit(network, example=EXAMPLE) as e:
        e.remove("add_ReLU", delete=True)
        e.insert_after("sequential1.7", nn.ReLU())
    print(e.report)
    e.report.undo()
    print("after undo, child 8 of sequential1 is", network.get_submodule("sequential1.8"))


def main() -> None:
    """Edit one network by each way, and show that they print alike."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/tutorial/surgery.svg"), help="the edited network")
    options = parser.parse_args()
    left, right = plainly(), checked()
    print("both print alike:", str(left) == str(right))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(summary(right, example=EXAMPLE).to_svg())
    print("the edited network as a picture:", options.out)
    refused(right)


if __name__ == "__main__":
    main()
