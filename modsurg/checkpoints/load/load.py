"""From a plan to a filled model, with a way back for everything that can fail."""

import copy
from collections.abc import Callable
from contextlib import ExitStack, suppress

from torch import nn

from modsurg.checkpoints.formats.memory import MemorySource
from modsurg.checkpoints.formats.source import Source
from modsurg.checkpoints.load.advice import check_missing_and_unexpected
from modsurg.checkpoints.load.copy import fill
from modsurg.checkpoints.load.custom import load_through_torch, snapshot
from modsurg.checkpoints.load.model_tensors import ModelTensors, fill_meta, find_targets
from modsurg.checkpoints.load.plan import Options, Plan, make_plan
from modsurg.checkpoints.load.report import LoadReport, Problems
from modsurg.checkpoints.verify import require_verified
from modsurg.errors import LoadError, warn


def load(model: nn.Module, source: Source, options: Options, verify: bool = False) -> LoadReport:
    """Fill a model from an opened source; see `modsurg.load_state`."""
    targets = find_targets(model)
    plan, problems = make_plan(source, targets, options)
    exact = not (problems or plan.missing or plan.leftover)
    custom = bool(targets.custom or (targets.migrating and not exact))
    if custom:
        problems.hold_back(plan.reshaped)
    elif options.strict:
        check_missing_and_unexpected(source, targets, plan, problems, options)
    if problems:
        raise problems.error()
    _refuse_leftover_meta(targets, options)
    if verify:
        require_verified(source, plan.keys(source))
    if isinstance(source, MemorySource):
        stays = {fill.key: fill.target.tensor for fill in plan.fills if fill.adapt is None}
        unasked = [key for key in plan.leftover.values() if key in source] if custom else []
        source.keep_apart([*plan.keys(source), *unasked], (target.tensor for target in targets.tensors.values()), stays)
    with ExitStack() as way_back:
        if custom:
            back_to_meta = fill_meta(targets.tensors.values())
            way_back.callback(back_to_meta, None)
            way_back.callback(snapshot(model))
            _load_custom(model, source, plan, targets, problems, options)
            back_to_meta(plan.missing)
        else:
            way_back.callback(fill_meta(plan.places(targets)), None)
            way_back.callback(_load_extra(source, plan))
            fill(source, plan.fills)
        way_back.pop_all()
    return _report(source, targets, plan, options)


def _report(source: Source, targets: ModelTensors, plan: Plan, options: Options) -> LoadReport:
    """What was done, and what would have done more."""
    hints = Problems()
    check_missing_and_unexpected(source, targets, plan, hints, options)
    report = plan.report(hints.advice)
    if not report.loaded and plan.missing:
        warn(f"no keys matched; nothing was loaded.\n{report}")
    return report


def _load_custom(
    model: nn.Module, source: Source, plan: Plan, targets: ModelTensors, problems: Problems, options: Options
) -> None:
    try:
        load_through_torch(model, source, plan)
    except Exception as error:
        if problems.held_back:
            raise problems.error() from error
        text = str(error).replace("\n\t", "\n  ")
        raise LoadError(f"loading code of the model's own refused; nothing was loaded.\n  {text}") from error
    if options.strict:
        check_missing_and_unexpected(source, targets, plan, problems, options)
        if problems:
            raise problems.error()


def _load_extra(source: Source, plan: Plan) -> Callable[[], None]:
    """Give the modules their extra state; returns what takes it back."""
    before = [(module, copy.deepcopy(module.get_extra_state())) for _, module, _ in plan.extra]

    def undo() -> None:
        for module, value in before:
            with suppress(Exception):  # what refuses its own state can't be helped, and has said so
                module.set_extra_state(value)

    for name, module, key in plan.extra:
        try:
            module.set_extra_state(source.read(key) if key in source else copy.deepcopy(source.notes.extra[key]))
        except Exception as error:
            undo()
            raise LoadError(f"{name}: {type(module).__name__} refused it ({error}); nothing was loaded") from error
    return undo


def _refuse_leftover_meta(targets: ModelTensors, options: Options) -> None:
    if targets.unfilled and options.strict and options.only is None:
        name = targets.unfilled[0]
        path, _, attribute = name.rpartition(".")
        owner = f'model.get_submodule("{path}")' if path else "model"
        raise LoadError(
            f"{name} is on the meta device and in no state_dict ({len(targets.unfilled)} such); nothing was loaded. "
            f"Give it its values: {owner}.{attribute} = ..., or build the model outside of torch.device('meta')"
        )
