"""Whether a file still holds what was written to it."""

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from modsurg.checkpoints.formats.registry import open_source
from modsurg.checkpoints.formats.remote import local_path, url_of
from modsurg.checkpoints.formats.safetensors.header import foreign
from modsurg.checkpoints.formats.source import Source
from modsurg.checkpoints.formats.torch_save.legacy import is_legacy
from modsurg.errors import FormatError, IntegrityError, TrustError, counted, listed, visible

_START = 512
_ZIP = re.compile(
    rb"/(data\.pkl|version|code/|constants\.pkl|\.format_version|\.data/|byteorder)"
)  # what torch writes first


@dataclass(frozen=True)
class Verification:
    """The result of `verify`: true when nothing is wrong.

    Attributes:
        path: What was looked at.
        checked: Tensors whose stored hash holds.
        unhashed: Tensors without a stored hash; only their place and size could be checked.
        damaged: Tensors whose bytes are not those that were written.
        problem: What is wrong with the file as a whole; empty if nothing is.
        foreign: Whether that is because the file is refused, or is not a checkpoint of a known format.
    """

    path: str
    checked: tuple[str, ...] = ()
    unhashed: tuple[str, ...] = ()
    damaged: tuple[str, ...] = ()
    problem: str = ""
    foreign: bool = False

    def __bool__(self) -> bool:
        return not (self.damaged or self.problem)

    def __str__(self) -> str:
        if self.problem:
            return visible(self.problem)
        parts = []
        if self.checked:
            parts.append(counted(len(self.checked), "tensor holds", "tensors hold") + " what was written")
        if self.unhashed:
            parts.append(counted(len(self.unhashed), "has", "have") + " no stored hash (places and sizes are right)")
        if self.damaged:
            shown = visible(listed(self.damaged, 10))
            parts.append(f"{counted(len(self.damaged), 'is', 'are')} damaged: {shown}")
        return f"{self.path}: {'; '.join(parts) or 'no tensors'}"


Progress = Callable[[int, int], None]


def verify(path: str | os.PathLike[str], *, progress: Progress | None = None) -> Verification:
    """Check a checkpoint file: sizes, header, and the stored hash of every tensor.

    Every byte is read once, through a small buffer, what lies beside the state too. Files of other programs mostly have
    no hashes; what can be checked without is checked, and the result says so.

    Args:
        path: A file of any format that `load_state` reads.
        progress: Called with the bytes checked and all the bytes, after each tensor.

    Returns:
        True or false in an `if`; names the damaged tensors, and prints as one line.

    Raises:
        FileNotFoundError: Nothing there.

    Example:
        >>> import tempfile, torch
        >>> from modsurg import save_state
        >>> file = save_state(torch.nn.Linear(2, 2), tempfile.mkdtemp() + "/net.safetensors")
        >>> bool(verify(file))
        True
        >>> with open(file, "r+b") as opened:
        ...     _ = opened.seek(-1, 2), opened.write(b"~")
        >>> verify(file).damaged
        ('bias',)
    """
    try:
        with open_source(path) as source:
            found = examine(source, source, progress)
            rest = source.rest() if found else ""
            return replace(found, problem=f"{path}: {rest}") if rest else found
    except (FormatError, TrustError) as error:
        local = url_of(path) is None
        foreign = isinstance(error, TrustError) or not local or not _begins_like_checkpoint(local_path(path))
        return Verification(str(path), problem=str(error), foreign=foreign)


def examine(source: Source, keys: Iterable[str], progress: Progress | None = None) -> Verification:
    """Check the header and these tensors of an opened source."""
    results: dict[str, bool | None] = {}
    done, total = 0, sum(entry.nbytes for entry in source.values())
    for key in keys:
        results[key] = source.check(key)
        if progress is not None:
            done += source[key].nbytes
            progress(done, total)
    problem = "" if source.sealed is not False else f"{source.path}: the header is not the one that was written"
    return Verification(
        str(source.path),
        tuple(key for key, good in results.items() if good),
        tuple(key for key, good in results.items() if good is None),
        tuple(key for key, good in results.items() if good is False),
        problem,
    )


def _begins_like_checkpoint(path: Path) -> bool:
    """Whether a file that can't be opened began as one that this library reads, and so is damaged."""
    if path.is_dir():
        return (path / ".metadata").exists()
    if path.name.endswith(".index.json"):
        return True
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(_START)
    if foreign(start[:64], path):
        return False
    if not start.strip(b"\0") or (len(start) < 9 and path.suffix == ".safetensors"):  # not written to the end
        return True
    if len(start) < 9:
        return start.startswith((b"PK", b"\x80"))
    return start[8:9] == b"{" or (start.startswith(b"PK") and _ZIP.search(start) is not None) or is_legacy(start)


def require_verified(source: Source, keys: Iterable[str]) -> None:
    """Raise unless every one of these tensors holds what was written.

    Raises:
        IntegrityError: A hash does not hold, or there is none.
    """
    found = examine(source, keys)
    if not found:
        raise IntegrityError(f"{found}; nothing was loaded. Get the file again")
    if found.unhashed:
        raise IntegrityError(
            f"{source.path or 'a state in memory'}: {found.unhashed[0]} has no stored hash, so it can't be verified; "
            "nothing was loaded. Load without verify=True, and save_state writes a file that has hashes"
        )
