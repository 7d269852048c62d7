"""The files of a run: `last` and `best`, and going on from one."""

import contextlib
import os
import shutil
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from modsurg.checkpoints.formats.remote import (
    copy_remote,
    keep_latest,
    open_writable,
    path_exists,
    path_in,
    remote_path,
    shown,
    url_of,
)
from modsurg.checkpoints.rng import random_states, set_random_states
from modsurg.checkpoints.run_file import read_run, restore, save_checkpoint
from modsurg.errors import LoadError, ModsurgError, TrainingError, counted, warn
from modsurg.training import sharding
from modsurg.training.best_weights import BEST
from modsurg.training.distributed import gathered, rank
from modsurg.training.edits import carry_weights, repeat_edits, undo_edits
from modsurg.training.state import Runtime, TrainingState
from modsurg.tree.eval_lock import held, hold, release

LAST = "last.safetensors"


def save(state: TrainingState, runtime: Runtime, path: str | os.PathLike[str]) -> None:
    """Write everything that `resume` needs; all processes take part."""
    progress = state.progress
    generators = [generator.get_state() for generator in state.generators]
    own = {
        "position": progress.position,
        "history": progress.rows,
        "options": state.options,
        "recipes": progress.recipes,
        "frozen": [name for name, p in state.model.named_parameters() if not p.requires_grad],
        "held": [path for path, module in state.model.named_modules() if held(module)],
        "ranks": gathered({"random": random_states(), "generators": generators, "left": progress.rest}),
    }
    if runtime.sharded:
        sharding.save(path, state.model, state.optimizer)
        path = Path(path) / sharding.OWN
    if rank() == 0:
        save_checkpoint(path, step=progress.step, trainer=own, **state.stateful(sharded=runtime.sharded))


def rotate(
    state: TrainingState, runtime: Runtime, directory: str | os.PathLike[str], *, improved: bool, numbered: int
) -> None:
    """Write `best` if it is, let `last` be the same file, else write that; keep so many `numbered` ones."""
    step, url = state.progress.step, url_of(directory)
    if runtime.sharded:
        directory = Path(directory)
        name = gathered(sharding.free_name(directory, step))[0]
        save(state, runtime, directory / name)
        gathered(None)
        if rank() == 0:
            sharding.point(directory, name, ["last", "best"] if improved else ["last"], numbered)
        return
    last, best = path_in(directory, LAST), path_in(directory, BEST)
    save(state, runtime, best if improved else last)
    if rank():
        return
    if improved:
        _link(best, last)  # after it, so that no kill leaves a `best` that is older than `last` says
    if numbered:
        _link(last, path_in(directory, f"step-{step:08d}.safetensors"))
        if url is not None:
            keep_latest(url, "step-????????.safetensors", numbered)
            return
        files = Path(directory).glob("step-????????.safetensors")
        for old in sorted(files, key=lambda file: (file.stat().st_mtime_ns, file.name))[:-numbered]:
            old.unlink()


def resume_hint(directory: str | os.PathLike[str] | None, *, sharded: bool) -> str:
    """Say how a run that was stopped goes on."""
    if directory is None:
        return "; it is in no file, as there is no checkpoint_dir"
    return f"; {path_in(directory, 'last' if sharded else LAST)} goes on with fit(..., resume=True)"


def find_checkpoint(
    directory: str | os.PathLike[str] | None, resume: bool | str | os.PathLike[str], *, sharded: bool
) -> Path | None:
    """Find the file to go on from; None to begin with the first step. Makes the directory for the files to come.

    Raises:
        TrainingError: `resume=True` without a directory, a file that is not there, a directory that can't be made.
    """
    if directory is not None and (url := url_of(directory)) is not None:
        if sharded:
            raise TrainingError(f"checkpoint_dir={shown(url)!r}: a sharded run is kept in a local directory.")
        open_writable(url)
    elif directory is not None:
        try:
            Path(directory).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(f"checkpoint_dir can't be made: {error}.") from error
        if not os.access(directory, os.W_OK):
            raise TrainingError(f"checkpoint_dir={os.fspath(directory)!r} can't be written to: name another.")
    if resume is False:
        return None
    if resume is True:
        if directory is None:
            raise TrainingError('resume=True needs Trainer(..., checkpoint_dir=...), or name the file: resume="...".')
        files = [path_in(directory, name) for name in (LAST, "last")]
        return next((file for file in files if path_exists(file)), None)
    url = url_of(resume)
    file = Path(resume) if url is None else remote_path(url)
    if not path_exists(file):
        text = f"resume={str(file)!r}: the file does not exist. resume=True begins with the first step in that case."
        raise TrainingError(text)
    if file.is_dir() and not (file / sharding.OWN).exists():
        raise TrainingError(f"resume={str(file)!r} does not hold a run: name a file, resume={str(file / LAST)!r}.")
    return file


