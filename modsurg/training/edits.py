"""Edits and the rest of a run: averaged weights that follow, and files from before or after an edit."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from modsurg.checkpoints.optimizer_state import carried, parameter_names
from modsurg.checkpoints.run_file import RunState
from modsurg.errors import RecipeError, TrainingError, TrustError, warn
from modsurg.surgery.recipes.recipe import Recipe
from modsurg.surgery.recipes.replay import replay
from modsurg.surgery.report import Report
from modsurg.training.device import place
from modsurg.training.state import Runtime, TrainingState


def averaged_state(state: TrainingState) -> dict[str, Any]:
    """Give the averaged weights, before an edit."""
    return dict(state.average.module.state_dict()) if state.average else {}


def follow_edit(state: TrainingState, runtime: Runtime, report: Report, averaged: Mapping[str, Any]) -> None:
    """Go on with the model as an edit left it; the average takes over what is new and keeps the rest."""
    state.reports.append(report)
    try:
        state.progress.recipes.append(report.recipe.to_json())
    except RecipeError as error:
        state.progress.recipes.append(None)
        warn(f"a run resumed from here on has to make this edit itself before fit: {error}")
    place(state.model, runtime.device, channels_last=runtime.channels_last)
    runtime.prepare(state.model)
    if state.average is not None:
        state.average.module = copy.deepcopy(state.model)
        kept = report.remap(averaged)
        with torch.no_grad():
            for name, value in state.average.module.state_dict().items():
                if name in kept and kept[name].shape == value.shape:
                    value.copy_(kept[name])


def undo_edits(state: TrainingState, runtime: Runtime, made: int) -> None:
    """Undo the edits after the first `made`, for a file that does not fit after all."""
    while len(state.reports) > made:
        state.reports.pop().undo()
        state.progress.recipes.pop()
        runtime.prepare(state.model)


def repeat_edits(state: TrainingState, runtime: Runtime, recipes: list[str | None], file: Path, trust: Any) -> None:
    """Make the edits that a file records and that were not made yet.

    Raises:
        TrustError: A new module is of a class that is not in `trust`.
        TrainingError: One of them could not be recorded.
    """
    missing = recipes[len(state.reports) :]
    if None in missing:
        raise TrainingError("the run was edited in a way that can't be recorded: make that edit before fit(resume=).")
    for recipe in filter(None, missing):
        averaged, schedulers = averaged_state(state), list(state.schedulers.values())
        options = {"trust": trust, "optimizer": state.optimizer, "scheduler": schedulers}
        try:
            report = replay(state.model, Recipe.from_json(recipe), **options)
        except TrustError as error:
            text = str(error).replace("replay(model, recipe, ", "Trainer(..., ")
            raise TrustError(f"{file} has an edit to make again: {text}") from None
        follow_edit(state, runtime, report, averaged)


def carry_weights(state: TrainingState, run: RunState) -> None:
    """Bring a file from before the latest edits under the present names; what is new keeps its own values."""
    own = run.states["trainer"]
    reports = state.reports[len(own["recipes"]) :]
    if not reports:
        return
    old = {name: name for name in run.states["model"]}
    for report in reports:
        old = report.remap(old)
    saved, frozen, held = run.states["model"], set(own["frozen"]), set(own["held"])
    names = dict(state.model.named_parameters())
    own["frozen"] = [name for name, p in names.items() if (old[name] in frozen if name in old else not p.requires_grad)]
    own["held"] = sorted({_parent(new) for new, name in old.items() if _parent(name) in held})
    run.states["model"] = _select_fitting(state.model.state_dict(), saved, old)
    run.states["optimizer"] = carried(
        run.states["optimizer"],
        state.optimizer,
        parameter_names({"model": state.model}),
        {f"model.{new}": f"model.{name}" for new, name in old.items()},
    )
    if state.average is not None:
        prefixed = {f"module.{new}": f"module.{name}" for new, name in old.items()} | {"n_averaged": "n_averaged"}
        run.states["average"] = _select_fitting(state.average.state_dict(), run.states["average"], prefixed)


def _select_fitting(now: Mapping[str, Any], saved: Mapping[str, Any], old: Mapping[str, str]) -> dict[str, Any]:
    values = {name: saved.get(old.get(name, ""), value) for name, value in now.items()}
    return {
        name: v if getattr(v, "shape", None) == getattr(now[name], "shape", None) else now[name]
        for name, v in values.items()
    }


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
