"""One verb at work: the tree as it was, and what the verb did, until the transaction takes it over."""

from dataclasses import dataclass, field

import torch
from torch import nn

from modsurg.surgery.journal import Journal
from modsurg.surgery.resize.resize import Resized
from modsurg.tree.walk import Tree


@dataclass(frozen=True, slots=True)
class Change:
    """One line of a report.

    Attributes:
        kind: The verb: `"add"`, `"insert"`, `"replace"`, `"remove"`, `"wrap"`, `"rename"`, `"resize"`, `"freeze"`
            or `"unfreeze"`.
        paths: Every path that changed; of a rename or a removal the old ones.
        old: The module that was there, if any.
        new: The module that is there now, if any.
        detail: What else there is to say: the new name, the sizes.
    """

    kind: str
    paths: tuple[str, ...]
    old: nn.Module | None
    new: nn.Module | None
    detail: str = ""


@dataclass(slots=True)
class Step:
    """What one verb works on and leaves behind.

    Attributes:
        tree: The model as it was before this verb.
        journal: What the verb touched.
        changes: What it did, a line for each site.
        warnings: What the user should know, because something may not be as it was meant.
        notes: What else happened.
        replaced: Each module that took the place of another (old, new, first path): optimizers follow it.
        fresh: New modules by their path: the pre-flight asks whether they are called.
        resized: What was resized: optimizers follow that too.
        thawed: `id` of the parameters that train from now on.
        frozen: Whether any were frozen or thawed.
        homes: The weight whose device and dtype new modules below a path take, found so far.
        numbers: The numbers by which the forward of a class picks children of a name, found so far.
        uses: What the forward of a class does with a child of a name, found so far; see `reading.reads`.
        made: Paths, old module (or anchor) and new module of each site, for the recipe.
    """

    tree: Tree
    journal: Journal = field(default_factory=Journal)
    changes: list[Change] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    replaced: list[tuple[nn.Module, nn.Module, str]] = field(default_factory=list)
    fresh: list[nn.Module] = field(default_factory=list)
    homes: dict[str, torch.Tensor | None] = field(default_factory=dict)
    numbers: dict[tuple[type[nn.Module], str], set[int]] = field(default_factory=dict)
    uses: dict[tuple[type[nn.Module], str], tuple[set[str], bool]] = field(default_factory=dict)
    made: list[tuple[tuple[str, ...], nn.Module, nn.Module]] = field(default_factory=list)
    resized: list[Resized] = field(default_factory=list)
    thawed: set[int] = field(default_factory=set)
    frozen: bool = False

    def child(self, parent: nn.Module, name: str, new: nn.Module) -> None:
        """Put a module into a slot that is there."""
        self.journal.keep_dict(parent._modules)
        parent._modules[name] = new

    def children(self, parent: nn.Module, entries: list[tuple[str, nn.Module | None]]) -> None:
        """Give a parent these children in this order."""
        self.journal.keep_dict(parent._modules)
        parent._modules.clear()
        parent._modules.update(entries)


def last(path: str) -> str:
    """The name at the end of a path."""
    return path.rpartition(".")[2]
