"""The one way in which modsurg writes a file: whole or not at all.

The bytes go to a hidden file beside the target, are flushed to the disk, and take the target's name in one step. After
a kill, a crash or a full disk, the target is the old file or the new one. A hidden file that a dead process left
behind is cleared by the next save to the same target; a lock on it tells whether its writer still lives.
"""

import contextlib
import ctypes
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from modsurg.errors import SaveError

try:
    import fcntl
except ImportError:  # Windows: there a file that is open can't be removed, which is what the lock is for
    fcntl = None  # type: ignore[assignment]  # a module or nothing

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_SUFFIX = ".saving"
_LONGEST = 200
_PORTION = 8 << 20
_STRICT = sum(getattr(os, name, 0) for name in ("O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"))
_START_WRITING = 2  # SYNC_FILE_RANGE_WRITE
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None) if os.name == "posix" else None  # Linux has it


class PendingFile:
    """A file that is being written and has no name yet. Made by `writing` and `pending`.

    Attributes:
        target: Where it will be.
        temporary: Where it is, for a library that wants to open a file by itself.
        fd: Open for writing and reading.
        failure: What the disk refused; a library that writes here may say something else.
    """

    def __init__(self, target: Path, size: int | None = None) -> None:
        self.target = _checked(target)
        mode = _mode_to_keep(self.target)
        self.size = size
        self.written = 0
        self.failure: SaveError | None = None
        self._started = 0
        _clear(self.target)
        self.temporary, self.fd = _create(self.target)
        self._open = True
        if mode is not None:
            os.chmod(self.temporary, mode)

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Write `data` at the place of `tell`; returns its length in bytes.

        Raises:
            SaveError: The disk is full; says how much was missing.
        """
        view = memoryview(data).cast("B")
        done = 0
        with self.explained(len(view)):
            while done < len(view):
                done += os.write(self.fd, view[done:])
                self.written = max(self.written, self.tell())
        self._start_disk()
        return done

    def _start_disk(self) -> None:
        """Let the disk work while the next bytes are made, where the system can be told so."""
        coming = self.written - self._started
        if _sync_file_range is not None and coming >= _PORTION:
            _sync_file_range(self.fd, ctypes.c_int64(self._started), ctypes.c_int64(coming), _START_WRITING)
            self._started = self.written

    def tell(self) -> int:
        """Where the next bytes go."""
        return os.lseek(self.fd, 0, os.SEEK_CUR)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Write the next bytes there: over those that are there already, or from the end on."""
        return os.lseek(self.fd, offset, whence)

    def flush(self) -> None:
        """Nothing is buffered; here so that it serves where a file object is expected."""

    def sync(self) -> None:
        """Flush to the disk.

        Raises:
            SaveError: The disk failed, or is full after all.
        """
        with self.explained(0):
            os.fsync(self.fd)

    def commit(self, target: Path | None = None) -> None:
        """Flush to the disk and take the name of the target (or another one in the same directory)."""
        target = target or self.target
        self.sync()
        with self.explained(0):
            os.replace(self.temporary, target)
        self._close()
        sync_directory(target.parent)

    def discard(self) -> None:
        """Leave nothing behind. Does nothing after `commit`."""
        if self._open:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.temporary)
            self._close()

    def _close(self) -> None:
        self._open = False
        os.close(self.fd)

    @contextlib.contextmanager
    def explained(self, coming: int) -> Iterator[None]:
        """Turn a failing disk into a SaveError; a full one says how much was missing of the `coming` bytes."""
        before = self.written
        try:
            yield
        except OSError as error:
            self.failure = SaveError(self._said(error, before + coming))
            raise self.failure from error

    def _said(self, error: OSError, wanted: int) -> str:
        if error.errno not in _FULL:
            return f"{self.target}: can't be written ({error.strerror}); it is unchanged"
        missing = max(self.size or 0, wanted) - self.written
        amount = f"at least {missing:,} more bytes are needed" if missing > 0 else "more room is needed"
        return (
            f"{self.target}: no room for it ({error.strerror}): {self.written:,} bytes were written and {amount}. "
            f"The target is unchanged: make room in {self.target.parent} and save again"
        )


@contextlib.contextmanager
def pending(path: str | os.PathLike[str], size: int | None = None) -> Iterator[PendingFile]:
    """A file beside `path` that is gone after the block unless `commit` was called."""
    file = PendingFile(Path(path), size)
    try:
        yield file
    finally:
        file.discard()


