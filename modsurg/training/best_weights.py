"""What is best, and the weights that were."""

import copy
import os
from collections.abc import Mapping
from typing import Any

import torch

from modsurg.checkpoints.formats.remote import path_exists, path_in
from modsurg.checkpoints.run_file import read_run
from modsurg.errors import TrainingError, warn
from modsurg.training.metrics import Metric, metric_columns
from modsurg.training.state import TrainingState

BEST = "best.safetensors"


def choose_target(best: str | None, metrics: Mapping[str, Metric], *, validated: bool) -> tuple[str, bool]:
    """Give the name of the value that says what is best, and whether lower is better.

    Raises:
        TrainingError: It is not measured.

    Example:
        >>> choose_target("max:loss", {}, validated=False)
        ('loss', False)
    """
    how, _, name = (best or ("val_loss" if validated else "loss")).rpartition(":")
    columns, may_be_more = metric_columns(metrics)
    names = ["loss", *columns]
    names += [f"val_{name}" for name in names] if validated else []
    if (name not in names and not may_be_more) or how not in ("", "min", "max"):
        raise TrainingError(f"best={best!r} is not measured; there are {', '.join(names)}.")
    return name, how == "min" if how else name.endswith(("loss", "error", "mse", "mae", "perplexity"))


class BestWeights:
    """A copy of the weights of the best epoch so far, averaged ones included."""

    def __init__(self, edits: int, states: Mapping[str, Mapping[str, Any]]) -> None:
        self.edits = edits
        self.states = states

    @classmethod
    def copy(cls, state: TrainingState) -> "BestWeights":
        """Copy the weights as they are now."""
        states = {name: module.state_dict() for name, module in state.weights.items()}
        return cls(len(state.reports), {name: _copy_values(values) for name, values in states.items()})

    @classmethod
    def read(cls, state: TrainingState, directory: str | os.PathLike[str] | None) -> "BestWeights | None":
        """Read them from `best`, if that is the best epoch of this run."""
        if directory is None or not path_exists(file := path_in(directory, BEST)):
            return None
        run = read_run(file)
        own = run.states["trainer"]
        if own["position"]["record"] != state.progress.record or not set(state.weights) <= set(run.states):
            return None
        return cls(len(own["recipes"]), {name: run.states[name] for name in state.weights})

    @staticmethod
    def restore(best: "BestWeights | None", state: TrainingState) -> str:
        """Give the model the weights of the best epoch; returns a line that says so."""
        if best is None or best.edits != len(state.reports):
            cause = "the model was edited since" if best else f"no {BEST} holds it"
            warn(f"restore_best: the weights of the best epoch can't be restored: {cause}. They stay as they are.")
            return ""
        for name, module in state.weights.items():
            module.load_state_dict(best.states[name])
        target, record = state.progress.target, state.progress.record
        epochs = [row["epoch"] for row in state.progress.rows if row.get(target) in (record, -record)]
        return f"the weights are those of epoch {epochs[0]:.0f}, the best by {target}" if epochs else ""


def _copy_values(state: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value.clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)
        for name, value in state.items()
    }
