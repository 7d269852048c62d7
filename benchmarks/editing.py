"""What an edit costs: every match of many replaced, every check on, beside what one writes without checks."""

from collections.abc import Callable

from torch import nn

from benchmarks.harness import Table, interleaved, there
from modsurg import replace, wrap


def tree(blocks: int = 1000) -> nn.Module:
    """101 modules a block, three levels deep; 20 of the activations in each are named "1"."""
    return nn.Sequential(*(nn.Sequential(*(leaves() for _ in range(20))) for _ in range(blocks)))


def leaves() -> nn.Module:
    """Two layers with an activation behind each."""
    return nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1), nn.ReLU())


def make(*_: object) -> nn.Module:
    """The new module."""
    return nn.Linear(4, 4)


def by_recursion(module: nn.Module, matches: Callable[[str, nn.Module], bool], path: str = "") -> None:
    """The pattern of torchao: children replaced by setattr on the way down."""
    for name, child in module.named_children():
        full = f"{path}.{name}" if path else name
        if matches(full, child):
            setattr(module, name, make(child))
        else:
            by_recursion(child, matches, full)


def by_level(root: nn.Module, matches: Callable[[str, nn.Module], bool]) -> None:
    """The pattern of composer: level by level, all sites collected first, then set; what was replaced is kept."""
    indices: dict[nn.Module, str] = {}
    level, replaced = [("", root)], {}
    while level:
        following = []
        for path, parent in level:
            for name, child in parent.named_children():
                full = f"{path}.{name}" if path else name
                indices[child] = full
                following.append((full, child))
        level = following
    parents = dict(root.named_modules())
    for child, path in indices.items():
        if matches(path, child):
            above, _, name = path.rpartition(".")
            replaced[child] = make(child)
            setattr(parents[above], name, replaced[child])


def replacing(runs: int) -> list[Table]:
    """20,000 of 101,001 modules; each run begins with the same tree."""
    model = tree()
    chosen = {name for name, module in model.named_modules() if name.endswith(".1") and type(module) is nn.ReLU}
    places = [(model.get_submodule(name.rpartition(".")[0]), model.get_submodule(name)) for name in chosen]
    reports = []

    def ours() -> None:
        reports.append(replace(model, lambda path, module: path in chosen, make))

    def loop() -> None:
        for name, _ in list(model.named_modules()):
            if name in chosen:
                model.set_submodule(name, make())

    def restore() -> None:
        reports.clear()
        for parent, child in places:
            parent._modules["1"] = child

    ways = {
        "modsurg.replace": ours,
        "set_submodule loop": loop,
        "recursion with setattr": lambda: by_recursion(model, lambda path, module: path in chosen),
        "level by level": lambda: by_level(model, lambda path, module: path in chosen),
        "making the modules alone": lambda: [make() for _ in chosen],
    }
    times = interleaved(ways, runs, restore)
    note = (
        "Ours checks everything and can be undone; the others do neither. The garbage collector is on: the others' "
        "lowest values are those of runs in which it did not come by."
    )
    return [Table("`replace`, 20,000 of 101,001 modules", times, 1 / 1.3, ("set_submodule loop",), note=note)]


class LoRA(nn.Module):
    """A thin path beside a layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.lora_a = nn.Linear(base.in_features, 8, bias=False)
        self.lora_b = nn.Linear(8, base.out_features, bias=False)


def adapters(runs: int) -> list[Table]:
    """LoRA around 1,000 layers."""
    if not there("peft"):
        return []
    from peft import LoraConfig, inject_adapter_in_model

    def layers() -> nn.Module:
        return nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(1000)))

    models: list[nn.Module] = []

    def prepare() -> None:
        models[:] = [layers()]

    config = LoraConfig(r=8, target_modules=r"\d+\.0")
    ways = {
        "modsurg.wrap": lambda: wrap(models[0], nn.Linear, LoRA),
        "peft.inject_adapter_in_model": lambda: inject_adapter_in_model(config, models[0]),
    }
    return [Table("LoRA around 1,000 layers", interleaved(ways, runs, prepare))]


MEASUREMENTS = (replacing, adapters)
QUICK = (replacing,)
