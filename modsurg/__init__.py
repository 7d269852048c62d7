"""Change, keep and look at PyTorch models.

The public names are resolved when they are first used, so that `import modsurg` costs next to nothing and the command
line can read a file without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from modsurg.checkpoints.conversion import convert
    from modsurg.checkpoints.models import load_model, save_model
    from modsurg.checkpoints.runs import load_checkpoint, save_checkpoint
    from modsurg.checkpoints.states import load_state, read_state, save_state
    from modsurg.checkpoints.verification import verify
    from modsurg.surgery.optimizers import sync
    from modsurg.surgery.parameters import freeze, resize, unfreeze
    from modsurg.surgery.recipes import Recipe
    from modsurg.surgery.replaying import replay
    from modsurg.surgery.reports import Report
    from modsurg.surgery.verbs import (
        add,
        edit,
        insert_after,
        insert_before,
        remove,
        rename,
        replace,
        wrap,
    )
    from modsurg.training.history import History
    from modsurg.training.trainer import Trainer
    from modsurg.tree.selection import Selection, select
    from modsurg.views.comparison import diff
    from modsurg.views.summary import Summary, summary

_HOMES = {
    "convert": "checkpoints.conversion",
    "load_model": "checkpoints.models",
    "save_model": "checkpoints.models",
    "load_checkpoint": "checkpoints.runs",
    "save_checkpoint": "checkpoints.runs",
    "load_state": "checkpoints.states",
    "read_state": "checkpoints.states",
    "save_state": "checkpoints.states",
    "verify": "checkpoints.verification",
    "sync": "surgery.optimizers",
    "Recipe": "surgery.recipes",
    "replay": "surgery.replaying",
    "Report": "surgery.reports",
    "add": "surgery.verbs",
    "edit": "surgery.verbs",
    "freeze": "surgery.parameters",
    "insert_after": "surgery.verbs",
    "insert_before": "surgery.verbs",
    "remove": "surgery.verbs",
    "rename": "surgery.verbs",
    "replace": "surgery.verbs",
    "resize": "surgery.parameters",
    "unfreeze": "surgery.parameters",
    "wrap": "surgery.verbs",
    "History": "training.history",
    "Trainer": "training.trainer",
    "Selection": "tree.selection",
    "select": "tree.selection",
    "diff": "views.comparison",
    "Summary": "views.summary",
    "summary": "views.summary",
}

__all__ = [
    "History",
    "Recipe",
    "Report",
    "Selection",
    "Summary",
    "Trainer",
    "add",
    "convert",
    "diff",
    "edit",
    "freeze",
    "insert_after",
    "insert_before",
    "load_checkpoint",
    "load_model",
    "load_state",
    "read_state",
    "remove",
    "rename",
    "replace",
    "replay",
    "resize",
    "save_checkpoint",
    "save_model",
    "save_state",
    "select",
    "summary",
    "sync",
    "unfreeze",
    "verify",
    "wrap",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'modsurg' has no attribute {name!r}")
    value = getattr(import_module(f"modsurg.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "errors"])
