"""Files elsewhere: a URL that fsspec opens, seen as a local file whose bytes are fetched when they are read.

The mirror of a file is a sparse local file of the same size. Whoever reads from it by `pread` or through `fetch` gets
the ranges that are missing first; nothing else of the file is downloaded. One version is pinned: if the size, the ETag
or the time of the file changes, that is an error. No torch is needed here.
"""

import contextlib
import os
import re
import shutil
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Self, TypeAlias
from urllib.parse import urlsplit, urlunsplit

from modsurg.errors import FormatError, ModsurgError, RemoteError

if TYPE_CHECKING:
    from typing_extensions import TypeIs

_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_LOCAL = re.compile(r"^(file|local)://(localhost(?=/))?", re.IGNORECASE)
_FIRST = 8 << 10  # enough to see what a file is
_PIECE = 16 << 20
_NEAR = 64 << 10  # a smaller gap is fetched along
_AHEAD = 8 << 20
_ROW = 3  # so many reads, each where the one before it ended
_THREADS = 4
_ATTEMPTS = 4
_SHOWN_FROM = 64 << 20
_PUT_WHOLE = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "az", "adl", "hf", "memory", "oci", "oss"})
_FIXED = (
    *("ETag", "etag", "VersionId", "version_id", "Content-MD5", "md5", "checksum", "Digest", "sha256", "blob_id"),
    *("LastModified", "Last-Modified", "last_modified", "mtime", "created", "updated"),
)


PathOrFile: TypeAlias = str | os.PathLike[str] | BinaryIO | bytes


class RemotePath(type(Path())):  # type: ignore[misc]  # the path class of this system, which is not known before
    """The URL of a file; its text is the URL without what may be secret in it."""

    url = ""

    def __str__(self) -> str:
        return shown(self.url)

    def __fspath__(self) -> str:
        return self.url


def remote_path(url: str) -> RemotePath:
    """The URL as a path, as functions return what they have written."""
    path = RemotePath(url)
    path.url = url
    return path


def path_in(directory: str | os.PathLike[str], name: str) -> Path:
    """Return the path of a file in a directory, which may be a URL."""
    url = url_of(directory)
    return local_path(directory) / name if url is None else remote_path(_inside(url, name))


def path_exists(path: str | os.PathLike[str]) -> bool:
    """Tell whether there is a file or a directory, locally or at a URL."""
    url = url_of(path)
    if url is None:
        return local_path(path).exists()
    system = open_system(url)
    return bool(attempt(url, lambda: system.exists(system._strip_protocol(url))))


def url_of(path: object) -> str | None:
    """The URL that a path is, None for a local one; `file://` is local.

    Example:
        >>> url_of("s3://bucket/net.safetensors"), url_of("net.safetensors"), url_of("file:///tmp/net.pt")
        ('s3://bucket/net.safetensors', None, None)
    """
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else ""
    if not isinstance(text, str) or not _URL.match(text) or text.lower().startswith(("file://", "local://")):
        return None
    return text


def is_binary(value: object) -> "TypeIs[BinaryIO | bytes]":
    """Whether this is a binary file object, or bytes, and not a path."""
    return isinstance(value, bytes | bytearray | memoryview) or (
        callable(getattr(value, "read", None)) and callable(getattr(value, "seek", None))
    )


def local_path(path: str | os.PathLike[str]) -> Path:
    """A local path, also of a `file://` URL."""
    text = os.fspath(path)
    return (
        Path(re.sub(r"^(file|local)://(localhost(?=/))?", "", text, flags=re.IGNORECASE))
        if _URL.match(text)
        else Path(text)
    )


def shown(url: str) -> str:
    """A URL without what may be secret in it: the user, the password, the query.

    Example:
        >>> shown("https://me:secret@host/a.pt?token=abc")
        'https://host/a.pt'
    """
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


