"""A training run as one file: model, optimizer, scheduler, whatever else has a state, and the random states."""

import contextlib
import copy
import json
import operator
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from modsurg.checkpoints import optimizer_state as stepping
from modsurg.checkpoints.formats.documents import RUN, UNREADABLE
from modsurg.checkpoints.formats.json_codec import Tensors, decode, encode
from modsurg.checkpoints.formats.memory import MemorySource
from modsurg.checkpoints.formats.registry import open_source, write_source
from modsurg.checkpoints.formats.remote import remote_path, url_of
from modsurg.checkpoints.load.custom import has_extra, snapshot
from modsurg.checkpoints.load.model_tensors import find_loading_code
from modsurg.checkpoints.rng import check_random_states, random_states, set_random_states
from modsurg.errors import FormatError, LoadError, SaveError
from modsurg.tree.wrappers import unwrap, wrapper_kind

_SIZES: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("out_features", "in_features"),
    nn.Embedding: ("num_embeddings", "embedding_dim"),
}


@dataclass
class RunState:
    """What a file of `save_checkpoint` holds, in memory and in plain data.

    Attributes:
        path: The file.
        step: As given when it was saved.
        classes: Stateful name -> qualified class name.
        states: Stateful name -> its state. Parameters of an optimizer are called by name.
        random: The random states.
        versions: Path of a module -> the version of its state, where it is not 1; None in files that do not say.
    """

    path: Path
    step: int
    classes: dict[str, str]
    states: dict[str, Any]
    random: dict[str, Any]
    versions: dict[str, int] | None


def save_checkpoint(path: str | os.PathLike[str], *, step: int = 0, **stateful: object) -> Path:
    """Keep a run in one file, whole or not at all, without pickle.

    The file is a safetensors file whose tensors are called `model.fc.weight` or `optimizer.state.fc.weight.exp_avg`.
    The random states of python, numpy and torch (accelerators included) are kept with it.

    Args:
        path: The target, with the suffix `.safetensors`. A file that is there is replaced in one step.
        step: Where the run is; `load_checkpoint` returns it.
        **stateful: Whatever has a state, under names of your own: modules, optimizers (their parameters are called by
            name, so pass the model too), anything with `state_dict` and `load_state_dict`, and plain dictionaries.
            What is in a dictionary comes back as plain data: an OrderedDict or defaultdict as a dict, a named tuple as
            a tuple, a number of numpy as python's.

    Returns:
        The file to load: `path`.

    Raises:
        SaveError: Something without a state, or with one that holds more than plain data and tensors; no file was
            touched.

    Example:
        >>> import tempfile
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> path = save_checkpoint(tempfile.mkdtemp() + "/run.safetensors", step=7, model=model, optimizer=optimizer)
        >>> load_checkpoint(path, model=model, optimizer=optimizer)
        7
    """
    tensors: Tensors = {}
    try:
        step = operator.index(step)
    except TypeError:
        raise SaveError(f"step={step!r:.80}: give a whole number, and keep anything else in a dict") from None
    stateful = _unwrapped(stateful)
    names = stepping.parameter_names(stateful)
    given = {name: _state(name, value, names) for name, value in stateful.items()}
    states = {name: encode(state, name, tensors) for name, state in given.items()}
    document = {
        "step": step,
        "classes": {name: _kind(value) for name, value in stateful.items()},
        "states": states,
        "versions": {
            f"{name}.{part}": version["version"]
            for name, state in given.items()
            for part, version in getattr(state, "_metadata", {}).items()
            if type(version.get("version")) is int and version["version"] != 1
        },
        "random": encode(random_states(), "random", tensors),
    }
    return write_source(path, MemorySource(tensors, {RUN: json.dumps(document, separators=(",", ":"))}))


