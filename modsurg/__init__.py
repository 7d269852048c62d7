"""Change, keep and look at PyTorch models.

The public names are resolved when they are first used, so that `import modsurg` costs next to nothing and the command
line can read a file without torch.
"""

import sys
from importlib import import_module
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    __version__: str
    from modsurg.checkpoints.convert import convert
    from modsurg.checkpoints.merge import merge
    from modsurg.checkpoints.model import load_model, save_model
    from modsurg.checkpoints.run_file import load_checkpoint, save_checkpoint
    from modsurg.checkpoints.state import load_state, read_state, save_state
    from modsurg.checkpoints.verify import verify
    from modsurg.surgery.api import (
        add,
        edit,
        insert_after,
        insert_before,
        remove,
        rename,
        replace,
        wrap,
    )
    from modsurg.surgery.convert_norm import convert_norm
    from modsurg.surgery.features import FeatureExtractor, capture, features
    from modsurg.surgery.fuse import fuse
    from modsurg.surgery.optimizers.sync import sync
    from modsurg.surgery.param_groups import param_groups
    from modsurg.surgery.parameters import coupled, freeze, resize, unfreeze
    from modsurg.surgery.recipes.recipe import Recipe
    from modsurg.surgery.recipes.replay import replay
    from modsurg.surgery.report import Report
    from modsurg.training.history import History
    from modsurg.training.trainer import Trainer
    from modsurg.tree.selection import Selection, select, select_parameters
    from modsurg.views.diff.api import diff
    from modsurg.views.summary.api import Summary, summary

_HOMES = {
    "convert": "checkpoints.convert",
    "merge": "checkpoints.merge",
    "load_model": "checkpoints.model",
    "save_model": "checkpoints.model",
    "load_checkpoint": "checkpoints.run_file",
    "save_checkpoint": "checkpoints.run_file",
    "load_state": "checkpoints.state",
    "read_state": "checkpoints.state",
    "save_state": "checkpoints.state",
    "verify": "checkpoints.verify",
    "sync": "surgery.optimizers.sync",
    "Recipe": "surgery.recipes.recipe",
    "replay": "surgery.recipes.replay",
    "Report": "surgery.report",
    "add": "surgery.api",
    "edit": "surgery.api",
    "convert_norm": "surgery.convert_norm",
    "freeze": "surgery.parameters",
    "fuse": "surgery.fuse",
    "insert_after": "surgery.api",
    "insert_before": "surgery.api",
    "remove": "surgery.api",
    "rename": "surgery.api",
    "replace": "surgery.api",
    "coupled": "surgery.parameters",
    "resize": "surgery.parameters",
    "unfreeze": "surgery.parameters",
    "wrap": "surgery.api",
    "FeatureExtractor": "surgery.features",
    "capture": "surgery.features",
    "features": "surgery.features",
    "param_groups": "surgery.param_groups",
    "History": "training.history",
    "Trainer": "training.trainer",
    "Selection": "tree.selection",
    "select": "tree.selection",
    "select_parameters": "tree.selection",
    "diff": "views.diff.api",
    "Summary": "views.summary.api",
    "summary": "views.summary.api",
}

__all__ = [
    "FeatureExtractor",
    "History",
    "Recipe",
    "Report",
    "Selection",
    "Summary",
    "Trainer",
    "add",
    "capture",
    "convert",
    "convert_norm",
    "coupled",
    "diff",
    "edit",
    "features",
    "freeze",
    "fuse",
    "insert_after",
    "insert_before",
    "load_checkpoint",
    "load_model",
    "load_state",
    "merge",
    "param_groups",
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
    "select_parameters",
    "summary",
    "sync",
    "unfreeze",
    "verify",
    "wrap",
]


def __getattr__(name: str) -> object:
    if name == "__version__":
        return import_module("importlib.metadata").version("modsurg")
    if name not in _HOMES:
        raise _unknown(name, sys._getframe(1))
    value = getattr(import_module(f"modsurg.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def _unknown(name: str, caller: FrameType) -> Exception:
    """The error for an unknown name, with the nearest one.

    `from modsurg import NAME` drops the text of an AttributeError, so it gets an ImportError.
    """
    near = import_module("difflib").get_close_matches(name, __all__, 1)
    hint = f". Did you mean {near[0]!r}?" if near else ""
    code = caller.f_code.co_code
    if import_module("opcode").opname[code[caller.f_lasti]] == "IMPORT_FROM":
        return ImportError(f"cannot import name {name!r} from 'modsurg'{hint}", name=name)
    return AttributeError(f"module 'modsurg' has no attribute {name!r}{hint}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__", "errors", "rules"])
