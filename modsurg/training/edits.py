"""Edits and the rest of a run: averaged weights that follow, and files from before or after an edit."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from modsurg.checkpoints.optimizer_state import carried, parameter_names
from modsurg.checkpoints.run_file import RunState
from modsurg.errors import RecipeError, TrainingError, TrustError, warn
from modsurg.training.device import place

if TYPE_CHECKING:
    from modsurg.surgery.report import Report
    from modsurg.training.trainer import Trainer


def averages(trainer: "Trainer") -> dict[str, Any]:
    """The averaged weights, before an edit."""
    return dict(trainer.average.module.state_dict()) if trainer.average else {}


def follow(trainer: "Trainer", report: "Report", averaged: Mapping[str, Any]) -> None:
    """Go on with the model as an edit left it; what is new is taken over by the average, the rest keeps its own."""
    trainer.reports.append(report)
    try:
        trainer.recipes.append(report.recipe.to_json())
    except RecipeError as error:
        trainer.recipes.append(None)
        text = f"a run resumed from here on has to make this edit itself before fit: {error}"
        warn(text)
    place(trainer.model, trainer.place, channels_last=trainer.channels_last)
    trainer.prepare()
    if trainer.average is not None:
        trainer.average.module = copy.deepcopy(trainer.model)
        kept = report.remap(averaged)
        with torch.no_grad():
            for name, value in trainer.average.module.state_dict().items():
                if name in kept and kept[name].shape == value.shape:
                    value.copy_(kept[name])


def warn_of_twins(trainer: "Trainer") -> None:
    """Say so if an edit between two fits is one that the resumed file had: the script did not ask before it."""
    between = trainer.running is None or trainer.running.epoch is None
    if between and trainer.recipes[-1] is not None and trainer.recipes[-1] in trainer.recipes[: trainer.resumed]:
        text = "the run that was resumed has this edit already, and now the model has it twice: if not trainer.reports:"
        warn(text)


def take_back(trainer: "Trainer", made: int) -> None:
    """Take back the edits after the first `made`; for a file that turns out not to fit."""
    while len(trainer.reports) > made:
        trainer.reports.pop().undo()
        trainer.recipes.pop()
        trainer.prepare()


def again(trainer: "Trainer", recipes: list[str | None], file: Path) -> None:
    """Make the edits that a file knows and the trainer has not made yet.

    Raises:
        TrustError: A new module is of a class that is not in `trainer.trust`.
        TrainingError: One of them could not be recorded.
    """
    from modsurg.surgery.recipes.recipe import Recipe
    from modsurg.surgery.recipes.replay import replay

    missing = recipes[len(trainer.reports) :]
    if None in missing:
        raise TrainingError("the run was edited in a way that can't be recorded: make that edit before fit(resume=).")
    for recipe in filter(None, missing):
        before, schedulers = averages(trainer), list(trainer.schedulers.values())
        options = {"trust": trainer.trust, "optimizer": trainer.optimizer, "scheduler": schedulers}
        try:
            report = replay(trainer.model, Recipe.from_json(recipe), **options)
        except TrustError as error:
            text = str(error).replace("replay(model, recipe, ", "Trainer(..., ")
            raise TrustError(f"{file} has an edit to make again: {text}") from None
        follow(trainer, report, before)


def carry(trainer: "Trainer", run: RunState) -> None:
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