def load_checkpoint(path: str | os.PathLike[str], **stateful: object) -> int:
    """Set everything given to what the file holds, and the random states too; returns the step.

    All of it is checked first: where something does not match, nothing is changed. What is in the file and is
    not asked for stays unread. To get weights only, `load_state(model, path)` reads the same file.

    Args:
        path: A file of `save_checkpoint`.
        **stateful: The same names as when it was saved, any part of them.

    Raises:
        LoadError: A name that the file does not hold, an optimizer or scheduler of another class, a model with other
            parameters or shapes.
        FormatError: The file is not a run, or is damaged.

    Example:
        >>> import tempfile
        >>> path = save_checkpoint(tempfile.mkdtemp() + "/run.safetensors", model=nn.Linear(2, 1))
        >>> load_checkpoint(path, model=nn.Linear(3, 1))
        Traceback (most recent call last):
        modsurg.errors.LoadError: ...run.safetensors does not match; nothing was loaded.
          model.weight  file (1, 2), here (1, 3): build it with the arguments of the saved one
    """
    run = read_run(path)
    restore(run, stateful)
    return run.step


def read_run(path: str | os.PathLike[str]) -> RunState:
    """Read a file of `save_checkpoint` into memory; see `load_checkpoint` for what it raises."""
    where = remote_path(url) if (url := url_of(path)) else Path(path)
    with open_source(path) as source:
        if RUN not in source.notes.metadata:
            raise FormatError(f"{path} holds no run, only a state: load_state(model, {str(path)!r}) reads it.")
        try:
            data = json.loads(source.notes.metadata[RUN])
            tensors = {key: source.read(key) for key in source}
            states = {name: decode(state, tensors) for name, state in data["states"].items()}
            random = decode(data["random"], tensors)
            run = RunState(
                where,
                data["step"],
                data["classes"],
                states,
                random,
                data.get("versions"),
            )
            if type(run.step) is not int or not all(type(run.classes[name]) is str for name in states):
                raise TypeError("a step or a class that can't be")
            check_random_states(run.random)
        except UNREADABLE as error:
            raise FormatError(f"{path}: its run metadata is corrupt ({error!r:.200}).") from error
    return run


def restore(run: RunState, stateful: Mapping[str, object]) -> None:
    """Set everything in `stateful` to what the run holds, all or nothing, and the random states."""
    stateful = _unwrapped(stateful)
    absent = [name for name in stateful if name not in run.states]
    if absent:
        raise LoadError(f"{run.path} holds {', '.join(run.states)}, and no {', '.join(absent)}; nothing was loaded.")
    names = stepping.parameter_names(stateful)
    try:
        problems = [line for name, value in stateful.items() for line in _problems(run, name, value, names)]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"{run.path} is damaged: {error!r:.200}; nothing was loaded.") from error
    if problems:
        more = [f"... and {len(problems) - 10} more"] if len(problems) > 10 else []
        lines = "\n  ".join(problems[:10] + more)
        raise LoadError(f"{run.path} does not match; nothing was loaded.\n  {lines}")
    before = random_states()
    undo: dict[str, Callable[[], object]] = {}
    filled: list[str] = []
    try:
        for name, value in sorted(stateful.items(), key=_may_not_fail):
            if _may_not_fail((name, value)):  # nothing but copies of tensors whose shapes and dtypes were checked
                filled.append(name)
            else:
                undo[name] = snapshot(value) if isinstance(value, nn.Module) else _setter(value, _snapshot(value))
            _setter(value, _given(run, name, value, names))()
        set_random_states(run.random)
    except BaseException as error:
        lost = [other for other, back in reversed(undo.items()) if not _done(back)]
        set_random_states(before)
        end = _describe_rest(lost, filled)
        if not isinstance(error, Exception):
            error.add_note(f"{run.path}: {end}")
            raise
        raise LoadError(f"{run.path}: loading {name} failed ({error!r:.200}); {end}") from error


def _may_not_fail(item: tuple[str, object]) -> bool:
    """Whether a stateful object is a model whose loading runs no code but torch's own."""
    value = item[1]
    return isinstance(value, nn.Module) and not any(
        has_extra(module) or any(find_loading_code(module)) for module in value.modules()
    )


def _describe_rest(lost: Sequence[str], filled: Sequence[str]) -> str:
    parts = []
    if filled:
        *whole, last = filled
        new = f"{', '.join(whole)} {'has' if len(whole) == 1 else 'have'} the new values and " if whole else ""
        parts.append(f"{new}{last} may have some of them: load again")
    if lost:
        parts.append(f"{', '.join(lost)} could not get its old state back: create it again")
    return "; ".join(parts) or "nothing was loaded."


