"""Writing a directory of torch.distributed.checkpoint, by DCP itself, from a source that is read tensor by tensor."""

import contextlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import MetadataIndex

from modsurg.checkpoints.formats.atomic import locked_directory, no_directory, sync_directory, writing
from modsurg.checkpoints.formats.dcp.reader import NOTES
from modsurg.checkpoints.formats.file_io import as_plain
from modsurg.checkpoints.formats.safetensors.metadata import pack
from modsurg.checkpoints.formats.source import Source
from modsurg.errors import SaveError

_SUFFIX: Final = ".saving"


def write_distributed(path: str | os.PathLike[str], source: Source) -> None:
    """Write a state as a checkpoint of torch.distributed.checkpoint, which dcp.load reads on any number of processes.

    DCP does not know ties: tied values are written under each of their names. What else it has no place for (the user's
    strings, ties, versions) lies beside its files in `modsurg.json`.

    Args:
        path: The directory; it must not exist, or be empty.
        source: Values and notes.

    Raises:
        SaveError: The directory has something in it, or the disk is full. Nothing is left behind.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise SaveError(f"{path} exists already: give the name of a directory that does not, or remove it first")
    if not target.parent.is_dir():
        raise SaveError(f"{path}: {no_directory(target.parent, Path(path))}")
    with _pending(target) as temporary:
        _save(temporary, source)
        with writing(temporary / NOTES) as file:
            file.write(json.dumps(_notes(source), ensure_ascii=False).encode())
        os.replace(temporary, target)
    sync_directory(target.parent)


def _save(directory: Path, source: Source) -> None:
    """What `dcp.save` does in one process, without asking whether there are others."""
    state: dict[str, object] = {}
    for key in source.keys_in_order:
        entry = source.get(key)
        extra = source.notes.extra
        state[key] = torch.empty(entry.shape, dtype=entry.dtype, device="meta") if entry else extra[key]
    planner, writer = _LazyPlanner(source), FileSystemWriter(directory, thread_count=1, per_thread_copy_ahead=0)
    try:
        planner.set_up_planner(state, is_coordinator=True)
        writer.set_up_storage_writer(True)
        local = writer.prepare_local_plan(planner.create_local_plan())
        plans, metadata = planner.create_global_plan([local])
        final = planner.finish_plan(writer.prepare_global_plan(plans)[0])
        writer.finish(metadata, [writer.write_data(final, planner).wait()])
    except (OSError, RuntimeError) as error:
        raise SaveError(f"{directory.name[1:].rsplit('.', 2)[0]}: {_reason(directory, source, error)}") from error


def _reason(directory: Path, source: Source, error: Exception) -> str:
    """Why DCP failed: torch's writer does not say that a disk is full."""
    written = sum(path.stat().st_size for path in directory.iterdir())
    missing = sum(source[key].nbytes for key in source) - written
    if shutil.disk_usage(directory).free >= missing:
        return f"DCP could not write it: {error}"
    return (
        f"no room for it: {written:,} bytes were written and at least {missing:,} more bytes are needed. Nothing is "
        f"left of it: make room in {directory.parent} and save again"
    )


def _notes(source: Source) -> dict[str, Any]:
    """Our notes; extra state lies in DCP's own files."""
    stored = [key for key in source.keys_in_order if key in source and key not in source.notes.ties]
    order = [key for key in source.keys_in_order if key in source]
    return {"notes": pack(replace(source.notes, extra={}), order), "stored": stored}


class _LazyPlanner(DefaultSavePlanner):
    """Plans with tensors on meta, and reads the values when they are written.

    The writer of DCP holds on to every tensor of a file until the file is done. Without copying ahead it has written
    one when it asks for the next, so that the memory of the one before can go.
    """

    def __init__(self, source: Source) -> None:
        super().__init__()
        self._source = source
        self._written: torch.Tensor | None = None

    def lookup_object(self, index: MetadataIndex) -> Any:
        if index.fqn not in self._source:
            return super().lookup_object(index)
        if self._written is not None:
            self._written.untyped_storage().resize_(0)
        value = as_plain(self._source.read(index.fqn))
        self._written = value if self._source.path is not None else None  # of a dictionary, the tensor is the user's
        return value


@contextlib.contextmanager
def _pending(target: Path) -> Iterator[Path]:
    """A directory beside the target that is gone after the block, unless it was renamed."""
    prefix = f".{target.name}."
    leftover = re.compile(re.escape(prefix) + r"[0-9a-f]{8}" + re.escape(_SUFFIX))
    for left in target.parent.iterdir():
        if leftover.fullmatch(left.name) and left.is_dir() and not left.is_symlink():
            _remove_if_dead(left)
    temporary = target.parent / f"{prefix}{secrets.token_hex(4)}{_SUFFIX}"
    try:
        temporary.mkdir()
    except OSError as error:
        raise SaveError(f"{target}: can't be written ({error.strerror})") from error
    try:
        with locked_directory(temporary, wait=True):
            yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_if_dead(directory: Path) -> None:
    """Remove what a killed process left behind; a living one holds a lock on it."""
    with contextlib.suppress(OSError), locked_directory(directory, wait=False) as free:
        if free:
            shutil.rmtree(directory)
