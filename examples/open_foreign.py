"""Open a checkpoint of another project: see what is in it, give its weights the names of your model, load them.

The file is made here as a training framework leaves it: the weights under "state_dict" with the framework's prefixes,
a head of another name, what belongs to the loss, averaged weights under "module.", the optimizer, and an object of the
project's own. No part of it is ever run.
"""

import argparse
from pathlib import Path

import torch
from plainly import told_plainly
from torch import nn

from modsurg import diff, load_state, read_state, save_state, summary
from modsurg.errors import LoadError


def foreign_name(key: str) -> str:
    """What the other project calls one of our keys."""
    return f"model.backbone.{key}".replace("backbone.classifier", "head")


def make_foreign(model: nn.Module, file: Path) -> None:
    """Write what another project would have left behind."""
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    optimizer.step()
    state = {foreign_name(key): value for key, value in model.state_dict().items()}
    average = {f"module.{key}": value * 0.5 if value.is_floating_point() else value for key, value in state.items()}
    checkpoint = {
        "epoch": 4,
        "global_step": 1250,
        "state_dict": {**state, "criterion.weight": torch.ones(5)},
        "state_dict_ema": average,
        "optimizer_states": [optimizer.state_dict()],
        "hyper_parameters": argparse.Namespace(lr=1e-3, name="mobilenet"),
    }
    torch.save(checkpoint, file)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/foreign"), help="default: runs/foreign")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Look, try, mend, load, keep."""
    from torchvision.models import mobilenet_v3_small

    torch.manual_seed(0)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "epoch=4.ckpt"
    make_foreign(mobilenet_v3_small(num_classes=5), file)

    print("--- what is in it: modsurg summary FILE --depth 3\n")
    print(summary(file, depth=3))
    source = read_state(file).source
    print(f"taken: {source.taken}; left: {', '.join(source.left)}")

    print("\n--- load_state(model, file)\n")
    model = mobilenet_v3_small(num_classes=5)
    try:
        load_state(model, file)
    except LoadError as error:
        print(error)

    print("\n--- the line that it suggests, and what belongs to the loss left out\n")
    rename = {"model.backbone.": "", "model.head": "classifier", "criterion": None}
    print(load_state(model, file, rename=rename))

    print("\n--- the averaged weights instead\n")
    averaged = mobilenet_v3_small(num_classes=5)
    prefixed = {"module.model.backbone.": "", "module.model.head": "classifier"}
    print(load_state(averaged, read_state(file, part="state_dict_ema"), rename=prefixed))
    print(str(diff(model, averaged)).splitlines()[-1].strip())

    print("\n--- ten classes instead of five: the body is taken, the head is left as it begins\n")
    print(load_state(mobilenet_v3_small(num_classes=10), file, rename=rename, on_mismatch="skip"))

    kept = save_state(averaged, options.out / "mobilenet.safetensors")
    print(f"\n{kept}: {kept.stat().st_size:,} bytes instead of {file.stat().st_size:,}, nothing but weights")


def main(arguments: list[str] | None = None) -> None:
    """Run the whole of it; what goes wrong is one line."""
    options = parse(arguments)
    with told_plainly():
        run(options)


if __name__ == "__main__":
    main()
