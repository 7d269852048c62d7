"""Surgery: a module added to a network and one replaced, by torch and by modsurg."""

import argparse
from pathlib import Path
from textwrap import fill

import torch
from torch import nn

from modsurg import add, edit, replace, summary
from modsurg.errors import ModsurgError
from networks import Mynn

EXAMPLE = (1, 3, 32, 32)  # the shape of a picture with which an edit is checked


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
    where = "classfication.1"
    print(replace(network, where, nn.ReLU(), optimizer=optimizer, example=EXAMPLE))
    return network


def refused(network: nn.Module) -> None:
    """Slips that are found before anything changes, and an edit taken back."""
    print("--- what is refused")
    slips = {
        "a letter is missing": (replace, "clasfication.1", nn.ReLU()),
        "a layer does not fit": (replace, "sequential2", nn.Linear(12, 10)),
        "the name is taken": (add, "add_ReLU", nn.ReLU()),
    }
    for slip, (verb, where, new) in slips.items():
        try:
            verb(network, where, new, example=EXAMPLE)
        except ModsurgError as error:
            print(fill(f"{slip}: {error}", 88, subsequent_indent="  "))
    print("--- planned, made and taken back")
    with edit(network, example=EXAMPLE) as e:
        e.remove("add_ReLU", delete=True)
        e.insert_after("sequential1.7", nn.ReLU())
    print(e.report)
    e.report.undo()
    print("after undo, sequential1.8 is", network.get_submodule("sequential1.8"))


def main() -> None:
    """Edit one network by each way, and show that they print alike."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default="runs/tutorial/surgery.svg")
    options = parser.parse_args()
    left, right = plainly(), checked()
    print("both print alike:", str(left) == str(right))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(summary(right, example=EXAMPLE).to_svg())
    print("the edited network as a picture:", options.out)
    refused(right)


if __name__ == "__main__":
    main()