class RemoteFile:
    """One file elsewhere, and its mirror.

    Attributes:
        url: Where it is.
        mirror: The sparse local file.
    """

    def __init__(self, system: Any, url: str, mirror: Path) -> None:
        self.url, self.mirror = url, mirror
        self._system = system
        self._path = system._strip_protocol(url)
        info = self._try(lambda: system.info(self._path))
        if info.get("type") == "directory":
            raise IsADirectoryError(shown(url))
        if info.get("size") is None:
            raise RemoteError(f"{shown(url)}: the server does not say how large it is. Try: download it first")
        self._version = _version(info)
        self._size = int(info["size"])
        self._have: list[tuple[int, int]] = []
        self._last, self._row = -1, 0
        with open(mirror, "wb") as file:
            file.truncate(self._size)
        found = os.stat(mirror)
        _mirrors[found.st_dev, found.st_ino] = self
        self.fetch([(0, min(_FIRST, self._size))])

    def fetch(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Get the ranges (start, end) that are missing; nothing of a file that changed is kept.

        Raises:
            RemoteError: It can't be read, or it changed since it was opened.
        """
        missing = _merged([gap for start, end in ranges for gap in self._gaps(start, min(end, self._size))])
        if not missing:
            return
        self._row = self._row + 1 if missing[0][0] == self._last else 0
        if self._row >= _ROW and len(missing) == 1:  # it is read from one end to the other
            start, end = missing[0]
            missing = [(start, min(max(end, start + _AHEAD), self._size))]
        self._last = missing[-1][1]
        pieces = [(at, min(at + _PIECE, end)) for start, end in missing for at in range(start, end, _PIECE)]
        with (
            open(self.mirror, "r+b") as file,
            _progress(self.url, sum(end - start for start, end in pieces)) as advance,
        ):

            def get(piece: tuple[int, int]) -> None:
                data = self._try(lambda: _whole(self._system.cat_file(self._path, start=piece[0], end=piece[1]), piece))
                os.pwrite(file.fileno(), data, piece[0])
                advance(len(data))

            if len(pieces) == 1:
                get(pieces[0])
            else:
                with ThreadPoolExecutor(_THREADS) as pool:
                    list(pool.map(get, pieces))
        self.check_version()
        self._have = _merged([*self._have, *missing], near=0)

    def check_version(self) -> None:
        """See that the file is still the one that was opened.

        Raises:
            RemoteError: It is not.
        """
        self._system.invalidate_cache()
        if _version(self._try(lambda: self._system.info(self._path))) != self._version:
            raise RemoteError(f"{shown(self.url)} changed while it was being read. Try: read it again")

    def close(self) -> None:
        """Forget the file; the mirror is deleted with its directory."""
        with contextlib.suppress(OSError):
            found = os.stat(self.mirror)
            _mirrors.pop((found.st_dev, found.st_ino), None)

    def _gaps(self, start: int, end: int) -> list[tuple[int, int]]:
        gaps = []
        for have_start, have_end in self._have:
            if have_end <= start or have_start >= end:
                continue
            if have_start > start:
                gaps.append((start, have_start))
            start = max(start, have_end)
        return [*gaps, (start, end)] if start < end else gaps

    def _try(self, action: Callable[[], Any]) -> Any:
        return attempt(self.url, action)


_mirrors: dict[tuple[int, int], RemoteFile] = {}


def attempt(url: str, action: Callable[[], Any]) -> Any:
    """Do something over the network, several times if it fails.

    Raises:
        FileNotFoundError: There is no such file.
        RemoteError: It failed each time.
    """
    for number in range(1, _ATTEMPTS + 1):
        try:
            return action()
        except FileNotFoundError:
            raise FileNotFoundError(f"there is no file {shown(url)}") from None
        except PermissionError:
            raise RemoteError(f"{shown(url)}: access was refused; set the credentials that fsspec reads") from None
        except Exception as error:
            if number == _ATTEMPTS:
                what = f"{type(error).__name__}, {number} times"
                raise RemoteError(
                    f"{shown(url)} can't be reached ({what}). Try: the same again, or download it first"
                ) from None
            time.sleep(0.1 * 2**number)
    raise AssertionError


def pread(fd: int, size: int, offset: int) -> bytes:
    """`os.pread`, of a mirror after fetching the range."""
    fetch(fd, [(offset, offset + size)])
    return os.pread(fd, size, offset)


def fetch(fd: int, ranges: Sequence[tuple[int, int]] | None = None) -> None:
    """Get ranges of the file behind a descriptor, all of it without `ranges`; nothing to do for a local file."""
    if not _mirrors:
        return
    found = os.fstat(fd)
    remote = _mirrors.get((found.st_dev, found.st_ino))
    if remote is not None:
        remote.fetch([(0, found.st_size)] if ranges is None else ranges)


class Mirror:
    """A local directory with mirrors of what is at a URL: a file, an index with its shards, or a directory.

    Args:
        url: What fsspec opens.

    Attributes:
        path: Of the mirror; it has the name that the URL has.
    """

    def __init__(self, url: str) -> None:
        system = open_system(url)
        self._url = url
        self._directory = tempfile.mkdtemp(prefix="modsurg-")
        self._files: list[RemoteFile] = []
        self._close = weakref.finalize(self, _remove, self._directory, self._files)
        try:
            self.path = self._open(system, url)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Delete the mirrors; what is mapped stays readable."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Close it; an error of ours names the URL in place of the mirror."""
        self.close()
        if isinstance(error, ModsurgError):
            raise type(error)(str(error).replace(str(self.path), shown(self._url))) from None

    def _open(self, system: Any, url: str) -> Path:
        name = file_name(url)
        path = Path(self._directory, name)
        try:
            self._files.append(RemoteFile(system, url, path))
        except (FileNotFoundError, IsADirectoryError):
            return self._open_directory(system, url, path)
        if name.endswith(".index.json"):
            self._open_shards(system, url, path)
        return path

    def _open_shards(self, system: Any, url: str, index: Path) -> None:
        import json

        self._files[0].fetch([(0, index.stat().st_size)])
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, LookupError, TypeError, AttributeError):
            return  # the reader says what is wrong with it
        for name in names[:_MOST_SHARDS]:
            if isinstance(name, str) and name and Path(name).name == name:
                with contextlib.suppress(FileNotFoundError):
                    self._files.append(RemoteFile(system, _beside(url, name), index.with_name(name)))

    def _open_directory(self, system: Any, url: str, path: Path) -> Path:
        """A repository on a hub, or a directory of torch.distributed.checkpoint."""
        listed = attempt(url, lambda: system.ls(system._strip_protocol(url), detail=True))
        names = sorted(file_name(item["name"]) for item in listed if item.get("type") == "file")
        for name in ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"):
            if name in names:
                return self._open(system, _inside(url, name))
        if ".metadata" not in names and _ADAPTER not in names:
            raise FormatError(
                f"{shown(url)} is a directory, not a checkpoint. It holds {', '.join(names[:8]) or 'no files'}"
            )
        if _ADAPTER in names:
            names = [name for name in names if name.startswith("adapter_")]
        path.mkdir()
        for name in names[:_MOST_SHARDS]:
            self._files.append(RemoteFile(system, _inside(url, name), path / name))
            self._files[-1].fetch([(0, (path / name).stat().st_size)])
        return path


