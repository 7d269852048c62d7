"""Draw the pictures of the documentation while it is built, so that none can go stale."""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from torchvision.models import resnet18

from modsurg import Trainer, insert_after, summary

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.append(str(EXAMPLES))

from cifar_net import CifarNet, accuracy  # noqa: E402  # beside the project, on the path only now
from pictures import Batches, load_pictures  # noqa: E402


def networks() -> dict[str, str]:
    """Summaries as SVG."""
    network = CifarNet().sequential
    drawn = {"network.svg": summary(network, (1, 3, 32, 32)).to_svg()}
    insert_after(network, torch.nn.Conv2d, torch.nn.ReLU)
    drawn["network-edited.svg"] = summary(network, (1, 3, 32, 32)).to_svg()
    drawn["resnet18.svg"] = summary(resnet18(), (1, 3, 224, 224)).to_svg()
    return drawn


def curves(file: Path) -> None:
    """The tutorial's network on 600 of the digits, for six epochs."""
    torch.manual_seed(0)
    data, network = load_pictures("digits", 600), CifarNet()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    loss = torch.nn.CrossEntropyLoss()
    trainer = Trainer(network, optimizer, loss, metrics=[accuracy], device="cpu", progress=False)
    train, test = (Batches(part, 64, data.train) for part in (data.train, data.test))
    trainer.fit(train, test, epochs=6).plot(file)


def sheets(folder: Path) -> None:
    """What the tutorial's scripts draw."""
    for script, name in (("04_transforms", "transforms.png"), ("08_pooling", "pooling.png")):
        command = [sys.executable, EXAMPLES / f"tutorial/{script}.py", "--out", folder / name]
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)


def pictures() -> dict[str, str | bytes]:
    """File name -> content."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sheets(folder)
        curves(folder / "curves.png")
        return networks() | {path.name: path.read_bytes() for path in folder.iterdir()}


@event_priority(-100)
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add each picture under pictures/, after the plugin for languages, which knows only files on disk."""
    if not (drawn := _DRAWN):
        drawn.update(pictures())
    for name, content in drawn.items():
        files.append(File.generated(config, f"pictures/{name}", content=content))
    return files


_DRAWN: dict[str, str | bytes] = {}  # once a build, not once a language
