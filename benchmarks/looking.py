"""What a look costs: each tool in a process of its own that has made the model, so that the tool's imports count."""

from collections.abc import Iterable

from benchmarks.harness import Table, fresh, there

MODELS = {
    "resnet152": ("import torchvision; model = torchvision.models.resnet152()", "(1, 3, 224, 224)", "float32"),
    "vit_b_16": ("import torchvision; model = torchvision.models.vit_b_16()", "(1, 3, 224, 224)", "float32"),
    "BERT base": (
        "from transformers import BertConfig, BertModel; model = BertModel(BertConfig())",
        "(1, 128)",
        "long",
    ),
}
TOOLS = {
    "modsurg": "from modsurg import summary; str(summary(model, {shape}))",
    "torchinfo": (
        "from torchinfo import summary; "
        "str(summary(model, {shape}, dtypes=[torch.{dtype}], depth=99, verbose=0, device='cpu'))"
    ),
    "torchview": (
        "from torchview import draw_graph; "
        "draw_graph(model, input_size={shape}, dtypes=[torch.{dtype}], depth=99, device='meta')"
    ),
}
TREE = """
from torch import nn
model = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2 + n % 7), nn.ReLU(), nn.BatchNorm1d(4), nn.Dropout())
                        for n in range(20_000)))
"""
IMPORTS = {"import modsurg, after torch": "import modsurg", "the functions too": "from modsurg import replace, summary"}


def timed(setup: str, look: str) -> str:
    """A program that prints how long `look` takes after `setup`."""
    return f"import time, torch\n{setup}\nstart = time.perf_counter()\n{look}\nprint(time.perf_counter() - start)"


def summaries(runs: int) -> list[Table]:
    """Three models with an example."""
    return [one(name, TOOLS, runs) for name in MODELS if name != "BERT base" or there("transformers")]


def first_summary(runs: int) -> list[Table]:
    """The first of the models, beside the peer that the target names."""
    return [one(next(iter(MODELS)), ("modsurg", "torchinfo"), runs)]


def one(name: str, tools: Iterable[str], runs: int) -> Table:
    """One of the models, with the tools that are there."""
    setup, shape, dtype = MODELS[name]
    looks = {
        tool: timed(setup, TOOLS[tool].format(shape=shape, dtype=dtype))
        for tool in tools
        if tool == "modsurg" or there(tool)
    }
    return Table(f"`summary` of {name} with an example", fresh(looks, runs), 1.0, ("torchinfo",))


def large(runs: int) -> list[Table]:
    """A tree of 100,001 modules of which neighbours differ, so that nothing folds."""
    looks = {"summary": "summary(model)", "summary, and 100,000 lines printed": "str(summary(model))"}
    codes = {name: timed(TREE, f"from modsurg import summary; {look}") for name, look in looks.items()}
    return [Table("`summary` of 100,001 modules", fresh(codes, runs), 2.0)]


def imports(runs: int) -> list[Table]:
    """What the import adds to that of torch."""
    codes = {name: timed("", code) for name, code in IMPORTS.items()}
    return [Table("`import modsurg`", fresh(codes, runs), 0.05)]


MEASUREMENTS = (summaries, large, imports)
QUICK = (first_summary, imports)
