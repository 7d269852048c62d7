"""What differs between two models, states or files: `diff`."""

import math
import os
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack

from torch import Tensor

from modsurg.checkpoints.formats.registry import open_source
from modsurg.checkpoints.formats.remote import is_binary
from modsurg.checkpoints.formats.source import Source
from modsurg.errors import FormatError, SummaryError, TrustError, counted, listed
from modsurg.views.diff.build import Side, two_sides
from modsurg.views.diff.changes import Changes
from modsurg.views.diff.match import Matching
from modsurg.views.diff.nodes import Leaf, Node, same_bytes
from modsurg.views.diff.result import Diff
from modsurg.views.diff.swaps import repair
from modsurg.views.diff.values import Key, Values, compare_values

Progress = Callable[[int, int], object]


def diff(old: object, new: object, *, atol: float = 0.0, progress: Progress | None = None) -> Diff:
    """Compare two models, states or files, in any mix: structure, shapes, dtypes, requires_grad, ties and values.

    Modules and tensors are matched by what they are and hold, not only by name: what was renamed, moved, wrapped or
    renumbered is one line, and is compared with what it was. Values are compared bit for bit (NaN equals NaN), all of
    them, one pair of tensors at a time: files are never read whole. Two dtypes are compared by value.

    Classes and their arguments are compared where both sides have them: models, and whole-model files, whose code is
    not needed. Otherwise the comparison is that of the two state_dicts. The mode (train or eval) does not count.

    Args:
        old: A model, a state_dict or any nested dictionary of tensors and numbers, what `read_state` gives, or a path.
        new: The same.
        atol: Values that differ by at most this are equal; a note counts the tensors. By default every bit counts.
        progress: Called with the bytes compared so far and in all, after each tensor.

    Returns:
        Empty and false if nothing differs. A file with tensors beside its state, such as an optimizer's, is the same
        only if those are; a note names them. Prints as a tree: + added, - removed, ~ changed.

    Raises:
        FileNotFoundError: No file there.
        FormatError: A file that is not what its name says.

    Example:
        >>> import copy, torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> before = copy.deepcopy(model)
        >>> bool(diff(before, model))
        False
        >>> model[1] = nn.GELU()
        >>> with torch.no_grad():
        ...     _ = before[0].bias.fill_(0.0), model[0].bias.copy_(torch.tensor([0.0, 0.5]))
        >>> print(diff(before, model))
        ~ 0.bias  1 of 2 differs at [1]: 0 -> 0.5, by 0.5 (relative 1)
        ~ 1       ReLU -> GELU(approximate='none')
          1 with other values, 1 replaced
    """
    with ExitStack() as stack:
        opened = [_opened(thing, stack) for thing in (old, new)]
        comparison = _Comparison(*two_sides(*opened), _checked_tolerance(atol), progress)
        old, new = opened
        left = _find_left_tensors(old, new)
        return comparison.result(_notes(old, new, left), left)


def _opened(thing: object, stack: ExitStack) -> object:
    if isinstance(thing, str | os.PathLike) or is_binary(thing):
        return stack.enter_context(open_source(thing))
    return thing


def _find_left_tensors(old: object, new: object) -> tuple[str, ...]:
    """What lies in the files beside the states, holds tensors, and is not the same in both."""
    sources = [thing for thing in (old, new) if isinstance(thing, Source)]
    names = dict.fromkeys(name for source in sources for name in source.left_tensors)
    both = len(sources) == 2 and sources[0].left_tensors and sources[1].left_tensors
    return tuple(name for name in names if not (both and _is_same_part(sources[0], sources[1], name)))


def _is_same_part(old: Source, new: Source, name: str) -> bool:
    """Whether both files have the same tensors under this name; False where they can't be read."""
    with ExitStack() as stack:
        try:
            parts = [stack.enter_context(open_source(source.path, name)) for source in (old, new) if source.path]
        except (FormatError, TrustError):
            return False
        return len(parts) == 2 and not diff(*parts)


