"""What an edit did: a list of `Change`, which optimizers, the key mapping, the recipe and the report read.

| kind | paths | anchor | old | new | detail |
|---|---|---|---|---|---|
| add | where the child is now | its parent | | the child | |
| insert | where the new module is now | the neighbour | | the new module | `Beside`: the neighbour's paths before |
| replace, wrap | where both are | | the old module | the new one | |
| remove | where it was | | the module | None, or the Identity in its place | |
| rename | where it was | | the module | the module | the new name, a `str` |
| resize | where it is | | the layer | the layer, the same object | `Resized`: sizes, tensors and their axes |
| freeze, unfreeze | where it is | | the module | the module | `Frozen`: parameters that changed |

`resize` has a change for each layer that was resized: those that were asked for, then those that follow them.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from torch import nn

from modsurg.errors import counted
from modsurg.surgery.journal import Journal
from modsurg.surgery.resize.values import Resized
from modsurg.tree.walk import Tree

Kind: TypeAlias = Literal["add", "insert", "replace", "remove", "wrap", "rename", "resize", "freeze", "unfreeze"]


@dataclass(frozen=True, slots=True)
class Beside:
    """Where a new module was inserted.

    Attributes:
        paths: The neighbour's paths before the edit, those that were meant.
        after: Whether the new module comes after the neighbour.
    """

    paths: tuple[str, ...]
    after: bool


@dataclass(frozen=True, slots=True)
class Frozen:
    """What `freeze` or `unfreeze` changed in one module.

    Attributes:
        parameters: The parameters that changed, with those of its children.
        statistics: The modules whose statistics are now frozen, or no longer are.
        trainable: Whether they train now.
        alone: Whether one parameter is meant, and not its module.
    """

    parameters: tuple[nn.Parameter, ...]
    statistics: tuple[nn.Module, ...]
    trainable: bool
    alone: bool = False

    def __str__(self) -> str:
        text = counted(len(self.parameters), "parameter", "parameters")
        if self.statistics:
            text += f" and the statistics of {counted(len(self.statistics), 'module', 'modules')}"
        return f"{text} {'trainable' if self.trainable else 'frozen'}"


@dataclass(frozen=True, slots=True)
class Change:
    """One change of one site, as the table above says.

    Attributes:
        kind: The verb: `"add"`, `"insert"`, `"replace"`, `"remove"`, `"wrap"`, `"rename"`, `"resize"`, `"freeze"`
            or `"unfreeze"`.
        paths: Every path that changed: for a new module the paths where it is now, otherwise those where the old was.
        anchor: The parent of an added module, the neighbour of an inserted one.
        old: The module that was there, if any.
        new: The module that is there now, if any.
        detail: What else belongs to this kind of change; `str(detail)` is its text in a report.
    """

    kind: Kind
    paths: tuple[str, ...]
    anchor: nn.Module | None = None
    old: nn.Module | None = None
    new: nn.Module | None = None
    detail: str | Beside | Resized | Frozen = ""

    @property
    def added(self) -> nn.Module | None:
        """The module that was made for this change, if there is one (not the Identity of a removal)."""
        return self.new if self.kind in ("add", "insert", "replace", "wrap") else None


@dataclass(slots=True)
class Record:
    """One verb of a transaction. A recipe is described from these.

    Attributes:
        verb: Its name.
        tree: The model before it.
        arguments: Its arguments that are plain values.
        journal: What it touched.
        changes: What it did.
        warnings: What the user should know.
        notes: What else happened.
    """

    verb: str
    tree: Tree
    arguments: dict[str, Any]
    journal: Journal = field(default_factory=Journal)
    changes: list[Change] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