def _given(run: RunState, name: str, value: object, names: Mapping[int, str]) -> Any:
    """The state in the file as `value` takes it."""
    state = run.states[name]
    if isinstance(value, Optimizer):
        return stepping.numbered(state, value, names)
    if isinstance(value, nn.Module) and run.versions is not None:
        state = OrderedDict(state)
        state._metadata = {  # type: ignore[attr-defined]  # where torch's modules look for it
            path: {"version": run.versions.get(f"{name}.{path}", 1)}
            for path, _ in value.named_modules(remove_duplicate=False)
        }
    return state


def _done(back: Callable[[], object]) -> bool:
    with contextlib.suppress(Exception):
        back()
        return True
    return False


def _unwrapped(stateful: Mapping[str, object]) -> dict[str, object]:
    inner = {name: unwrap(value) if isinstance(value, nn.Module) else value for name, value in stateful.items()}
    return {
        name: value.module if isinstance(value, nn.Module) and wrapper_kind(value) in ("DDP", "DataParallel") else value
        for name, value in inner.items()
    }


def _state(name: str, value: Any, names: Mapping[int, str]) -> Any:
    if isinstance(value, Optimizer):
        return stepping.named(value, names)
    if isinstance(value, dict):
        return value
    if not (hasattr(value, "state_dict") and hasattr(value, "load_state_dict")):
        raise SaveError(f"{name} is a {_kind(value)} without state_dict and load_state_dict: pass a dict instead.")
    return value.state_dict()


def _snapshot(value: Any) -> Any:
    """What `_setter` takes to bring the value back."""
    if isinstance(value, dict):
        return dict(value)
    state = value.state_dict()
    return state if isinstance(value, Optimizer) else copy.deepcopy(state)


def _setter(value: Any, state: Any) -> Callable[[], object]:
    if isinstance(value, dict):
        return lambda: _refill(value, state)
    if isinstance(value, Optimizer):
        return lambda: stepping.set_state(value, state)
    return lambda: value.load_state_dict(state)


def _refill(value: dict[Any, Any], state: Mapping[Any, Any]) -> None:
    value.clear()
    value.update(state)


def _kind(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _problems(run: RunState, name: str, value: object, names: Mapping[int, str]) -> list[str]:
    if isinstance(value, nn.Module):
        return _model_problems(name, run.states[name], value)
    if run.classes[name] != _kind(value):
        return [f"{name}  file {run.classes[name]}, here {_kind(value)}: make it of the same class"]
    return stepping.problems(name, run.states[name], value, names) if isinstance(value, Optimizer) else []


def _model_problems(name: str, saved: Mapping[str, Any], model: nn.Module) -> list[str]:
    lines = []
    mine, advised = model.state_dict(), False
    layers = dict(model.named_modules(remove_duplicate=False))
    for key in [*saved, *(key for key in mine if key not in saved)]:
        there, here = saved.get(key), mine.get(key)
        if key not in saved or key not in mine:
            near = get_close_matches(key, list(mine if key in saved else saved), 1)
            hint = f" (nearest: {near[0]})" if near else ""
            lines.append(f"{name}.{key}  {'only in the file' if key in saved else 'not in the file'}{hint}")
        elif isinstance(there, torch.Tensor) and isinstance(here, torch.Tensor):
            if there.shape != here.shape:
                sizes = list(zip(there.shape, here.shape, strict=False))
                advice = _resizing(name, layers, key, sizes) or (
                    "" if advised else ": build it with the arguments of the saved one"
                )
                advised = True
                lines.append(f"{name}.{key}  file {tuple(there.shape)}, here {tuple(here.shape)}{advice}")
            elif there.dtype != here.dtype:
                lines.append(f"{name}.{key}  file {there.dtype}, here {here.dtype}")
    return lines


def _resizing(name: str, layers: Mapping[str, nn.Module], key: str, sizes: Sequence[tuple[int, int]]) -> str:
    """The line that gives a layer the sizes (there, here) of the file; empty where no single one does."""
    path, _, attribute = key.rpartition(".")
    known = next((names for kind, names in _SIZES.items() if isinstance(layers.get(path), kind)), ())
    if not path or attribute != "weight" or len(known) != len(sizes):
        return ""
    changed = [f"{size}={there}" for size, (there, here) in zip(known, sizes, strict=True) if there != here]
    return f': first resize({name}, "{path}", {", ".join(changed)})'
