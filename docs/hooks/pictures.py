"""Draw the pictures of the documentation while it is built, so that none can go stale."""

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from torch import nn
from torchvision.models import resnet18

from modsurg import insert_after, summary


def tutorial_network() -> nn.Sequential:
    """The CIFAR-10 network of the tutorial."""
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 5, padding=2), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 32, 5, padding=2), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 5, padding=2), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(1024, 64), nn.Linear(64, 10)),
    )


def pictures() -> dict[str, str]:
    """File name -> SVG."""
    network = tutorial_network()
    drawn = {"network.svg": summary(network, (1, 3, 32, 32)).to_svg()}
    insert_after(network, nn.Conv2d, nn.ReLU)
    drawn["network-edited.svg"] = summary(network, (1, 3, 32, 32)).to_svg()
    drawn["resnet18.svg"] = summary(resnet18(), (1, 3, 224, 224)).to_svg()
    return drawn


@event_priority(-100)
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add each picture under pictures/, after the plugin for languages, which knows only files on disk."""
    for name, content in pictures().items():
        files.append(File.generated(config, f"pictures/{name}", content=content))
    return files
