"""From one checkpoint format to another, tensor by tensor: `convert`."""

import contextlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from modsurg.checkpoints.formats.derived import DerivedSource, floating
from modsurg.checkpoints.formats.registry import open_source, write_source
from modsurg.checkpoints.formats.remote import (
    PathOrFile,
    file_name,
    is_binary,
    local_path,
    path_exists,
    publishing,
    remote_path,
    shown,
    url_of,
)
from modsurg.checkpoints.formats.safetensors.sharded import index_of
from modsurg.checkpoints.formats.source import Source
from modsurg.checkpoints.load.key_mapping import Only, Rename, chooser, renamer
from modsurg.checkpoints.rules import TensorRule, apply_rules
from modsurg.errors import FormatError, LoadError, SaveError, TrustError, counted, listed, visible, warn

Progress = Callable[[int, int], None]
_NO_WEIGHTS = re.compile(r"optim|sched|scaler|rng|random", re.IGNORECASE)


@dataclass(frozen=True)
class Conversion:
    """What `convert` wrote. Prints as one line.

    Attributes:
        source: What was read.
        target: What to load: the file, the index of the shards, or the directory.
        tensors: How many there are in it, tied ones included.
        nbytes: Their size in bytes, tied ones once.
        taken: Where in a checkpoint the state was, as in `"model.state_dict"`; `""` for the top.
        left: What lay in the source and was not written: keys that were not chosen, and what is not part of the state.
        kept: Keys that kept their own floating dtype, because `dtype` can't hold what they mean.
    """

    source: Path
    target: Path
    tensors: int
    nbytes: int
    taken: str = ""
    left: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()

    def __str__(self) -> str:
        taken = f" (its {self.taken!r})" if self.taken else ""
        left = f"; left out: {listed(self.left, 5)}" if self.left else ""
        tensors = counted(self.tensors, "tensor", "tensors")
        kept = f"; own dtype kept: {listed(self.kept, 5)}" if self.kept else ""
        text = f"{self.source}{taken} -> {self.target}: {tensors}, {self.nbytes:,} bytes{kept}{left}"
        return visible(text)


def convert(
    source: PathOrFile,
    target: PathOrFile,
    *,
    rename: Rename = None,
    rules: Sequence[TensorRule] = (),
    only: Only = None,
    part: str | None = None,
    dtype: torch.dtype | None = None,
    allow_overflow: bool = False,
    shard_size: int | str | None = None,
    progress: Progress | None = None,
) -> Conversion:
    r"""Write a checkpoint in another format, under other names, in another dtype, or split into shards.

    Tensor by tensor, so that a file may be larger than the memory. Ties, key order, metadata, extra state and module
    versions come along. The target appears when it is whole; it may be the source itself.

    Args:
        source: A checkpoint of any format that `load_state` reads. Nothing that it holds is run.
        target: The suffix chooses: `.safetensors`, `.safetensors.index.json`, or `.pt`, `.pth`, `.bin`. A name without
            a suffix is a new directory of torch.distributed.checkpoint.
        rename: From the source's keys to the target's, as in `load_state`: `{"backbone.": "", "head": None}`, rules
            `{r"re:blocks\.(\d+)\.(.*)": r"layer\1.\2"}`, or a function. None as the new name leaves the key out.
        rules: `modsurg.rules`, for tensors that the target stores otherwise. They see the source's keys, before `only`
            and `rename`.
        only: Only these keys of the source: a name, glob or `re:`, of keys or of what holds them, or several.
        part: Of a file with several states, the one under this name, such as `"state_dict_ema"`; as in `read_state`.
        dtype: For floating tensors, such as `torch.bfloat16`; others keep theirs, scales of block formats too.
        allow_overflow: Whether finite values that do not fit in `dtype` may become infinite; an error by default.
        shard_size: Bytes of values in one file at most, a number or `"5GB"`; for safetensors.
        progress: Called with the bytes done and all the bytes, after each tensor.

    Returns:
        What was written, and what of the source was left out.

    Raises:
        FileNotFoundError: No source.
        FormatError: The source is not what its name says.
        TrustError: Opening the source would run code. Nothing of it ran.
        SaveError: Tensors outside of the state that would be left out, unless `part` or `only` says so; a name or value
            that the target's format can't keep, `only` or a rule of `rename` that matches no key, finite values that
            `dtype` can't hold, or a full disk. The target keeps what it held.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> torch.save({"model": torch.nn.Linear(3, 2).state_dict(), "epoch": 3}, f"{folder}/old.pt")
        >>> done = convert(f"{folder}/old.pt", f"{folder}/new.safetensors", rename={"": "head."})
        >>> done.taken, done.left, done.tensors, done.nbytes
        ('model', ('epoch',), 2, 32)
    """
    dtype = floating(dtype, SaveError)
    with open_source(source, part) as opened:
        if part is None and only is None:
            _check_left_tensors(_path(source), opened.left_tensors)
        try:
            ruled = apply_rules(opened, rules)
        except LoadError as error:
            raise SaveError(str(error).replace("nothing was loaded", "nothing was written")) from None
        names = _names(ruled, rename, only)
        opened.check_readable(chooser(only))
        local = not is_binary(source) and url_of(source) is None
        whole = index_of(_path(source)) if only is None and local else None
        if whole is not None:
            warn(f"{_path(source)} is one of several files; for all of them: convert {whole}")
        cast = DerivedSource(ruled, names=names, dtype=dtype, allow_overflow=allow_overflow)
        derived = _Watched(cast, progress)
        try:
            written = _write(target, derived, shard_size)
        except LoadError as error:
            raise SaveError(f"{error}; nothing was written") from error
        kept = set(names.values())
        left = (*opened.left, *(key for key in ruled.keys_in_order if key not in kept))
        nbytes = sum(derived[key].nbytes for key in derived.stored)
        own = tuple(cast.keep_own_dtype)
        return Conversion(_path(source), written, len(derived), nbytes, opened.taken, left, own)


