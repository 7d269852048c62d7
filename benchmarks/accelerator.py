"""Compare an accelerator with the CPU: `python -m benchmarks.accelerator [--device DEVICE]`, under three minutes.

Each check does the same on the CPU and on the device (cuda or mps) and compares: an edit with its optimizer, a resize
that others follow, loading and saving, the summary, training in bf16, torch.compile, a resumed run.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

import modsurg
from modsurg import Trainer

Check = Callable[[torch.device, Path], str]
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 6e-2}


def small() -> nn.Module:
    """A network that is quick everywhere."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )


def batches() -> DataLoader[tuple[torch.Tensor, ...]]:
    """Pictures whose class is which channel is brightest."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(256, 3, 16, 16, generator=generator)
    return DataLoader(TensorDataset(x, x.mean((2, 3)).argmax(1)), batch_size=32)


def greatest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The greatest difference, relative to the greatest value."""
    a, b = a.detach().float().cpu(), b.detach().float().cpu()
    return float((a - b).abs().max() / a.abs().max().clamp(min=1e-6))


def compare(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype = torch.float32) -> str:
    """The difference as text.

    Raises:
        AssertionError: It is more than rounding.
    """
    difference = greatest_difference(a, b)
    assert difference <= TOLERANCE[dtype], f"differs by {difference:.2e}"
    return f"differs by {difference:.1e}"


def edit_with_optimizer(device: torch.device, folder: Path) -> str:
    """Replace the head between two steps of Adam; the new parameters are where the old ones were."""
    outputs = []
    for where in (torch.device("cpu"), device):
        model = small().to(where)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        x = torch.ones(4, 3, 16, 16, device=where)
        for _ in range(2):
            model(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if model[5].out_features == 4:
                torch.manual_seed(1)
                modsurg.replace(model, "5", nn.Linear(16, 3), optimizer=optimizer, example=x)
        assert all(parameter.device.type == where.type for parameter in model.parameters())
        outputs.append(model.eval()(x))
    return compare(*outputs)


def resize_with_followers(device: torch.device, folder: Path) -> str:
    """Narrow one convolution of a ResNet-18 by half on the device, and what is coupled to it."""
    outputs = []
    torch.manual_seed(0)
    weights = resnet18().state_dict()
    for where in (torch.device("cpu"), device):
        model = resnet18().eval()
        model.load_state_dict(weights)
        model.to(where)
        x = torch.linspace(0, 1, 3 * 64 * 64, device=where).view(1, 3, 64, 64)
        modsurg.resize(model, "layer2.0.conv1", out_channels=0.5, follow=True, keep="l1", example=x)
        outputs.append(model(x))
    return compare(*outputs)


def load_and_save(device: torch.device, folder: Path) -> str:
    """Save from the device, load into a model on the device and one on the CPU: the same bits."""
    model = small().to(device)
    for name in ("state.safetensors", "state.pt"):
        path = modsurg.save_state(model, folder / name)
        there, here = small().to(device), small()
        for target in (there, here):
            with torch.no_grad():
                for parameter in target.parameters():
                    parameter.zero_()
            modsurg.load_state(target, path)
        for a, b in zip(there.state_dict().values(), here.state_dict().values(), strict=True):
            assert a.device.type == device.type
            assert torch.equal(a.cpu(), b)
    whole = modsurg.load_model(modsurg.save_model(model, folder / "model.safetensors")).to(device)
    assert torch.equal(whole.state_dict()["0.weight"], model.state_dict()["0.weight"])
    return "the same bits"


def summarize(device: torch.device, folder: Path) -> str:
    """The summary of a model on the device is that of the model on the CPU, and leaves the device's memory alone."""
    x = torch.zeros(1, 3, 16, 16)
    here = modsurg.summary(small(), x).to_dict()
    there = modsurg.summary(small().to(device), x.to(device)).to_dict()
    assert here == there
    return "the same"


def _losses(device: torch.device, **options: object) -> torch.Tensor:
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), device=device, seed=0, progress=False, **options)  # type: ignore[arg-type]  # options of the trainer
    return torch.tensor([float(row["loss"]) for row in trainer.fit(batches(), epochs=3)])


def train_in_bf16(device: torch.device, folder: Path) -> str:
    """Three epochs in bf16: the losses of the CPU in fp32, up to the rounding of bf16."""
    return compare(_losses(torch.device("cpu")), _losses(device, precision="bf16"), torch.bfloat16)


def compile_the_model(device: torch.device, folder: Path) -> str:
    """Three epochs with torch.compile; an edit looks through the wrapper."""
    found = compare(_losses(torch.device("cpu")), _losses(device, compile=True), torch.bfloat16)
    compiled = torch.compile(small().to(device))
    modsurg.replace(compiled, "2", nn.ReLU())
    return found


def resume(device: torch.device, folder: Path) -> str:
    """Four epochs at once, and two and two from the checkpoint: the same losses."""

    def run(epochs: int, directory: Path) -> list[float]:
        model = small()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        trainer = Trainer(
            model, optimizer, nn.CrossEntropyLoss(), device=device, seed=0, progress=False, checkpoint_dir=directory
        )
        return [float(row["loss"]) for row in trainer.fit(batches(), epochs=epochs)]

    whole = run(4, folder / "whole")
    run(2, folder / "parts")
    parts = run(4, folder / "parts")
    return compare(torch.tensor(whole), torch.tensor(parts))


CHECKS: tuple[Check, ...] = (
    edit_with_optimizer,
    resize_with_followers,
    load_and_save,
    summarize,
    train_in_bf16,
    compile_the_model,
    resume,
)


def accelerator() -> torch.device | None:
    """The accelerator of this machine, None if there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps") if torch.backends.mps.is_available() else None


def main() -> int:
    """Run every check and print a table; 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accelerator", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--device", type=torch.device, help="instead of the one that is found; cpu tries the script itself"
    )
    parser.add_argument("--skip", action="append", default=[], metavar="CHECK", help="leave one out; may be repeated")
    options = parser.parse_args()
    device = options.device or accelerator()
    if device is None:
        print(
            "no accelerator on this machine (neither cuda nor mps): nothing to compare. --device cpu tries the script"
        )
        return 0
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    print(f"modsurg {version('modsurg')}, torch {torch.__version__}, {name}\n")
    print("| check | against the CPU | seconds |\n|---|---|---|")
    failed = 0
    for check in CHECKS:
        if check.__name__ in options.skip:
            continue
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            try:
                found = check(device, Path(folder))
            except Exception as error:
                failed += 1
                found = f"**failed**: {type(error).__name__}: {str(error).splitlines()[0]}"
        print(f"| {check.__name__.replace('_', ' ')} | {found} | {time.perf_counter() - start:.1f} |", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
