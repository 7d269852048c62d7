"""Whole models in one file, structure and weights, opened without running what the caller did not trust."""

import json
import mmap
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from modsurg.checkpoints.formats.atomic import in_home
from modsurg.checkpoints.formats.documents import RUN
from modsurg.checkpoints.formats.memory import MemorySource
from modsurg.checkpoints.formats.remote import Mirror, fetch, local_path, publishing, remote_path, shown, url_of
from modsurg.checkpoints.formats.safetensors.source import SafetensorsSource, write_safetensors
from modsurg.checkpoints.pickled import PICKLED, load_pickled, save_pickled
from modsurg.errors import FormatError, ModsurgError, SaveError, TrustError
from modsurg.structure.build import build, describe_model
from modsurg.structure.schema import KEY, read_tree
from modsurg.structure.trust import Renames, Trusted

_SUFFIXES = "model.safetensors or model.pt"


def save_model(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Keep a whole model, structure and weights, in one file.

    As `.safetensors` the header holds the tree as JSON and the weights are an ordinary state_dict: every other tool
    opens the same file, and it contains no pickle. As `.pt`, `.pth` or `.bin` it is what `torch.save(model)` writes;
    `load_model` reads that as data too.

    Args:
        model: Any module. A torch.compile wrapper is looked through; tied tensors are written once.
        path: The target. An old file is replaced when the new one is complete.

    Returns:
        The file to load: `path`.

    Raises:
        SaveError: Something that no file may hold (a lambda, a hook, a path, an open file), all of it by its path;
            or the disk is full. The target is unchanged.

    Example:
        >>> import tempfile
        >>> path = save_model(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), tempfile.mkdtemp() + "/model.safetensors")
        >>> load_model(path)
        Sequential(
          (0): Linear(in_features=2, out_features=3, bias=True)
          (1): ReLU()
        )
    """
    if (url := url_of(path)) is not None:
        with publishing(url) as local:
            save_model(model, local)
        return remote_path(url)
    path = local_path(path)
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise SaveError(f"{path}: a {kind} is not an nn.Module. For a state_dict, try: save_state(state, path)")
    try:
        if path.suffix in PICKLED:
            save_pickled(model, path)
        elif path.suffix == ".safetensors":
            description = describe_model(model)
            tree = json.dumps(description.data, separators=(",", ":"), allow_nan=False)
            write_safetensors(path, MemorySource(description.state, {KEY: tree}))
        else:
            raise SaveError(f"the suffix does not name a format. Try: {_SUFFIXES}")
    except SaveError as error:
        raise _named(error, path) from error.__cause__
    return path


def load_model(
    path: str | os.PathLike[str], *, part: str | None = None, trust: Trusted = (), rename: Renames | None = None
) -> nn.Module:
    """Open a whole model. No constructor is called and nothing is initialised.

    The classes of torch.nn and of torchvision's models are trusted. Everything else has to be named; whatever the file
    asks for besides is listed in the error, and none of it is imported or run.

    Args:
        path: What `save_model` or `torch.save(model)` wrote, under any name: the first bytes tell the format.
        part: Where the model is in a checkpoint such as `{"model": model, "ema": ema}`, `"ema"`. Needed where there are
            several.
        trust: Packages by name (`"timm"`) and classes themselves; a class also answers for `__main__.<its name>`.
        rename: For a class that moved: its old dotted name -> the class, or its new dotted name.

    Returns:
        The model on the CPU, in the mode in which it was saved. The weights are mapped copy-on-write: they are
        read when they are used, and changing them never changes the file.

    Raises:
        FileNotFoundError: Nothing there.
        TrustError: Classes or functions that are not trusted, all of them; or that are not there any more.
        FormatError: The file is cut off, damaged or foreign, or holds a state and no model.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "model.pt"
        >>> torch.save(nn.Linear(2, 3), path)
        >>> load_model(path)
        Linear(in_features=2, out_features=3, bias=True)
    """
    if (url := url_of(path)) is not None:
        return _load_remote(url, part, trust, rename)
    path = local_path(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"there is no file {path}{in_home(path)}")
    if not path.is_file():
        line = "build the model, then load_state(model, path)"
        raise FormatError(f"{path} is a directory; a whole model is one file. Try: {line}")
    try:
        if not _is_safetensors(path):
            return load_pickled(path, part, trust, rename)
        if part is not None:
            raise FormatError(f"a safetensors file holds one model, not a part {part!r}. Try: load_model without part=")
        return _load_safetensors(path, trust, rename)
    except (FormatError, TrustError) as error:
        raise _named(error, path) from error.__cause__


def _load_remote(url: str, part: str | None, trust: Trusted, rename: Renames | None) -> nn.Module:
    mirror = Mirror(url)
    try:
        with open(mirror.path, "rb") as file:
            fetch(file.fileno())
        return load_model(mirror.path, part=part, trust=trust, rename=rename)
    except (FormatError, TrustError) as error:
        raise type(error)(str(error).replace(str(mirror.path), shown(url))) from None
    finally:
        mirror.close()  # what is mapped stays readable


def _is_safetensors(path: Path) -> bool:
    """Whether the first bytes, or else the suffix, say that this is a safetensors file."""
    with open(path, "rb") as file:
        start = file.read(9)
    return start[8:] == b"{" or path.suffix == ".safetensors"


def _load_safetensors(path: Path, trust: Trusted, rename: Renames | None) -> nn.Module:
    with SafetensorsSource(path) as source:
        data = read_tree(source.header.metadata)
        if data is None:
            kind = "run" if RUN in source.header.metadata else "state"
            raise FormatError(f"it holds a {kind}, not a whole model: build the model, then load_state(model, path)")
        return build(data, trust, rename, _mapped(source))


def _mapped(source: SafetensorsSource) -> Mapping[str, torch.Tensor]:
    """Every stored tensor, over the file's own pages; the first write to a page copies it."""
    values: dict[str, torch.Tensor] = {}
    pages: mmap.mmap | None = None
    for key in source.stored:
        entry, region = source[key], source.region(key)
        if not region.nbytes:
            values[key] = torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
            continue
        pages = pages or mmap.mmap(region.fd, 0, access=mmap.ACCESS_COPY)
        count = region.nbytes // entry.dtype.itemsize
        values[key] = torch.frombuffer(pages, dtype=entry.dtype, count=count, offset=region.offset).view(entry.shape)
    return values


def _named(error: ModsurgError, path: Path) -> ModsurgError:
    text = str(error)
    return error if text.startswith(str(path)) else type(error)(f"{path}: {text}")
