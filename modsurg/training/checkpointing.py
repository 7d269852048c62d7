"""A run's files: the trainer's own position, `last` and `best`, and going on from one."""

import contextlib
import copy
import os
import shutil
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from modsurg.checkpoints.rng import random_states, set_random_states
from modsurg.checkpoints.run_file import read_run, restore, save_checkpoint
from modsurg.errors import LoadError, ModsurgError, TrainingError, counted, warn
from modsurg.training import distributed as processes
from modsurg.training import edits, sharding
from modsurg.tree.eval_lock import held, hold, release

if TYPE_CHECKING:
    from modsurg.training.trainer import Trainer

LAST, BEST = "last.safetensors", "best.safetensors"


@dataclass
class Position:
    """Where a trainer is.

    Attributes:
        epoch: Finished epochs.
        batch: Batches seen of the epoch under way.
        step: The optimizer's steps.
        start: The epoch in which this `fit` began.
        target: What is best is said by this value.
        record: Its best so far, lower is better.
        mark: Its best so far by more than `min_delta`, from which patience counts.
        stale: Epochs since then.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    start: int = 0
    target: str = ""
    record: float = float("inf")
    mark: float = float("inf")
    stale: int = 0

    def restart(self) -> None:
        """A new `fit` begins where the last one ended."""
        self.start, self.batch, self.stale = self.epoch, 0, 0

    def aim(self, target: str) -> None:
        """What is best is said by `target` from now on; a record of another value is none."""
        if target != self.target:
            self.target, self.record, self.mark, self.stale = target, float("inf"), float("inf"), 0

    def advance(self, value: float, min_delta: float) -> bool:
        """One more epoch with this value; says whether it is the best."""
        self.epoch, self.batch = self.epoch + 1, 0
        improved = value < self.record
        self.stale += 1
        if value < self.mark - min_delta:
            self.mark, self.stale = value, 0
        if improved:
            self.record = value
        return improved


class BestWeights:
    """A copy of the weights of the best epoch so far, averaged ones included."""

    def __init__(self, trainer: "Trainer") -> None:
        self.edits = len(trainer.reports)
        self.states = {name: _copied(module.state_dict()) for name, module in _weights(trainer).items()}

    @classmethod
    def read(cls, trainer: "Trainer") -> "BestWeights | None":
        """Read them from `best`, if that is the best epoch of this run."""
        file = Path(trainer.checkpoint_dir or "", BEST)
        if trainer.checkpoint_dir is None or trainer.sharded or not file.exists():
            return None
        run = read_run(file)
        own, weights = run.states["trainer"], _weights(trainer)
        if own["position"]["record"] != trainer.position.record or not set(weights) <= set(run.states):
            return None
        best = cls.__new__(cls)
        best.edits, best.states = len(own["recipes"]), {name: run.states[name] for name in weights}
        return best


def restore_best(trainer: "Trainer", best: BestWeights | None, target: str) -> None:
    """Give the model the weights of the best epoch."""
    best = best or BestWeights.read(trainer)
    if best is None or best.edits != len(trainer.reports):
        cause = "the model was edited since" if best else f"no {BEST} holds it"
        warn(f"restore_best: the weights of the best epoch can't be restored: {cause}. They stay as they are.")
        return
    for name, module in _weights(trainer).items():
        module.load_state_dict(best.states[name])
    values = [abs(row[target]) for row in trainer.history.rows if target in row]
    epoch = trainer.history.rows[values.index(abs(trainer.position.record))]["epoch"]
    trainer.screen.line(f"the weights are those of epoch {epoch}, the best by {target}")


def _weights(trainer: "Trainer") -> dict[str, nn.Module]:
    return {"model": trainer.model} if trainer.average is None else {"model": trainer.model, "average": trainer.average}


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value.clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)
        for name, value in state.items()
    }


def group_options(optimizer: Any) -> list[dict[str, Any]]:
    """What an optimizer's groups were made with, in numbers."""
    return [
        {
            name: group.get(f"initial_{name}", value)
            for name, value in group.items()
            if isinstance(value, bool | int | float)
        }
        for group in optimizer.param_groups
    ]


def _run_options(trainer: "Trainer", batches: int | None) -> dict[str, Any]:
    """What a run that goes on should be told of, if it is another."""
    clip = None if trainer.clip_norm is None else float(trainer.clip_norm)
    options = {"accumulate": trainer.accumulate, "clip_norm": clip, "precision": trainer.precision}
    return options | {"batches in an epoch": batches, "processes": trainer.world, "optimizer": trainer.given_groups}