_MOST_SHARDS = 10_000
_ADAPTER = "adapter_config.json"


def open_system(url: str) -> Any:
    """The file system of a URL.

    Raises:
        RemoteError: fsspec, or what it needs for this kind of URL, is not installed.
    """
    try:
        import fsspec  # type: ignore[import-untyped]  # it ships no types

        return fsspec.core.url_to_fs(url)[0]
    except ImportError as error:
        missing = error.name or "fsspec"
        raise RemoteError(
            f"{shown(url)} needs {missing}, which is not installed. Try: pip install 'modsurg[remote]'"
        ) from None
    except ValueError as error:
        raise RemoteError(f"{shown(url)}: {error}") from None


@contextmanager
def publishing(url: str) -> Generator[Path]:
    """Give a local path to write to; the file or directory there is uploaded when the block ends without an error.

    Raises:
        RemoteError: It can't be uploaded.
    """
    system = open_writable(url)
    with tempfile.TemporaryDirectory(prefix="modsurg-") as directory:
        target = Path(directory, file_name(url))
        yield target
        files = [file for file in Path(directory).rglob("*") if file.is_file()]
        for file in sorted(files, key=lambda file: file in (target, target / ".metadata")):  # what readers open: last
            _put(system, file, _beside(url, file.relative_to(directory).as_posix()))


def open_writable(url: str) -> Any:
    """Open the file system of a URL for uploads.

    Raises:
        RemoteError: It takes none.
    """
    system = open_system(url)
    if _protocols(system) & {"http", "https"}:
        raise RemoteError(f"{shown(url)} can't be written: the web takes no uploads. Try: an s3://, gs:// or hf:// URL")
    return system


def copy_remote(source: str, target: str) -> None:
    """Give a file another name beside its own, without fetching it."""
    system = open_writable(target)
    attempt(target, lambda: system.copy(system._strip_protocol(source), system._strip_protocol(target)))


def keep_latest(directory: str, pattern: str, keep: int) -> None:
    """Delete files at a URL whose names match a glob, but for the last so many by name."""
    system = open_writable(directory)
    for path in sorted(attempt(directory, lambda: system.glob(_inside(directory, pattern))))[:-keep]:
        system.rm_file(path)


def _protocols(system: Any) -> set[str]:
    return {system.protocol} if isinstance(system.protocol, str) else set(system.protocol)


def _put(system: Any, file: Path, url: str) -> None:
    path = system._strip_protocol(url)
    if _protocols(system) & _PUT_WHOLE:  # there all at once, when the upload is complete
        attempt(url, lambda: system.put_file(str(file), path))
        return
    temporary = f"{path}.{os.urandom(4).hex()}.saving"
    attempt(url, lambda: system.put_file(str(file), temporary))
    attempt(url, lambda: system.mv(temporary, path))


def _remove(directory: str, files: list[RemoteFile]) -> None:
    for file in files:
        file.close()
    shutil.rmtree(directory, ignore_errors=True)


def _version(info: dict[str, Any]) -> tuple[Any, ...]:
    return (info.get("size"), *(str(info[name]) for name in _FIXED if info.get(name)))


def _whole(data: bytes, piece: tuple[int, int]) -> bytes:
    if len(data) != piece[1] - piece[0]:
        raise OSError(f"{len(data)} bytes instead of {piece[1] - piece[0]}")
    return data


def _merged(ranges: Iterable[tuple[int, int]], near: int = _NEAR) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if found and start <= found[-1][1] + near:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def file_name(url: str) -> str:
    """Return the last part of a URL's path."""
    return url.partition("?")[0].rstrip("/").rpartition("/")[2] or "file"


def _beside(url: str, name: str) -> str:
    path, mark, query = url.partition("?")
    return f"{path.rpartition('/')[0]}/{name}{mark}{query}"


def _inside(url: str, name: str) -> str:
    path, mark, query = url.partition("?")
    return f"{path.rstrip('/')}/{name}{mark}{query}"


@contextmanager
def _progress(url: str, total: int) -> Generator[Callable[[int], None]]:
    if total < _SHOWN_FROM or not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(file_name(url), total=total)
        yield lambda count: bar.advance(task, count)
