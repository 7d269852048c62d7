"""LoRA by `wrap`: a small vision transformer that reads digits learns to read them upside down, by adapters alone.

The base is torchvision's `VisionTransformer`. Its attention keeps query, key and value in one packed weight and never
calls them as layers, so it is first replaced by one that computes the same with four Linear layers. Thin pairs of
layers beside these learn the new task; only they are kept, and loaded onto a fresh copy of the base. Merged into new
Linear layers they cost nothing more.
"""

import argparse
from dataclasses import replace as altered
from pathlib import Path

import torch
from cifar_net import accuracy
from pictures import Batches, Pictures, load_pictures
from plainly import told_plainly
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import VisionTransformer

from modsurg import Trainer, diff, freeze, load_state, replace, save_state, wrap

ADAPTED = r"re:.*self_attention\.(query|key|value|out)"


def reader(classes: int) -> VisionTransformer:
    """(B, 3, 32, 32) pictures, cut into 16 patches of 8x8, to (B, classes) scores."""
    return VisionTransformer(32, 8, num_layers=3, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=classes)


class Attention(nn.Module):
    """What `nn.MultiheadAttention` computes, with a layer each for query, key, value and output.

    Args:
        packed: Its weights are copied; batch first, without masks.
    """

    def __init__(self, packed: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads = packed.num_heads
        weights, biases = packed.in_proj_weight.chunk(3), packed.in_proj_bias.chunk(3)
        self.query, self.key, self.value = map(linear, weights, biases)
        self.out = linear(packed.out_proj.weight, packed.out_proj.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False) -> tuple[Tensor, None]:
        """(B, T, width) each to (B, T, width)."""
        layers = ((self.query, query), (self.key, key), (self.value, value))
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer, x in layers)
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(mixed), None


def unpacked(packed: nn.MultiheadAttention) -> Attention:
    """Return the same attention in four layers."""
    return Attention(packed)


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """Return a layer with a copy of these weights."""
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    load_state(layer, {"weight": weight, "bias": bias})
    return layer


class LoRA(nn.Module):
    """A layer, and beside it a thin path of `rank` that begins at zero: what it answers is at first unchanged."""

    def __init__(self, base: nn.Linear, rank: int = 8) -> None:
        super().__init__()
        self.base = base
        self.lora_a = nn.Linear(base.in_features, rank, bias=False)
        self.lora_b = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.lora_b.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Base and adapter, added."""
        both: Tensor = self.base(x) + self.lora_b(self.lora_a(x))
        return both


@torch.no_grad()
def merged(layer: LoRA) -> nn.Linear:
    """Return a new layer with the adapter's product in its weight; the old one stays, so that undo is exact."""
    return linear(layer.base.weight + layer.lora_b.weight @ layer.lora_a.weight, layer.base.bias)


def upside_down(pictures: Pictures) -> Pictures:
    """The same pictures, their lowest row first."""
    return altered(pictures, images=pictures.images.flip(1))


def trained(model: nn.Module, batches: Batches, epochs: int) -> Trainer:
    """Train whatever is not frozen, by AdamW with one cycle of learning rates; what did it, to evaluate with."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * len(batches))
    loss, metrics = nn.CrossEntropyLoss(), {"accuracy": accuracy}
    trainer = Trainer(model, optimizer, loss, scheduler=cycle, metrics=metrics, progress=False)
    trainer.fit(batches, epochs=epochs)
    return trainer


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="DIR", default="digits", help="train/<class>/* and test/<class>/* (digits)")
    parser.add_argument("--epochs", type=int, default=12, help="for the base, and for the adapters (default: 12)")
    parser.add_argument("--limit", type=int, metavar="N", help="at most N training and N test pictures")
    parser.add_argument("--out", type=Path, default=Path("runs/lora"), help="for what is kept (default: runs/lora)")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Train the base, adapt it, keep the adapters, put them onto a fresh base, merge."""
    torch.manual_seed(0)
    data = load_pictures(options.data, options.limit)
    print(data.source)
    like, flipped = data.train, upside_down(data.train)
    test, flipped_test = (Batches(pictures, 64, like) for pictures in (data.test, upside_down(data.test)))
    options.out.mkdir(parents=True, exist_ok=True)

    model = reader(len(like.classes))
    trainer = trained(model, Batches(like, 32, like, augment=True), options.epochs)
    base = save_state(model, options.out / "base.safetensors")
    print(f"\nthe base reads {trainer.evaluate(test)['accuracy']:.1%} upright, ", end="")
    print(f"{trainer.evaluate(flipped_test)['accuracy']:.1%} upside down\n")

    replace(model, nn.MultiheadAttention, unpacked, count=3, example=(1, 3, 32, 32))
    freeze(model, "**")
    print(wrap(model, ADAPTED, LoRA, count=12, example=(1, 3, 32, 32)))
    trainer = trained(model, Batches(flipped, 32, like, augment=True), options.epochs)
    print(f"\nwith adapters it reads {trainer.evaluate(flipped_test)['accuracy']:.1%} upside down")
    adapters = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" in name}
    file = save_state(adapters, options.out / "upside_down.safetensors")
    print(f"{file}: {file.stat().st_size:,} bytes, beside the {base.stat().st_size:,} of the base\n")
    reopen(base, file, model.eval(), next(iter(flipped_test))[0])


@torch.no_grad()
def reopen(base: Path, adapters: Path, model: VisionTransformer, pictures: Tensor) -> None:
    """Put both files together on a fresh model, then merge; compare its answers with those of `model`."""
    fresh = reader(model.num_classes).eval()
    load_state(fresh, base)
    replace(fresh, nn.MultiheadAttention, unpacked)
    wrap(fresh, ADAPTED, LoRA)
    print(f"a fresh base and the adapters: {load_state(fresh, adapters, only='**.lora_?')}")
    print(f"  the same answers, bit for bit: {torch.equal(fresh(pictures), model(pictures))}")
    report = replace(fresh, LoRA, merged)
    print(f"merged: answers differ by at most {(fresh(pictures) - model(pictures)).abs().max():.0e}")
    report.undo()
    print(f"  taken back, the same answers again: {torch.equal(fresh(pictures), model(pictures))}")
    replace(fresh, LoRA, merged)
    print(f"  against the base:{str(diff(base, fresh)).splitlines()[-1]}")


def main(arguments: list[str] | None = None) -> None:
    """Run the whole of it; what goes wrong is one line."""
    options = parse(arguments)
    with told_plainly():
        run(options)


if __name__ == "__main__":
    main()
