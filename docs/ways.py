"""Print the way of one call through the files of modsurg: `python docs/ways.py replace|load|save|step`.

Each file is listed where the call enters it first, indented below the file that called it, with its topic.
"""

import sys
import tempfile
import warnings
from pathlib import Path
from textwrap import shorten
from types import CodeType, FrameType

import torch
from torch import nn

import modsurg

ROOT = Path(modsurg.__file__).parent


class Way:
    """The files of modsurg that are entered between `start` and `stop`.

    Attributes:
        entries: Depth and path of each file, in the order of their first entry.
        functions: The code of every function that ran.
    """

    def __init__(self) -> None:
        self.entries: dict[str, tuple[int, Path]] = {}
        self.functions: set[CodeType] = set()
        self._depth: dict[FrameType, int] = {}

    def start(self) -> None:
        """Begin to record."""
        sys.setprofile(self._enter)

    def stop(self) -> None:
        """Record no more."""
        sys.setprofile(None)

    def _enter(self, frame: FrameType, event: str, _: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event != "call" or ROOT not in path.parents:
            return
        caller = frame.f_back
        while caller is not None and caller not in self._depth:
            caller = caller.f_back
        outer = 0 if caller is None else self._depth[caller]
        same = caller is not None and caller.f_code.co_filename == frame.f_code.co_filename
        self._depth[frame] = outer if same else outer + 1
        self.functions.add(frame.f_code)
        self.entries.setdefault(str(path), (self._depth[frame], path.relative_to(ROOT)))


def small() -> nn.Module:
    """A network with a head."""
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))


def replace_a_layer(way: Way) -> str:
    """Replace the head of a network under an optimizer."""
    model, new = small(), nn.Linear(288, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    way.start()
    modsurg.replace(model, "3", new, optimizer=optimizer)
    way.stop()
    return 'replace(model, "3", nn.Linear(288, 10), optimizer=optimizer)'


def load_a_state(way: Way) -> str:
    """Load a file of torch.save."""
    path, model = Path(tempfile.mkdtemp(), "x.pt"), small()
    torch.save(small().state_dict(), path)
    way.start()
    modsurg.load_state(model, path)
    way.stop()
    return 'load_state(model, "x.pt")'


def save_a_model(way: Way) -> str:
    """Keep a whole model."""
    path, model = Path(tempfile.mkdtemp(), "net.safetensors"), small()
    way.start()
    modsurg.save_model(model, path)
    way.stop()
    return 'save_model(model, "net.safetensors")'


def train_a_step(way: Way) -> str:
    """One step of `fit`, in the middle of an epoch."""

    def on_step(trainer: modsurg.Trainer) -> None:
        (way.start, way.stop, str)[trainer.step - 1]()

    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = modsurg.Trainer(model, optimizer, nn.CrossEntropyLoss(), device="cpu", progress=False)
    trainer.fit([(torch.rand(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64))] * 3, epochs=1, on_step=on_step)
    return "the second step of trainer.fit(loader, epochs=1)"


WAYS = {"replace": replace_a_layer, "load": load_a_state, "save": save_a_model, "step": train_a_step}


def topic(path: Path) -> str:
    """The first line of the docstring of a file."""
    return (ROOT / path).read_text().split('"""')[1].partition("\n")[0]


def main() -> None:
    """Print one way."""
    warnings.simplefilter("ignore")
    follow = WAYS[sys.argv[1]]
    follow(Way())  # imports what is needed
    way = Way()
    text = follow(way)
    print(f"{text}\n{len(way.entries)} files, {len(way.functions)} functions\n")
    width = max(2 * depth + len(str(path)) for depth, path in way.entries.values())
    for depth, path in way.entries.values():
        name = f"{'  ' * (depth - 1)}{path}"
        print(f"{name:<{width}}{shorten(topic(path), 108 - width, placeholder=' ...')}")


if __name__ == "__main__":
    main()