def _warn_of_options(then: Mapping[str, Any], now: Mapping[str, Any], file: Path) -> None:
    """Say in one line what is not as it was when the file was written."""
    other = {name: (then[name], now[name]) for name in then if name in now and then[name] != now[name]}
    if "processes" in other or None in other.get("batches in an epoch", ()):
        other.pop("batches in an epoch", None)  # each process has its part of them
    groups = other.pop("optimizer", ([], []))
    told = [f"{name} {before}, here {after}" for name, (before, after) in other.items() if name != "processes"]
    for before, after in zip(*groups, strict=False):
        changed = [
            f"{name} {before[name]}, here {after[name]}"
            for name in before
            if after.get(name, before[name]) != before[name]
        ]
        told += [f"{text} (the file's is used)" for text in changed]
    if told:
        warn(f"{file} was written with {'; '.join(dict.fromkeys(told))}.")


def save(
    trainer: "Trainer", path: str | os.PathLike[str], left: dict[str, Any] | None = None, batches: int | None = None
) -> None:
    """Write everything that `resume` needs; `left` is what is left of an epoch that is not finished."""
    states = [generator.get_state() for generator in trainer.generators]
    ranks = processes.gathered({"random": random_states(), "generators": states, "left": left})
    own = {
        "position": vars(trainer.position),
        "history": trainer.history.rows,
        "options": _run_options(trainer, batches),
        "recipes": trainer.recipes,
        "frozen": [name for name, p in trainer.model.named_parameters() if not p.requires_grad],
        "held": [path for path, module in trainer.model.named_modules() if held(module)],
        "ranks": ranks,
    }
    if trainer.sharded:
        sharding.save(path, trainer.model, trainer.optimizer)
        path = Path(path) / sharding.OWN
    if processes.rank() == 0:
        save_checkpoint(path, step=trainer.step, trainer=own, **stateful(trainer))


def rotate(trainer: "Trainer", left: dict[str, Any] | None, improved: bool, batches: int | None) -> None:
    """Write `best` if it is, let `last` be the same file, else write that; keep the latest ones under their steps."""
    assert trainer.checkpoint_dir is not None
    directory = Path(trainer.checkpoint_dir)
    if trainer.sharded:
        name = processes.gathered(sharding.free_name(directory, trainer.step))[0]
        save(trainer, directory / name, left, batches)
        processes.gathered(None)
        if processes.rank() == 0:
            sharding.point(directory, name, ["last", "best"] if improved else ["last"], trainer.keep)
        return
    last, best = directory / LAST, directory / BEST
    save(trainer, best if improved else last, left, batches)
    if processes.rank():
        return
    if improved:
        _link(best, last)  # after it, so that no kill leaves a `best` that is older than `last` says
    if trainer.keep:
        _link(last, directory / f"step-{trainer.step:08d}.safetensors")
        numbered = directory.glob("step-????????.safetensors")
        for old in sorted(numbered, key=lambda file: (file.stat().st_mtime_ns, file.name))[: -trainer.keep]:
            old.unlink()


def way_on(trainer: "Trainer") -> str:
    """How a run that was stopped goes on, for the line that says so."""
    if trainer.checkpoint_dir is None:
        return "; it is in no file, as there is no checkpoint_dir"
    file = Path(trainer.checkpoint_dir, "last" if trainer.sharded else LAST)
    return f"; {file} goes on with fit(..., resume=True)"


