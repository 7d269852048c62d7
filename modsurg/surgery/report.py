"""What an edit did: readable, undoable, and able to carry an old checkpoint over."""

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from torch import nn

from modsurg.errors import UndoError, counted, listed
from modsurg.surgery.changes import Change, Frozen
from modsurg.surgery.key_mapping import Remapping
from modsurg.surgery.recipes.recipe import Recipe
from modsurg.surgery.resize.values import Resized
from modsurg.surgery.undo import Undo

Value = TypeVar("Value")
Committed = tuple[Undo, Remapping, Callable[[], Recipe]]
_SHOWN = 40
_WIDE = 120


class Report:
    """The result of a verb or of a transaction.

    Attributes:
        changes: One for each site, in the order in which they were made: kind, paths, old, new.
        warnings: What may not be as it was meant. Each was also issued as a `ModsurgWarning`.
        notes: What else happened: renumbered containers, parameters that changed their group in an optimizer.

    Example:
        >>> import modsurg
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> report = modsurg.replace(model, nn.ReLU, nn.GELU)
        >>> print(report)
        ~ 1  ReLU -> GELU(approximate='none')
        >>> report.undo()
        >>> model[1]
        ReLU()
    """

    def __init__(
        self,
        changes: tuple[Change, ...],
        warnings: Sequence[str],
        notes: Sequence[str],
        committed: Committed | None = None,
    ) -> None:
        self.changes = changes
        self.warnings = tuple(warnings)
        self.notes = tuple(notes)
        self._undo: Undo | None
        self._remapping: Remapping | None
        self._recipe: Callable[[], Recipe] | None
        self._undo, self._remapping, self._recipe = committed or (None, None, None)

    def __repr__(self) -> str:
        warned = f", {counted(len(self.warnings), 'warning', 'warnings')}" if self.warnings else ""
        return f"<Report of {counted(len(self.changes), 'change', 'changes')}{warned}: print it to read them>"

    def undo(self) -> None:
        """Bring back the model, its optimizers and schedulers as they were before, bit for bit.

        Only what the edit changed is taken back: weights that were trained since stay trained, edits of other parts
        stay. What comes back goes where the model has been moved since (`model.cuda()`, `model.half()`), in the mode
        that it has now.

        Raises:
            UndoError: It was undone already, or a part that this edit touched was changed since. The message names
                the part; nothing was changed.
        """
        if self._undo is None:
            raise UndoError("nothing to undo: this edit was undone already, or is only a plan.")
        self._undo.run()
        self._undo = None

    def remap(self, state_dict: Mapping[str, Value], *, inverse: bool = False) -> dict[str, Value]:
        """Put the keys of a checkpoint from before the edit under their new names.

        Args:
            state_dict: A model's state_dict, or an optimizer's (the positions of its parameters are carried over).
            inverse: From the new names back to the old ones.

        Returns:
            The same values, in the same order. Keys of modules that are gone are left out.

        Example:
            >>> import modsurg
            >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
            >>> old = model.state_dict()
            >>> list(modsurg.insert_after(model, "0", nn.ReLU).remap(old))
            ['0.weight', '0.bias', '2.weight', '2.bias']
        """
        if self._remapping is None:
            raise UndoError("a plan can't remap; use the report, after the edit.")
        return self._remapping.apply(state_dict, inverse=inverse)

    @property
    def recipe(self) -> Recipe:
        """The edit as plain data, to be replayed on another copy of the model."""
        if self._recipe is None:
            raise UndoError("a plan has no recipe; use the report, after the edit.")
        return self._recipe()

    def __str__(self) -> str:
        told = [each for each in self.changes if not (isinstance(each.detail, Resized) and each.detail.follows)]
        lines = _fold_lines(told)
        if len(lines) > _SHOWN:
            lines[_SHOWN:] = [f"... {len(lines) - _SHOWN} more lines"]
        lines += [f"! {warning}" for warning in self.warnings]
        lines += [f"  {note}" for note in self.notes]
        return "\n".join(lines) or "nothing changed"


def fold_texts(texts: Iterable[str]) -> list[str]:
    """Give each warning or note once; those that differ only in the path at the beginning as one.

    Example:
        >>> fold_texts(['"a": lost', '"b": lost', "renumbered", "renumbered"])
        ['"a", "b": lost', 'renumbered']
    """
    groups: dict[str, list[str]] = {}
    for text in texts:
        path = re.match(r'("[^"]*")?', text)
        start = path.group() if path else ""
        groups.setdefault(text[len(start) :], []).append(start)
    return [listed(list(dict.fromkeys(paths)), 3) + rest for rest, paths in groups.items()]


def _fold_lines(changes: Sequence[Change]) -> list[str]:
    """A line for each change; three or more that differ only in the numbers of their paths are one line."""
    groups: dict[tuple[str, str, str], list[tuple[str, str]]] = {}
    for change in changes:
        sign, at, text = line(change)
        groups.setdefault((sign, re.sub(r"\d+", "*", at), text), []).append((sign, at))
    lines = []
    for (sign, at, text), found in groups.items():
        if len(found) > 2:
            lines.append(f"{sign} {at}  {text}  in {len(found):,} places")
        else:
            lines += [f"{sign} {path}  {text}" for sign, path in found]
    return lines


def line(change: Change) -> tuple[str, str, str]:
    """One change in the signs of a diff, + added, - gone, ~ changed: sign, paths, text."""
    at = " = ".join(change.paths[:3]) + (f" = ... {len(change.paths) - 3} more" if len(change.paths) > 3 else "")
    old, new = type(change.old).__name__, type(change.new).__name__
    if change.kind == "rename":
        return "~", f"{at} -> {change.detail}", shown(change.new)
    if change.kind == "wrap":
        return "~", at, f"{old} -> {new}({old})"
    if change.kind in ("resize", "freeze", "unfreeze"):
        alone = isinstance(change.detail, Frozen) and change.detail.alone
        return "~", at, str(change.detail) if alone else f"{new}  {change.detail}"
    if change.old is None:
        return "+", at, shown(change.new)
    if change.new is None:
        return "-", at, shown(change.old)
    text = f"{shown(change.old)} -> {shown(change.new)}"
    return "~", at, text if len(at) + len(text) + 4 <= _WIDE else f"{_brief(change.old)} -> {_brief(change.new)}"


def shown(module: nn.Module | None) -> str:
    """A module on one line: its class, with its arguments if it has any."""
    arguments = module.extra_repr() if module is not None else ""
    name = type(module).__name__
    return f"{name}({arguments})" if arguments and "\n" not in arguments else name


def _brief(module: nn.Module) -> str:
    """As `shown`, without the arguments that have their defaults."""
    parameters = inspect.signature(type(module).__init__).parameters.values()
    defaults = {f"{each.name}={each.default}" for each in parameters}
    name, _, arguments = shown(module).removesuffix(")").partition("(")
    kept = [argument for argument in re.split(r", (?=\w+=)", arguments) if argument and argument not in defaults]
    return f"{name}({', '.join(kept)})" if kept else name
