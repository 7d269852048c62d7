"""Carrying out a plan: from the file straight into the tensors' own memory.

If a read fails half-way, the model has to be as it was. A small state is copied aside first. A large one would double
the memory, so whatever is not in the page cache is read once before anything is written: a broken disk or a file that
was cut off shows then, and the second read comes from memory. Ctrl-C is obeyed once the load is whole.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch

from modsurg.checkpoints.formats.file_io import Region, is_plain, read_all, read_into
from modsurg.checkpoints.formats.pagecache import is_cached
from modsurg.checkpoints.formats.source import Source
from modsurg.checkpoints.load.plan import Fill
from modsurg.checkpoints.load.sharing import write_anywhere
from modsurg.errors import FormatError, LoadError

JOURNAL_LIMIT = 32 << 20
_STEP = 1 << 20


def fill(source: Source, fills: Sequence[Fill]) -> None:
    """Fill tensors.

    Raises:
        LoadError: The file can't be read. The tensors are as they were, unless the message says otherwise.
    """
    fills = _distinct(fills)
    direct: list[tuple[Region, torch.Tensor]] = []
    staged: list[Fill] = []
    for each in fills:
        region = _direct_region(source, each)
        if region is None:
            staged.append(each)
        else:
            direct.append((region, each.target.tensor))
    direct.sort(key=lambda job: job[0])

    def attempt() -> None:
        read_all(direct)
        for each in staged:
            _copy(source, each)
        torch.autograd.graph.increment_version([tensor for _, tensor in direct if not tensor.is_inference()])

    if sum(each.target.tensor.nbytes for each in fills) <= JOURNAL_LIMIT:
        with _told_as_load_error(source), _journal(fills):
            attempt()
    else:
        with _told_as_load_error(source):
            _probe(source, direct, staged)
        _carry_through(source, attempt)


def _carry_through(source: Source, attempt: Callable[[], None]) -> None:
    """There is no way back from here, so what goes wrong is tried once more."""
    try:
        attempt()
    except KeyboardInterrupt:
        attempt()
        raise
    except (OSError, FormatError):
        try:
            attempt()
        except (OSError, FormatError) as error:
            raise LoadError(
                f"{source.path} broke off while it was read ({error}), and a part of the model has the new values: "
                "load again, from a file that is whole"
            ) from error


def _distinct(fills: Sequence[Fill]) -> list[Fill]:
    """One of those that are tied and have the same values, which the plan made sure of."""
    seen: dict[object, Fill] = {}
    for each in fills:
        tensor = each.target.tensor
        view = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        seen.setdefault(view if tensor.numel() else each.target.name, each)
    return list(seen.values())


def _direct_region(source: Source, each: Fill) -> Region | None:
    tensor = each.target.tensor
    if each.overlap or not is_plain(tensor) or tensor.dtype != source[each.key].dtype:
        return None
    return source.region(each.key)


def _copy(source: Source, each: Fill) -> None:
    tensor, values = each.target.tensor, source.read(each.key)
    if each.overlap:
        common = tuple(slice(0, min(sizes)) for sizes in zip(tensor.shape, values.shape, strict=True))
        tensor, values = tensor.detach()[common], values[common]
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        write_anywhere(tensor.detach(), values)


@contextlib.contextmanager
def _journal(fills: Sequence[Fill]) -> Iterator[None]:
    before = [each.target.tensor.detach().clone() for each in fills]
    try:
        yield
    except BaseException:
        for each, values in zip(fills, before, strict=True):
            with torch.inference_mode(values.is_inference()), torch.no_grad():
                write_anywhere(each.target.tensor.detach(), values)
        raise


@contextlib.contextmanager
def _told_as_load_error(source: Source) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LoadError(f"{source.path} can't be read ({error.strerror or error}); nothing was loaded") from error


def _probe(source: Source, direct: Sequence[tuple[Region, torch.Tensor]], staged: Sequence[Fill]) -> None:
    """Read once what is not in memory yet, and unpack once what may be damaged."""
    regions = [region for region, _ in direct]
    for each in staged:
        region = source.region(each.key)
        if region is None:
            source.read(each.key)
        else:
            regions.append(region)
    buffer = memoryview(bytearray(_STEP))
    for run in _runs(regions):
        if is_cached(run):
            continue
        for start in range(0, run.nbytes, _STEP):
            count = min(_STEP, run.nbytes - start)
            read_into(Region(run.fd, run.offset + start, count), buffer[:count])


def _runs(regions: Sequence[Region]) -> list[Region]:
    """The same bytes in pieces as long as the file allows."""
    runs: list[Region] = []
    for region in sorted(regions):
        last = runs[-1] if runs else None
        if last and last.fd == region.fd and last.offset + last.nbytes == region.offset:
            runs[-1] = Region(last.fd, last.offset, last.nbytes + region.nbytes)
        elif region.nbytes:
            runs.append(region)
    return runs