def _check_left_tensors(path: Path, names: Sequence[str]) -> None:
    """Refuse to leave out tensors that may be weights; those of an optimizer or a random generator are not.

    Raises:
        SaveError: There are some; the message has a line that writes some of them, and one that leaves them.
    """
    names = [name for name in names if not _NO_WEIGHTS.search(name)]
    if not names:
        return
    lines = ['only="**" to leave them out']
    for name in names[:5]:
        with contextlib.suppress(FormatError, TrustError), open_source(path, name):
            lines.append(f"part={json.dumps(name, ensure_ascii=False)} to write that")
            break
    raise SaveError(
        visible(
            f"{path}: it holds tensors outside of the state, in {listed(names, 5)}; nothing was written. "
            f"Try: convert(source, target, ...) with {', or '.join(lines)}"
        )
    )


class _Watched(Source):
    """A source that tells how much of it was read."""

    def __init__(self, source: Source, progress: Progress | None) -> None:
        super().__init__(source.path, source, source.notes)
        self._source = source
        self._progress = progress
        self._total = sum(source[key].nbytes for key in source.stored)
        self._done = 0

    def read(self, key: str) -> torch.Tensor:
        tensor = self._source.read(key)
        if self._progress:
            self._done = min(self._done + self[key].nbytes, self._total)
            self._progress(self._done, self._total)
        return tensor


def _path(path: PathOrFile) -> Path:
    if is_binary(path):
        return Path(str(getattr(path, "name", "bytes")))
    url = url_of(path)
    return local_path(path) if url is None else remote_path(shown(url))


def _write(path: PathOrFile, source: Source, shard_size: int | str | None) -> Path:
    if is_binary(path):
        return write_source(path, source, shard_size=shard_size)
    if (url := url_of(path)) is not None:
        if Path(file_name(url)).suffix:
            return write_source(path, source, shard_size=shard_size)
        if path_exists(url):
            raise SaveError(f"{shown(url)} exists already: give the name of a directory that does not")
        with publishing(url) as local:
            _write(local, source, shard_size)
        return remote_path(url)
    target = local_path(path)
    if target.suffix and not target.is_dir():
        return write_source(target, source, shard_size=shard_size)
    if shard_size is not None:
        raise SaveError(f"{target} is to be a directory of torch.distributed.checkpoint, which knows no shard_size")
    from modsurg.checkpoints.formats.dcp.writer import write_distributed  # importing DCP takes its time

    write_distributed(target, source)
    return target


def _names(source: Source, rename: Rename, only: Only) -> dict[str, str]:
    """New name -> the source's name, in the source's order."""
    try:
        keys = list(filter(chooser(only), source.keys_in_order))
        if not keys and only is not None:
            shown = ", ".join(source.keys_in_order[:3])
            raise SaveError(
                f"only={only!r} matches no key of {source.path}; nothing was written. The keys are like {shown}"
            )
        new_name = renamer(rename, keys)
        renamed = [(key, new_name(key)) for key in keys]
    except LoadError as error:
        raise SaveError(str(error).replace("nothing was loaded", "nothing was written")) from None
    names: dict[str, str] = {}
    for key, new in renamed:
        if new in names:
            raise SaveError(f"rename gives {names[new]!r} and {key!r} the same name {new!r}; nothing was written")
        if new is not None:
            names[new] = key
    return names