def resume_run(state: TrainingState, runtime: Runtime, file: Path, trust: Any) -> int:
    """Go on from a file: repeat its edits, set every state; returns how many edits it records.

    Raises:
        LoadError: The file does not fit.
        TrainingError: An edit that could not be recorded, or loaders that can't go on.
    """
    run = read_run(file / sharding.OWN if file.is_dir() else file)
    if "trainer" not in run.states:
        raise TrainingError(f"{file} was not written by a Trainer: load_checkpoint({str(file)!r}, model=...) reads it.")
    own = run.states["trainer"]
    _check_generators(state, own["ranks"], runtime.world, file)
    made = len(state.reports)
    try:
        repeat_edits(state, runtime, own["recipes"], file, trust)
        stateful = state.stateful(sharded=runtime.sharded)
        if file.is_dir():
            sharding.load(file, state.model, state.optimizer, alone=runtime.world == 1)
            restore(run, {name: value for name, value in stateful.items() if name in run.states})
        else:
            _check_names(stateful, run.states, file)
            carry_weights(state, run)
            restore(run, stateful)
    except ModsurgError:
        undo_edits(state, runtime, made)
        raise
    _warn_of_options(own.get("options", {}), state.options, file)
    _load_progress(state, own, runtime.world, file)
    runtime.prepare(state.model)
    return len(own["recipes"])


def _load_progress(state: TrainingState, own: dict[str, Any], world: int, file: Path) -> None:
    """Set the progress, what is frozen, and the random states of this process."""
    progress, ranks = state.progress, own["ranks"]
    progress.__dict__.update({"mark": own["position"]["record"]} | own["position"])
    progress.rows[:], progress.rest = own["history"], None
    frozen, holding = set(own["frozen"]), set(own["held"])
    for name, parameter in state.model.named_parameters():
        parameter.requires_grad = name not in frozen
    for path, module in state.model.named_modules():
        (hold if path in holding else release)(module)
    if len(ranks) != world:
        if progress.batch:
            warn(f"{len(ranks)} processes wrote {file}, {world} read it: the epoch begins again.")
        progress.batch = 0
        return
    mine = ranks[rank()]
    set_random_states(mine["random"])
    if len(mine["generators"]) == len(state.generators):
        for generator, drawn in zip(state.generators, mine["generators"], strict=True):
            generator.set_state(drawn)
    progress.rest = mine["left"]


def group_options(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Give the numbers that an optimizer's groups were made with."""
    return [
        {
            name: group.get(f"initial_{name}", value)
            for name, value in group.items()
            if isinstance(value, bool | int | float)
        }
        for group in optimizer.param_groups
    ]


def _warn_of_options(then: Mapping[str, Any], now: Mapping[str, Any], file: Path) -> None:
    """Say in one line which options are others than when the file was written."""
    other = {name: (then[name], now[name]) for name in then if name in now and then[name] != now[name]}
    if "processes" in other or None in other.get("batches in an epoch", ()):
        other.pop("batches in an epoch", None)  # each process has its part of them
    groups = other.pop("optimizer", ([], []))
    told = [f"{name} {before}, here {after}" for name, (before, after) in other.items() if name != "processes"]
    for before, after in zip(*groups, strict=False):
        changed = [name for name in before if after.get(name, before[name]) != before[name]]
        told += [f"{name} {before[name]}, here {after[name]} (the file's is used)" for name in changed]
    if told:
        warn(f"{file} was written with {'; '.join(dict.fromkeys(told))}.")


def _check_names(stateful: Iterable[str], held_names: Container[str], file: Path) -> None:
    """Refuse a trainer with something more than the run in the file has."""
    absent = [name for name in stateful if name not in held_names]
    if absent:
        fix = f"load_checkpoint({str(file)!r}, model=model, optimizer=optimizer), and fit without resume"
        text = f"{file} is a run without {', '.join(absent)}; nothing was loaded. To begin a new one with its weights"
        raise LoadError(f"{text}: {fix}.")


def _check_generators(state: TrainingState, ranks: list[dict[str, Any]], world: int, file: Path) -> None:
    """Refuse loaders that can't draw the rest of an epoch as those drew its beginning."""
    if len(ranks) != world or ranks[rank()]["left"] is None:
        return
    then, now = len(ranks[rank()]["generators"]), len(state.generators)
    if then != now:
        had = counted(then, "generator", "generators")
        text = f"{file} is from within an epoch whose loaders drew from {had} of their own, and these from {now}"
        raise TrainingError(f"{text}: DataLoader(..., generator=...) as before.")


def _link(source: Path, target: Path) -> None:
    """Give a file another name, in one step; a copy where the filesystem has no links."""
    if (url := url_of(target)) is not None:
        copy_remote(os.fspath(source), url)
        return
    target = Path(os.path.realpath(target))
    temporary = target.with_name(f".{target.name}.linking")
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    try:
        os.link(os.path.realpath(source), temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)
