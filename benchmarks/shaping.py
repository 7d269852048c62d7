"""Widths that follow, layers that fold, features, beside Torch-Pruning and torchvision's extractor."""

import time
import warnings

import torch
from torch import nn
from torchvision.models import densenet201, resnet50
from torchvision.models.feature_extraction import create_feature_extractor

from benchmarks.harness import Table, interleaved, there
from modsurg import features, fuse, resize, select


def narrowing(runs: int) -> list[Table]:
    """Every convolution of densenet201 narrowed by half, once: Torch-Pruning takes long."""
    x = torch.zeros(1, 3, 224, 224)

    def ours() -> float:
        model = densenet201()
        start = time.perf_counter()
        resize(model, select(model, nn.Conv2d), out_channels=0.5, follow=True, keep="l2", example=x)
        return time.perf_counter() - start

    times = {"modsurg.resize(follow=True)": [ours() for _ in range(min(runs, 3))]}
    if there("torch_pruning"):
        import torch_pruning as tp

        model = densenet201()
        start = time.perf_counter()
        pruner = tp.pruner.MagnitudePruner(
            model,
            x,
            importance=tp.importance.MagnitudeImportance(p=2),
            pruning_ratio=0.5,
            ignored_layers=[model.classifier],
        )
        pruner.step()
        times["Torch-Pruning"] = [time.perf_counter() - start]
    note = "Ours is one transaction, checked on meta, with undo; Torch-Pruning can't go back. One run of Torch-Pruning."
    against = ("Torch-Pruning",) if "Torch-Pruning" in times else ()
    return [Table("densenet201, every convolution by half", times, 0.1 if against else None, against, note=note)]


def narrowing_a_language_model(runs: int) -> list[Table]:
    """The inner width of every block of a Llama-like model of 12 layers. Torch-Pruning did not end in ten minutes."""
    if not there("transformers"):
        return []
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1000, hidden_size=256, intermediate_size=1024, num_hidden_layers=12, num_attention_heads=8,
        num_key_value_heads=4,
    )  # fmt: skip
    ids = {"input_ids": torch.zeros(1, 8, dtype=torch.int64)}

    def ours() -> float:
        model = LlamaForCausalLM(config)
        start = time.perf_counter()
        resize(model, "model.layers.*.mlp.up_proj", out_features=0.5, follow=True, keep="l2", example=ids)
        return time.perf_counter() - start

    return [
        Table(
            "A Llama-like model of 12 layers, MLPs by half",
            {"modsurg.resize(follow=True)": [ours() for _ in range(runs)]},
            5.0,
        )
    ]


def folding(runs: int) -> list[Table]:
    """A forward of resnet50 before and after `fuse`."""
    plain, folded = resnet50().eval(), resnet50().eval()
    folded.load_state_dict(plain.state_dict())
    fuse(folded, example=(1, 3, 224, 224))
    x = torch.rand(4, 3, 224, 224)
    with torch.inference_mode():
        ways = {"fused": lambda: folded(x), "as it is": lambda: plain(x)}
        times = interleaved(ways, runs)
    return [Table("Forward of resnet50, batch of 4, BatchNorm folded", times)]


def stopping_early(runs: int) -> list[Table]:
    """Features of `layer2` of resnet50."""
    model = resnet50().eval()
    ours = features(model, "layer2")
    theirs = create_feature_extractor(model, ["layer2"])
    x = torch.rand(4, 3, 224, 224)
    with torch.inference_mode():
        ways = {
            "modsurg.features": lambda: ours(x),
            "torchvision's create_feature_extractor": lambda: theirs(x),
            "the whole model": lambda: model(x),
        }
        times = interleaved(ways, runs)
    note = "torchvision's traces the model with FX, which transformers' models do not allow."
    return [Table("Features of layer2 of resnet50, batch of 4", times, note=note)]


warnings.filterwarnings("ignore", module="torch_pruning")
MEASUREMENTS = (narrowing, narrowing_a_language_model, folding, stopping_early)
QUICK = (narrowing_a_language_model, stopping_early)