@contextlib.contextmanager
def writing(path: str | os.PathLike[str], size: int | None = None) -> Iterator[PendingFile]:
    """A file that appears at `path` when the block ends well, and leaves nothing behind when it fails.

    Args:
        path: The target. A symbolic link is followed; an existing file is replaced.
        size: How many bytes there will be, if known: a full disk is then reported with what was missing.

    Raises:
        SaveError: The directory does not exist, the target is not a regular file, or the disk is full.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "note.txt"
        >>> with writing(path) as file:
        ...     _ = file.write(b"kept")
        >>> path.read_bytes()
        b'kept'
    """
    with pending(path, size) as file:
        yield file
        file.commit()


def sync_directory(directory: Path) -> None:
    """Make the names in a directory as lasting as the files."""
    with contextlib.suppress(OSError):  # some network filesystems can't, and need not; some directories can't be read
        fd = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


@contextlib.contextmanager
def locked_directory(directory: Path, *, wait: bool) -> Iterator[bool]:
    """Hold the lock on a directory, where the system has such locks; False if another process has it."""
    if fcntl is None:
        yield True
        return
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        free = True
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            free = False
        except OSError:  # a filesystem without locks
            pass
        yield free
    finally:
        os.close(fd)


def no_directory(directory: Path, path: Path) -> str:
    """What to say of a directory that is missing, where `path` was to be written."""
    return f"there is no directory {directory}" + (in_home(path) or f": Path({str(directory)!r}).mkdir(parents=True)")


def in_home(path: Path) -> str:
    """A hint for who took `~` for the home directory, as it is in a shell; empty for another path."""
    return f": Path({str(path)!r}).expanduser() is in your home" if path.parts[:1] and path.parts[0][0] == "~" else ""


def _checked(path: Path) -> Path:
    try:
        target = Path(os.path.realpath(path))
        exists, has_home = target.exists(), target.parent.is_dir()
    except (OSError, ValueError) as error:
        raise SaveError(f"{str(path)!r} can't be the name of a file ({getattr(error, 'strerror', error)})") from None
    if not has_home:
        raise SaveError(f"{path}: {no_directory(target.parent, path)}")
    if exists and not stat.S_ISREG(target.stat().st_mode):
        if not target.is_dir():
            raise SaveError(f"{path} is not a regular file: save to another name")
        raise SaveError(f"{path} is a directory: save to a file name, as in {str(path / 'model.safetensors')!r}")
    return target


def _prefix(target: Path) -> str:
    return "." + os.fsdecode(os.fsencode(target.name)[:_LONGEST]) + "."


def _create(target: Path) -> tuple[Path, int]:
    while True:
        path = target.parent / f"{_prefix(target)}{secrets.token_hex(4)}{_SUFFIX}"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _STRICT, 0o666)
        except FileExistsError:
            continue
        except OSError as error:
            raise SaveError(f"{target}: can't be written ({error.strerror})") from error
        if _lock(fd) and os.fstat(fd).st_nlink:  # another process may take it for a leftover before it is locked
            return path, fd
        os.close(fd)


def _lock(fd: int) -> bool:
    """Whether the file is ours now; systems and filesystems without locks say yes."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _clear(target: Path) -> None:
    """Remove what dead writers of this target left behind."""
    prefix = _prefix(target)
    middle = len(secrets.token_hex(4))
    names: list[str] = []
    with contextlib.suppress(OSError):  # a directory that can be written to and not read
        names = os.listdir(target.parent)
    for name in names:
        if not (name.startswith(prefix) and name.endswith(_SUFFIX)):
            continue
        if len(name) != len(prefix) + middle + len(_SUFFIX):
            continue
        with contextlib.suppress(OSError):
            _remove_if_dead(target.parent / name)


def _remove_if_dead(path: Path) -> None:
    if not stat.S_ISREG(os.lstat(path).st_mode):
        return
    fd = os.open(path, os.O_RDWR | _STRICT)
    try:
        alone = stat.S_ISREG(os.fstat(fd).st_mode) and os.fstat(fd).st_nlink == 1
        if alone and _lock(fd):
            os.unlink(path)
    finally:
        os.close(fd)


def _mode_to_keep(target: Path) -> int | None:
    """The permissions of the file that will be replaced; None where there is none.

    Raises:
        SaveError: The file must not be written.
    """
    if not os.path.exists(target):  # unlike Path.exists it says no to a name that no file can have
        return None
    mode = stat.S_IMODE(target.stat().st_mode)
    if not mode & 0o222 or not os.access(target, os.W_OK):
        raise SaveError(f"{target} is write-protected, so it was not replaced: save to another name")
    return mode
