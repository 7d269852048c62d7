"""Edits and the rest of a run: averaged weights that follow, and files from before or after an edit."""

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from modsurg.checkpoints.runs import Run
from modsurg.checkpoints.stepping import carried, parameter_names
from modsurg.errors import TrainingError

if TYPE_CHECKING:
    from modsurg.surgery.reports import Report
    from modsurg.training.trainer import Trainer


def follow(average: AveragedModel, model: nn.Module, report: "Report", before: Mapping[str, Any]) -> None:
    """Edit averaged weights as the model was: what is new in the model is taken over, the rest keeps its average."""
    average.module = copy.deepcopy(model)
    kept = report.remap(before)
    with torch.no_grad():
        for name, value in average.module.state_dict().items():
            if name in kept and kept[name].shape == value.shape:
                value.copy_(kept[name])


def again(trainer: "Trainer", recipes: list[str | None]) -> None:
    """Make the edits that a file knows and the trainer has not made yet.

    Raises:
        TrainingError: One of them could not be recorded.
    """
    from modsurg.surgery.recipes import Recipe
    from modsurg.surgery.replaying import replay

    missing = recipes[len(trainer.reports) :]
    if None in missing:
        raise TrainingError("the run was edited in a way that can't be recorded: make that edit before fit(resume=).")
    for recipe in filter(None, missing):
        before = dict(trainer.average.module.state_dict()) if trainer.average else {}
        schedulers = list(trainer.schedulers.values())
        options = {"trust": trainer.trust, "optimizer": trainer.optimizer, "scheduler": schedulers}
        trainer.follow(replay(trainer.model, Recipe.from_json(recipe), **options), before)


def carry(trainer: "Trainer", run: Run) -> None:
    """Bring a file from before the trainer's latest edits under the present names; what is new keeps its own values."""
    own = run.states["trainer"]
    reports = trainer.reports[len(own["recipes"]) :]
    if not reports:
        return
    old = {name: name for name in run.states["model"]}
    for report in reports:
        old = report.remap(old)
    saved, frozen, held = run.states["model"], set(own["frozen"]), set(own["held"])
    names = dict(trainer.model.named_parameters())
    own["frozen"] = [name for name, p in names.items() if (old[name] in frozen if name in old else not p.requires_grad)]
    own["held"] = sorted({_parent(new) for new, name in old.items() if _parent(name) in held})
    run.states["model"] = _fitting(trainer.model.state_dict(), saved, old)
    run.states["optimizer"] = carried(
        run.states["optimizer"],
        trainer.optimizer,
        parameter_names({"model": trainer.model}),
        {f"model.{new}": f"model.{name}" for new, name in old.items()},
    )
    if trainer.average is not None:
        prefixed = {f"module.{new}": f"module.{name}" for new, name in old.items()} | {"n_averaged": "n_averaged"}
        run.states["average"] = _fitting(trainer.average.state_dict(), run.states["average"], prefixed)


def _fitting(now: Mapping[str, Any], saved: Mapping[str, Any], old: Mapping[str, str]) -> dict[str, Any]:
    values = {name: saved.get(old.get(name, ""), value) for name, value in now.items()}
    return {
        name: v if getattr(v, "shape", None) == getattr(now[name], "shape", None) else now[name]
        for name, v in values.items()
    }


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