def _notes(old: object, new: object, left_tensors: Collection[str]) -> list[str]:
    """What lies in the files beside the states: numbers and texts that differ, and what was not looked at.

    Args:
        old: One side.
        new: The other.
        left_tensors: The names of what holds tensors and is not the same in both.
    """
    sources = [thing for thing in (old, new) if isinstance(thing, Source)]
    notes: list[str] = []
    both: set[str] = set()
    if len(sources) == 2:
        before, after = (source.plain for source in sources)
        both = before.keys() & after.keys()
        notes = [
            f"beside what was compared, {key} {before[key]!r} -> {after[key]!r}"
            for key in before
            if key in both and repr(before[key]) != repr(after[key])
        ]
    for source in sources:
        same = {*both, *source.left_tensors}.difference(left_tensors)
        if left := [name for name in source.left if name not in same]:
            notes.append(f"of {source.path} only {source.taken or 'the state'} was compared, not {listed(left, 5)}")
    return list(dict.fromkeys(notes))


def _checked_tolerance(atol: float) -> float:
    if isinstance(atol, bool) or not isinstance(atol, int | float) or not 0 <= atol < math.inf:
        raise SummaryError(f"atol={atol!r} must be a number, 0 or more")
    return float(atol)


def _rounding(differences: Sequence[Values]) -> list[str]:
    """Say so where rounding to one dtype explains every difference in values."""
    worst = max((found.max_rel for found in differences), default=0.0)
    bits = {"float32": 24, "float16": 11, "bfloat16": 8}
    found = next((name for name, each in bits.items() if differences and worst <= 1.001 * 2.0**-each), None)
    return [f"all differences are within the rounding of {found}"] if found else []


class _Comparison:
    """Two sides being compared."""

    def __init__(self, old: Side, new: Side, atol: float, progress: Progress | None) -> None:
        self._old, self._new = old, new
        self._atol = atol
        self._progress = progress or (lambda done, total: None)
        self._matching = Matching(old.root, new.root)
        self._values: dict[tuple[Hashable, Hashable], Values | None] = {}
        self._done = self._tensors = self._absent = 0

    def result(self, notes: list[str], left: tuple[str, ...]) -> Diff:
        """All that differs, the notes, and what was not compared."""
        changed = self._compare()
        moved = changed and repair(self._matching, changed)
        if moved:
            self._compare()
        close = [key for key, found in self._values.items() if found is not None and found.max_abs <= self._atol > 0]
        if close:
            count = counted(len(close), "tensor differs", "tensors differ")
            notes = [*notes, f"{count} by at most atol={self._atol:g}, and count as equal"]
            self._values |= dict.fromkeys(close)
        notes = [*notes, *_rounding([found for found in self._values.values() if found is not None])]
        changes = tuple(Changes(self._old, self._new, self._matching, self._values))
        if self._absent:
            notes = [*notes, f"the values of {self._absent:,} tensors are not there (meta), and were not compared"]
        if opaque := [new.path for old, new in self._matching.new_of.items() if old.is_opaque and new.is_opaque]:
            notes = [*notes, f"of {listed(opaque, 5)} only the class is known, and it was not compared further"]
        return Diff(self._old.label, self._new.label, changes, tuple(notes), self._tensors, self._done, left)

    def _compare(self) -> list[Node]:
        """Compare the pairs of tensors of one shape that were not yet compared; returns the old nodes that differ."""
        pairs: dict[tuple[Hashable, Hashable], tuple[Leaf, Leaf, Node]] = {}
        for old, new in self._matching.new_of.items():
            if old.leaf is None or new.leaf is None or old.leaf.shape != new.leaf.shape:
                continue
            key = (old.leaf.identity, new.leaf.identity)
            if key not in self._values:
                pairs[key] = (old.leaf, new.leaf, old)
        self._values.update(dict.fromkeys(pairs))
        self._values.update(compare_values(self._read(pairs)))
        return [node for key, (_, _, node) in pairs.items() if self._values[key] is not None]

    def _read(self, pairs: Mapping[Key, tuple[Leaf, Leaf, Node]]) -> Iterator[tuple[Key, Tensor, Tensor]]:
        """The values of the pairs that can differ; each is given back before the next are read."""
        total = self._done + sum(old.nbytes for old, _, _ in pairs.values())
        for key, (old, new, _) in pairs.items():
            if same_bytes(old, new):
                self._tensors += 1
            else:
                before, after = old.read(), new.read()
                if before is not None and after is not None:
                    self._tensors += 1
                    yield key, before, after
                elif before is not after:
                    self._absent += 1
                del before, after
            self._done += old.nbytes
            self._progress(self._done, total)