def find(trainer: "Trainer", resume: bool | str | os.PathLike[str]) -> Path | None:
    """The file to go on from; None to begin anew. Makes the directory for the files to come.

    Raises:
        TrainingError: `resume=True` without a directory, a file that is not there, a directory that can't be made.
    """
    if trainer.checkpoint_dir is not None:
        try:
            Path(trainer.checkpoint_dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(f"checkpoint_dir can't be made: {error}.") from error
        if not os.access(trainer.checkpoint_dir, os.W_OK):
            raise TrainingError(
                f"checkpoint_dir={os.fspath(trainer.checkpoint_dir)!r} can't be written to: name another."
            )
    if resume is False:
        return None
    if resume is True:
        if trainer.checkpoint_dir is None:
            raise TrainingError('resume=True needs Trainer(..., checkpoint_dir=...), or name the file: resume="...".')
        files = [Path(trainer.checkpoint_dir) / name for name in (LAST, "last")]
        return next((file for file in files if file.exists()), None)
    file = Path(resume)
    if not file.exists():
        text = f"resume={str(file)!r}: there is no such file. resume=True begins anew where there is none."
        raise TrainingError(text)
    if file.is_dir() and not (file / sharding.OWN).exists():
        raise TrainingError(f"resume={str(file)!r} is no run: name a file in it, resume={str(file / LAST)!r}.")
    return file


def resume(trainer: "Trainer", file: Path, batches: int | None) -> dict[str, Any] | None:
    """Go on from a file: make its edits, set every state; gives what is left of an unfinished epoch.

    Raises:
        LoadError: The file does not fit.
        TrainingError: An edit that was not recorded, or of which the file knows nothing.
    """
    run = read_run(file / sharding.OWN if file.is_dir() else file)
    if "trainer" not in run.states:
        raise TrainingError(f"{file} was not written by a Trainer: load_checkpoint({str(file)!r}, model=...) reads it.")
    own = run.states["trainer"]
    _check_generators(trainer, own["ranks"], file)
    made = len(trainer.reports)
    try:
        edits.again(trainer, own["recipes"], file)
        if file.is_dir():
            sharding.load(file, trainer.model, trainer.optimizer, alone=trainer.world == 1)
            restore(run, {name: value for name, value in stateful(trainer).items() if name in run.states})
        else:
            _check_parts(trainer, run.states, file)
            edits.carry(trainer, run)
            restore(run, stateful(trainer))
    except ModsurgError:
        edits.take_back(trainer, made)
        raise
    _warn_of_options(own.get("options", {}), _run_options(trainer, batches), file)
    trainer.resumed = len(own["recipes"])
    trainer.position.__dict__.update({"mark": own["position"]["record"]} | own["position"])
    trainer.history.rows[:] = own["history"]
    frozen, holding = set(own["frozen"]), set(own["held"])
    for name, parameter in trainer.model.named_parameters():
        parameter.requires_grad = name not in frozen
    for path, module in trainer.model.named_modules():
        (hold if path in holding else release)(module)
    trainer.prepare()
    return _taken_up(trainer, own["ranks"], file)


def _taken_up(trainer: "Trainer", ranks: list[dict[str, Any]], file: Path) -> dict[str, Any] | None:
    """Set the random states of this process; gives what is left of an unfinished epoch."""
    if len(ranks) != trainer.world:
        if trainer.position.batch:
            text = f"{len(ranks)} processes wrote {file}, {trainer.world} read it: the epoch begins again."
            warn(text)
        trainer.position.batch = 0
        return None
    mine = ranks[processes.rank()]
    set_random_states(mine["random"])
    if len(mine["generators"]) == len(trainer.generators):
        for generator, state in zip(trainer.generators, mine["generators"], strict=True):
            generator.set_state(state)
    left: dict[str, Any] | None = mine["left"]
    return left


def _check_parts(trainer: "Trainer", held: Container[str], file: Path) -> None:
    """Refuse a trainer with something more than the run that it shall go on with."""
    absent = [name for name in stateful(trainer) if name not in held]
    if absent:
        fix = f"load_checkpoint({str(file)!r}, model=model, optimizer=optimizer), and fit without resume"
        text = f"{file} is a run without {', '.join(absent)}; nothing was loaded. To begin a new one with its weights"
        raise LoadError(f"{text}: {fix}.")


def _check_generators(trainer: "Trainer", ranks: list[dict[str, Any]], file: Path) -> None:
    """Refuse loaders that can't draw the rest of an epoch as those drew its beginning."""
    if len(ranks) != trainer.world or ranks[processes.rank()]["left"] is None:
        return
    then, now = len(ranks[processes.rank()]["generators"]), len(trainer.generators)
    if then != now:
        had = counted(then, "generator", "generators")
        text = f"{file} is from within an epoch whose loaders drew from {had} of their own, and these from {now}"
        raise TrainingError(f"{text}: DataLoader(..., generator=...) as it was.")


def stateful(trainer: "Trainer") -> dict[str, Any]:
    """What of a trainer has a state, by the name that it has in a file."""
    found: dict[str, Any] = {"scaler": trainer.scaler}
    if not trainer.sharded:
        found |= {"model": trainer.model, "optimizer": trainer.optimizer, "average": trainer.average}
    found |= {f"scheduler_{when}": scheduler for when, scheduler in trainer.schedulers.items()}
    if isinstance(trainer.loss, nn.Module) and trainer.loss.state_dict():
        found["loss"] = trainer.loss
    return {name: value for name, value in found.items() if value is not None}


def _link(source: Path, target: Path) -> None:
    """Give a file another name, in one step; a copy where the filesystem has no links."""
    target = Path(os.path.realpath(target))
    temporary = target.with_name(f".{target.name}.linking")
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    try:
        os.link(os.path.realpath(source), temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)
