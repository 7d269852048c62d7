"""Every error that modsurg raises.

ModsurgError (a ValueError)
├── WhereError               a `where` that can't be resolved
│   ├── NoMatchError         nothing there (also a LookupError); names the nearest paths
│   ├── CountError           another number of sites than count= asserts
│   └── PatternError         a glob or regular expression that does not parse
├── EditError                an edit that can't be right; nothing was changed
│   ├── NameTakenError       the parent has a child, parameter, buffer or attribute of that name
│   ├── ContainerError       a neighbour asked for where the parent calls its children by attribute
│   ├── WrapperError         DDP, FSDP, ScriptModule: unwrap first
│   ├── ExampleError         the edited model does not run on the example
│   ├── ResizeError          a layer that can't get that size
│   ├── OptimizerError       an optimizer or scheduler that can't follow
│   ├── RecipeError          a recipe that can't be recorded, read or replayed
│   └── UndoError            the model changed since the edit
├── TrustError               a class or function that the caller did not trust; nothing of it ran
├── CheckpointError          keeping a model
│   ├── SaveError            what can't be kept, by its path; no file was touched
│   ├── LoadError            a state that does not match; nothing was loaded
│   ├── MergeError           checkpoints that can't be merged; nothing was written
│   ├── FormatError          a file that is not what its name says: cut off, lying, foreign
│   ├── RemoteError          a URL that can't be read or written, or a file that changed meanwhile
│   └── IntegrityError       a stored hash that does not hold
├── SummaryError             a model or file that can't be looked at
└── TrainingError            the trainer
    ├── DeviceError          a device or precision that is not there
    ├── BatchError           a batch or a loader that can't be trained on
    └── NonFiniteError       a loss that is NaN or infinite

ModsurgWarning (a UserWarning)
"""

import sys
import warnings
from collections.abc import Sequence


def counted(number: int, one: str, many: str) -> str:
    """A number with the words that go with it, for a message.

    Example:
        >>> counted(1, "site matches", "sites match"), counted(2_000, "site matches", "sites match")
        ('1 site matches', '2,000 sites match')
    """
    return f"{number:,} {one if number == 1 else many}"


def listed(names: Sequence[str], most: int) -> str:
    """Names for a message, at most so many of them.

    Example:
        >>> listed(["a", "b", "c"], 2), listed(["a"], 2)
        ('a, b and 1 more', 'a')
    """
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def visible(text: str, keep: str = "") -> str:
    r"""Escape what can't be seen in a text: a name in a stranger's file must not control the terminal.

    Args:
        text: Any text.
        keep: Characters that stay as they are.

    Example:
        >>> visible("卷积层"), visible("a\nb \x1b[2J")
        ('卷积层', 'a\\nb \\x1b[2J')
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() or each in keep else ascii(each)[1:-1] for each in text)


class ModsurgError(ValueError):
    """Base of every error that modsurg raises for its user."""

    def __str__(self) -> str:
        return visible(super().__str__(), keep="\n")


class WhereError(ModsurgError):
    """A `where` that can't be resolved."""


class NoMatchError(WhereError, LookupError):
    """Nothing matches; the message names the nearest paths."""


class CountError(WhereError):
    """Another number of sites matches than `count=` asserts."""


class PatternError(WhereError):
    """A glob or a regular expression that does not parse."""


class EditError(ModsurgError):
    """An edit that can't be right. Nothing was changed."""


class NameTakenError(EditError):
    """The parent already has a child, parameter, buffer, attribute or property of that name."""


class ContainerError(EditError):
    """A neighbour was asked for where the parent calls its children by attribute."""


class WrapperError(EditError):
    """The model is held by DDP, FSDP or TorchScript, and can't be edited inside it."""


class ExampleError(EditError):
    """The edited model does not run on the example."""


class ResizeError(EditError):
    """A layer that can't get the size asked for."""


class OptimizerError(EditError):
    """An optimizer or scheduler that can't follow the edit."""


class RecipeError(EditError):
    """A recipe that can't be recorded, read or replayed."""


class UndoError(EditError):
    """The model changed since the edit, so that undoing it would lose the later change."""


class TrustError(ModsurgError):
    """A class or function that the caller did not trust. Nothing of it ran."""


class CheckpointError(ModsurgError):
    """Base of the errors about files."""


class SaveError(CheckpointError):
    """Something that can't be kept, named by its path. No file was touched."""


class LoadError(CheckpointError):
    """A state that does not fit the model. Nothing was loaded."""


class MergeError(CheckpointError):
    """Checkpoints or an adapter that can't be merged. Nothing was written."""


class FormatError(CheckpointError):
    """A file that is not what its name says: cut off, lying or foreign."""


class RemoteError(CheckpointError):
    """A URL that can't be read or written, or a file that changed while it was being read."""


class IntegrityError(CheckpointError):
    """A stored hash that does not hold."""


class SummaryError(ModsurgError):
    """A model or a file that can't be looked at."""


class TrainingError(ModsurgError):
    """Base of the trainer's errors."""


class DeviceError(TrainingError):
    """A device or a precision that this machine does not have."""


class BatchError(TrainingError):
    """A batch or a loader that can't be trained on."""


class NonFiniteError(TrainingError):
    """The loss became NaN or infinite."""


class ModsurgWarning(UserWarning):
    """Something that went on, and that the user should know."""


def warn(text: str) -> None:
    """Give a ModsurgWarning at the user's line: the last one that is neither modsurg's nor a context manager's."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and _is_ours(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, ModsurgWarning, stacklevel=level)


def _is_ours(module: str) -> bool:
    return module == "contextlib" or module.partition(".")[0] == "modsurg"
