"""A source in which some tensors are made of others, still read tensor by tensor."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from modsurg.checkpoints.formats.derived import rename_versions
from modsurg.checkpoints.formats.documents import RUN
from modsurg.checkpoints.formats.file_io import Region
from modsurg.checkpoints.formats.source import Entry, Source
from modsurg.errors import LoadError
from modsurg.structure.schema import KEY as TREE


@dataclass(frozen=True)
class Output:
    """A tensor that a rule makes.

    Attributes:
        entry: Its name, dtype and shape.
        keys: The source's keys that it is made of.
        make: Gives its values from theirs.
    """

    entry: Entry
    keys: tuple[str, ...]
    make: Callable[[list[torch.Tensor]], torch.Tensor]


class RuledSource(Source):
    """A source in which some tensors are made of others when they are read.

    Args:
        source: Where the values come from; closed with this one.
        outputs: What is made. Its place in the order is that of its first part.

    Raises:
        LoadError: A name that the source has already, or two outputs of one name.
    """

    def __init__(self, source: Source, outputs: Sequence[Output]) -> None:
        self._source = source
        self._made = {output.entry.name: output for output in outputs}
        parts = {key for output in outputs for key in output.keys}
        made_at: dict[str, list[str]] = {}
        for output in outputs:
            made_at.setdefault(output.keys[0], []).append(output.entry.name)
        order: list[str] = []
        for key in source.keys_in_order:
            order += made_at.get(key, []) if key in parts else [key]
        if len(set(order)) < len(order):
            twice = next(name for name in order if order.count(name) > 1)
            raise LoadError(f"rules: two tensors would be called {twice}; nothing was loaded")
        names = {name: self._made[name].keys[0] if name in self._made else name for name in order}
        ties = {key: first for key, first in source.notes.ties.items() if not parts & {key, first}}
        ties |= _ties_of_outputs(source, outputs)
        notes = source.notes
        versions = rename_versions(notes.versions, names)
        entries = {
            name: self._made[name].entry if name in self._made else source[name]
            for name in order
            if name in self._made or name in source
        }
        strings = {name: text for name, text in notes.metadata.items() if name not in (RUN, TREE)}
        super().__init__(
            source.path, entries, replace(notes, metadata=strings, ties=ties, versions=versions, order=order)
        )
        self.taken, self.left, self.plain = source.taken, source.left, source.plain
        self.left_tensors = source.left_tensors

    def region(self, key: str) -> Region | None:
        """Where the values lie, if they are in the file as they are wanted."""
        return None if key in self._made else self._source.region(key)

    def read(self, key: str) -> torch.Tensor:
        """The values, made of their parts where a rule says so."""
        if key not in self._made:
            return self._source.read(key)
        output = self._made[key]
        return output.make([self._source.read(each) for each in output.keys])

    def check(self, key: str) -> bool | None:
        """Whether the stored hashes of all parts hold."""
        keys = self._made[key].keys if key in self._made else (key,)
        found = [self._source.check(each) for each in keys]
        return False if False in found else None if None in found else True

    @property
    def sealed(self) -> bool | None:
        """Whether the stored hash of the original's header holds."""
        return self._source.sealed

    def close(self) -> None:
        """Close the original."""
        self._source.close()


def _ties_of_outputs(source: Source, outputs: Sequence[Output]) -> dict[str, str]:
    """What is made of tied tensors in the same way is tied: name -> the first such name."""
    ties: dict[str, str] = {}
    made: Counter[tuple[str, ...]] = Counter()
    first: dict[object, str] = {}
    for output in outputs:
        keys = tuple(source.notes.ties.get(key, key) for key in output.keys)
        same = first.setdefault((keys, made[output.keys], output.entry.shape), output.entry.name)
        made[output.keys] += 1
        if same != output.entry.name:
            ties[output.entry.name] = same
    return ties
