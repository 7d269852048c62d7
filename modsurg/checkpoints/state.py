"""Keep a state, load it into a model, look into it: `save_state`, `load_state`, `read_state`."""

import copy
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

import torch
from torch import nn

from modsurg.checkpoints.formats.derived import DerivedSource, floating
from modsurg.checkpoints.formats.memory import MemorySource
from modsurg.checkpoints.formats.parts import run_part
from modsurg.checkpoints.formats.registry import open_source, write_source
from modsurg.checkpoints.formats.remote import PathOrFile, is_binary
from modsurg.checkpoints.formats.source import Source
from modsurg.checkpoints.load.key_mapping import Only, Rename, chooser
from modsurg.checkpoints.load.load import load
from modsurg.checkpoints.load.plan import OnMismatch, Options
from modsurg.checkpoints.load.report import LoadReport
from modsurg.checkpoints.rules import TensorRule, apply_rules
from modsurg.errors import LoadError, SaveError, counted, listed, warn


class State(Mapping[str, Any]):
    """A checkpoint as a mapping from key to tensor, each read when it is asked for. Made by `read_state`.

    Close it, or use it in a `with`, to give back the file.

    Attributes:
        source: The opened file: `source[key]` is dtype, shape and size without reading.
    """

    def __init__(self, source: Source, keys: list[str], device: torch.device | str | None) -> None:
        self.source = source
        self._keys = dict.fromkeys(keys)
        self._device = device
        self._tied: weakref.WeakValueDictionary[str, torch.Tensor] = weakref.WeakValueDictionary()

    @property
    def metadata(self) -> Mapping[str, str]:
        """The strings that were saved with the state."""
        return self.source.notes.metadata

    def __getitem__(self, key: str) -> Any:
        if key not in self._keys:
            raise KeyError(key)
        notes = self.source.notes
        if key in notes.extra:
            return copy.deepcopy(notes.extra[key])
        first = notes.ties.get(key, key)
        if first in self._tied:
            return self._tied[first]
        tensor = self.source.read(first).to(self._device)
        if first != key or first in notes.ties.values():
            self._tied[first] = tensor
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __repr__(self) -> str:
        size = sum(self.source[key].nbytes for key in self._keys if key in self.source)
        return f"<State of {counted(len(self), 'key', 'keys')}, {size:,} bytes, {self.source.path}>"

    def __reduce__(self) -> NoReturn:
        raise SaveError(
            f"a State reads from {self.source.path}, which is open in this process: pickle or copy dict(state), "
            "or call read_state in the other process"
        )

    def close(self) -> None:
        """Give back the file."""
        self.source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def save_state(
    model_or_state: nn.Module | Mapping[str, Any],
    path: PathOrFile,
    *,
    dtype: torch.dtype | None = None,
    allow_overflow: bool = False,
    shard_size: int | str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Keep the state of a model: whole or not at all, and the same bytes for the same values.

    Tied tensors are stored once. Any memory layout is fine. Extra state (`get_extra_state`) is kept if it is plain data
    and tensors. A hash of every tensor is stored, for `verify`.

    Args:
        model_or_state: A model, its `state_dict()`, or what `read_state` gives.
        path: `.safetensors`, which any other reader of the format opens, or `.pt`, `.pth`, `.bin`, which `torch.load`
            opens. The file takes the place of an old one when it is complete.
        dtype: For the floating tensors in the file, such as `torch.float16`; others keep theirs.
        allow_overflow: Whether finite values that do not fit in `dtype` may become infinite; an error by default.
        shard_size: Split into files of at most this many bytes, `"5GB"` or a number, with an index beside them. A
            larger tensor has a file of its own.
        metadata: Text to keep with it: `{"epoch": "3"}`.

    Returns:
        The file to load: `path`, or the index of the shards.

    Raises:
        SaveError: Something that can't be kept, by its key; a full disk. The old file keeps what it held.

    Example:
        >>> import tempfile
        >>> model = nn.Linear(3, 2)
        >>> file = save_state(model, tempfile.mkdtemp() + "/net.safetensors", metadata={"epoch": "3"})
        >>> read_state(file).metadata["epoch"]
        '3'
    """
    _check_metadata(metadata)
    dtype = floating(dtype, SaveError)
    if not isinstance(model_or_state, nn.Module | Mapping):
        raise SaveError(
            f"save_state(model, path): a {type(model_or_state).__name__} is neither a model nor a state_dict; a whole "
            "run, optimizer included, is kept by save_checkpoint"
        )
    if isinstance(model_or_state, State):
        state = model_or_state
        names = {key: key for key in state}
        source = DerivedSource(state.source, names=names, dtype=dtype, allow_overflow=allow_overflow, metadata=metadata)
    else:
        state_dict = model_or_state.state_dict() if isinstance(model_or_state, nn.Module) else model_or_state
        source = DerivedSource(MemorySource(state_dict, metadata), dtype=dtype, allow_overflow=allow_overflow)
    if source.keep_own_dtype:
        warn(f"{listed(source.keep_own_dtype, 5)}: block format, so its own dtype was kept, not {dtype}")
    try:
        return write_source(path, source, shard_size=shard_size)
    except LoadError as error:
        raise SaveError(f"{error}; nothing was written") from error


def read_state(
    path: PathOrFile,
    where: Only = None,
    *,
    part: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    allow_overflow: bool = False,
) -> State:
    """Open a checkpoint as a mapping from key to tensor; nothing is read until it is asked for.

    Args:
        path: A file of any format that is known.
        where: Only these keys: a name, glob or `re:`, of keys or of what holds them (`"layer4"`), or several.
        part: Of a file of torch.save that holds several states, the one under this name: `"state_dict_ema"`, or
            `"optimizer"`, whose keys are then like `state.0.exp_avg`. By default `.source.taken` says which was chosen,
            and `.source.left` what else there is. Of a run (`save_checkpoint`) the weights of one module, as `"model"`;
            by default all that is in it.
        device: Where the tensors shall be; the CPU by default.
        dtype: For floating tensors; as stored by default.
        allow_overflow: Whether finite values that do not fit in `dtype` may become infinite; an error by default.

    Raises:
        FileNotFoundError: Nothing there.
        FormatError: The file is not what its name says, or has no such part.
        LoadError: `where` matches no key, or `dtype` is not a floating dtype.

    Example:
        >>> import tempfile
        >>> file = save_state(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)), tempfile.mkdtemp() + "/net.safetensors")
        >>> state = read_state(file, "1")
        >>> list(state), state["1.weight"].shape
        (['1.weight', '1.bias'], torch.Size([1, 2]))
    """
    dtype = floating(dtype, LoadError)
    source = open_source(path, part)
    source.check_readable(chooser(where))
    keys = list(filter(chooser(where), source.keys_in_order))
    if not keys and where is not None:
        shown = ", ".join(source.keys_in_order[:3])
        source.close()
        raise LoadError(f"{where!r} matches no key of {source.path}. The keys are like {shown}")
    if dtype is not None:
        source = DerivedSource(source, dtype=dtype, allow_overflow=allow_overflow)
    return State(source, keys, device)


def load_state(
    model: nn.Module,
    path_or_state: PathOrFile | Mapping[str, Any],
    *,
    strict: bool = True,
    rename: Rename = None,
    rules: Sequence[TensorRule] = (),
    only: Only = None,
    on_mismatch: OnMismatch = "error",
    verify: bool = False,
) -> LoadReport:
    r"""Load a state into a model: planned first, and all of it or nothing.

    The values go from the file straight into the memory of the parameters and buffers, which stay the same objects. A
    model on the meta device gets its memory here. `module.` and `_orig_mod.`, which wrappers put in keys, don't count.

    Args:
        model: Filled in place.
        path_or_state: A file of any format, a `state_dict`, or what `read_state` gives. Of a run (`save_checkpoint`,
            or the trainer's `best.safetensors`) the model's weights are taken.
        strict: Every key of the model is in the file, and the other way round. False loads what matches by name.
        rename: From the file's keys to the model's: `{"backbone.": "", "head": "fc"}` (None leaves out), rules
            `{r"re:blocks\.(\d+)\.(.*)": r"layer\1.\2"}`, or a function.
        rules: `modsurg.rules`, for tensors that the file stores otherwise: packed, apart, transposed, or for another
            image size. They see the file's keys, before `rename`.
        only: Only these keys of the model: a name, glob or `re:`, of keys or of what holds them, or several.
        on_mismatch: A tensor of another shape, or a dtype that would lose values, is an `"error"`, or `"skip"`
            leaves the model's own; `"slice"` fills the part that both shapes have; `"interpolate"` resamples position
            embeddings of a vision transformer for its number of patches.
        verify: Check the stored hashes first.

    Returns:
        What was loaded, and what was not.

    Raises:
        LoadError: The state does not match; the message lists what, and the argument that mends it.
        FormatError: The file is not what its name says.
        IntegrityError: A stored hash does not hold (only with `verify`).

    Example:
        >>> old, new = nn.Linear(3, 4), nn.Linear(3, 2)
        >>> load_state(new, old.state_dict())
        Traceback (most recent call last):
            ...
        modsurg.errors.LoadError: 2 of 2 keys do not match; nothing was loaded.
          weight  file (4, 3), model (2, 3)
          bias    file (4,), model (2,)
        Try: load_state(..., on_mismatch="skip") to keep the model's own values for these keys
        >>> print(load_state(new, old.state_dict(), on_mismatch="slice"))
        loaded 2 of 2 keys
          sliced  weight  file (4, 3), model (2, 3)
          sliced  bias    file (4,), model (2,)
    """
    for given, kind in ((model, nn.Module), (path_or_state, str | os.PathLike | Mapping)):
        if not isinstance(given, kind) and not (given is path_or_state and is_binary(given)):
            place = "model" if given is model else "path"
            raise LoadError(
                f"load_state(model, path) has a {type(given).__name__} where the {place} should be; nothing was loaded."
                " From another model: load_state(model, other.state_dict())"
            )
    options = Options(strict, rename, only, on_mismatch)

    def load_ruled(source: Source) -> LoadReport:
        return load(model, apply_rules(source, rules, model), options, verify)

    if isinstance(path_or_state, State):
        names = {key: key for key in path_or_state}
        whole = path_or_state.source
        source = run_part(DerivedSource(whole, names=names, metadata=whole.notes.metadata))
        return replace(load_ruled(source), taken=source.taken or whole.taken, left=whole.left_tensors)
    if isinstance(path_or_state, Mapping):
        try:
            memory = MemorySource(path_or_state)
            if rules:
                memory.keep_apart(memory, (value for _, value in _tensors(model)), {})
            return load_ruled(memory)
        except SaveError as error:
            raise LoadError(f"the state can't be loaded: {error}") from error
    with open_source(path_or_state) as opened:
        chosen, own = chooser(only), {**dict(_tensors(model))}
        opened.check_readable(lambda key: chosen(key) and (strict or key in own))
        source = run_part(opened)
        return replace(load_ruled(source), taken=source.taken, left=opened.left_tensors)


def _tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def _check_metadata(metadata: Mapping[str, str] | None) -> None:
    if metadata is not None and not isinstance(metadata, Mapping):
        raise SaveError(
            f"metadata is of type {type(metadata).__name__}: give names and texts, metadata={{'epoch': '3'}}"
        )
    for name, text in (metadata or {}).items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise SaveError(
                f"metadata[{name!r}] is of type {type(text).__name__}, and only text is kept: str(...) of it"
            )
        try:
            (name + text).encode()
        except UnicodeEncodeError as error:
            raise SaveError(f"metadata[{name!r}] is not valid text ({error.reason}): encode it, as by repr()") from None
        if name.startswith("modsurg."):
            raise SaveError(f"metadata[{name!r}]: names that begin with 'modsurg.' are taken; give it another name")
