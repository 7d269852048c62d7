"""What a summary knows, before anybody thinks of columns."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from modsurg.errors import visible

Shape = tuple[int, ...]

_LONGEST = "NonDynamicallyQuantizableLinear"  # a Linear but for its name, in every nn.MultiheadAttention


@dataclass(slots=True)
class Row:
    """A module, or in a file the tensors that have a prefix in common. Numbers include everything below.

    Attributes:
        path: Dotted; `""` is the root.
        kind: The class; empty where the file does not say.
        detail: The arguments that matter.
        params: Elements of the parameters that were not met before, in module order.
        trainable: Those of them that require a gradient.
        buffers: Elements of the buffers.
        inputs: Shapes at the first call; None without an example.
        outputs: Likewise.
        macs: Multiply-adds of all calls; None without an example.
        activations: Bytes of the outputs that were made.
        calls: How often it was called.
        notes: What to say of it besides: where it is tied, that it was not called.
        children: In module order.
    """

    path: str
    kind: str = ""
    detail: str = ""
    params: int = 0
    trainable: int = 0
    buffers: int = 0
    inputs: tuple[Shape, ...] | None = None
    outputs: tuple[Shape, ...] | None = None
    macs: int | None = None
    activations: int | None = None
    calls: int | None = None
    notes: list[str] = field(default_factory=list)
    children: list["Row"] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The last segment of the path."""
        return self.path.rpartition(".")[2]

    @property
    def layer(self) -> str:
        """Class and arguments, fit to be printed."""
        kind = "Linear" if self.kind == _LONGEST else self.kind
        return visible(f"{kind} {self.detail}".strip())

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, without the children."""
        data = {name: getattr(self, name) for name in self.__slots__ if name not in ("children", "kind")}
        shapes = {
            name: None if data[name] is None else [list(shape) for shape in data[name]]
            for name in ("inputs", "outputs")
        }
        return {"path": self.path, "class": self.kind, **data, **shapes, "notes": list(self.notes)}


@dataclass(slots=True)
class Totals:
    """The whole model. A tied tensor counts once."""

    params: int = 0
    trainable_params: int = 0
    frozen_params: int = 0
    shared_params: int = 0
    param_bytes: int = 0
    buffers: int = 0
    buffer_bytes: int = 0
    modules: int = 0
    macs: int | None = None
    activation_bytes: int | None = None

    def to_dict(self) -> dict[str, int | None]:
        """JSON-able."""
        return asdict(self)


@dataclass(slots=True)
class Content:
    """A summary's data.

    Attributes:
        root: The tree.
        totals: Of all of it.
        about: Where it is and what it is made of: "cpu", "float32", "train"; for a file its name.
        note: How the example was run, where not on meta; which part of a file is shown, where not all.
    """

    root: Row
    totals: Totals
    about: list[str]
    note: str = ""

    def rows(self) -> Iterator[Row]:
        """Every row, parents before their children."""
        waiting = [self.root]
        while waiting:
            row = waiting.pop()
            yield row
            waiting.extend(reversed(row.children))


def add_up(rows: list[Row]) -> None:
    """Add the parameters and buffers of each row to its parent; `rows` has parents before their children."""
    parents = {id(child): row for row in rows for child in row.children}
    for row in reversed(rows):
        parent = parents.get(id(row)) if row.params or row.buffers else None
        if parent is not None:
            parent.params += row.params
            parent.trainable += row.trainable
            parent.buffers += row.buffers


def mark_frozen(rows: list[Row]) -> None:
    """Say of the topmost rows whose parameters are all frozen that they are."""
    if rows[0].params == rows[0].trainable:
        return
    inside = {id(child) for row in rows if row.params and not row.trainable for child in row.children}
    for row in rows[1:]:
        if row.params and not row.trainable and id(row) not in inside:
            row.notes.append("frozen")
