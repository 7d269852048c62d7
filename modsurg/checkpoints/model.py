"""Whole models in one file, structure and weights, opened without running what the caller did not trust."""

import json
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from pickle import PickleError
from typing import Final

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from modsurg.checkpoints.formats.atomic import in_home, pending
from modsurg.checkpoints.formats.documents import RUN
from modsurg.checkpoints.formats.memory import MemorySource
from modsurg.checkpoints.formats.remote import Mirror, fetch, local_path, publishing, remote_path, url_of
from modsurg.checkpoints.formats.safetensors.source import SafetensorsSource, write_safetensors
from modsurg.checkpoints.formats.torch_save.find_state import find_models
from modsurg.checkpoints.formats.torch_save.module import PickledTree, module_tree
from modsurg.checkpoints.formats.torch_save.reader import open_torch
from modsurg.checkpoints.formats.torch_save.tensors import Stored, TorchFile
from modsurg.errors import FormatError, ModsurgError, SaveError, TrustError, counted
from modsurg.structure.build import build, describe
from modsurg.structure.encode import slots
from modsurg.structure.schema import KEY, read_tree
from modsurg.structure.trust import Renames, Trusted
from modsurg.tree.wrappers import unwrap

_PICKLED: Final = (".pt", ".pth", ".bin")
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
        if path.suffix in _PICKLED:
            _save_pickled(model, path)
        elif path.suffix == ".safetensors":
            description = describe(model)
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
        with Mirror(url) as mirror, open(mirror.path, "rb") as file:
            fetch(file.fileno())
            return load_model(mirror.path, part=part, trust=trust, rename=rename)
    path = local_path(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"there is no file {path}{in_home(path)}")
    if not path.is_file():
        line = "build the model, then load_state(model, path)"
        raise FormatError(f"{path} is a directory; a whole model is one file. Try: {line}")
    try:
        if not _is_safetensors(path):
            return _load_pickled(path, part, trust, rename)
        if part is not None:
            raise FormatError(f"a safetensors file holds one model, not a part {part!r}. Try: load_model without part=")
        return _load_safetensors(path, trust, rename)
    except (FormatError, TrustError) as error:
        raise _named(error, path) from error.__cause__


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
        return build(data, trust, rename, _map_source(source))


def _map_source(source: SafetensorsSource) -> Mapping[str, torch.Tensor]:
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


def _load_pickled(path: Path, part: str | None, trust: Trusted, rename: Renames | None) -> nn.Module:
    """Open what `torch.save(model)` wrote; see `load_model`."""
    with open(path, "rb") as file:
        opened = open_torch(file.fileno(), path)
        tree = _read_tree(opened, part)
        return build(tree.data, trust, rename, _map_tensors(opened, tree.tensors))


def _save_pickled(model: nn.Module, path: Path) -> None:
    """Write a model with torch.save; before the file takes its name, see that `load_model` will open it."""
    model = unwrap(model)
    describe(model)  # says by its path what no file may hold
    for name, module in model.named_modules():
        if slots(type(module)):
            what = f"{name or 'the model'} has __slots__, which torch leaves out of a pickle"
            raise SaveError(f"{what}: save it as {path.stem}.safetensors")
    tensors = (each for each in (*model.parameters(), *model.buffers()) if not is_lazy(each))
    with pending(path, sum(each.nbytes for each in tensors if each.layout is torch.strided)) as file:
        try:
            torch.save(model, file)  # type: ignore[arg-type]  # it only calls write and flush
        except (PickleError, AttributeError, TypeError, RuntimeError) as error:
            if file.failure is not None:
                raise file.failure from error
            raise SaveError(f"torch can't pickle it ({error}): save it as {path.stem}.safetensors") from error
        _check_written(file.temporary, path)
        file.commit()


def _check_written(written: Path, path: Path) -> None:
    """Check that somebody who trusts all of its classes can open what was written; the weights are not read."""
    try:
        with open(written, "rb") as file:
            data = _read_tree(open_torch(file.fileno(), written), None).data
            build(data, [name.replace(":", ".") for name in data["names"]])
    except (FormatError, TrustError) as error:
        raise SaveError(
            f"a pickle of it could not be opened again: {error}. Save it as {path.stem}.safetensors"
        ) from error


def _read_tree(opened: TorchFile, part: str | None) -> PickledTree:
    models = find_models(opened.pickle.value, part)
    if len(models) != 1:
        places = f"{counted(len(models), 'model', 'models')}: {', '.join(models)}" if models else "no model"
        line = "build the model, then load_state(model, path)"
        if models:
            line = f'load_model(path, part="{next(iter(models))}")'
        raise FormatError(f"it holds {places}. Try: {line}")
    (root,) = models.values()
    tree = module_tree(root)
    if tree.problems:
        listed = "\n".join(f"  {problem}" for problem in tree.problems)
        count = counted(len(tree.problems), "value is", "values are")
        raise TrustError(f"{count} not what a file may hold; nothing of it ran.\n{listed}")
    return tree


def _map_tensors(opened: TorchFile, tensors: Mapping[str, Stored]) -> dict[str, torch.Tensor]:
    """The tensors over the file's own pages; the first write to a page copies it."""
    storages: dict[str, torch.UntypedStorage] = {}
    pages: mmap.mmap | None = None
    values: dict[str, torch.Tensor] = {}
    for name, stored in tensors.items():
        region, key = opened.place(stored.storage), stored.storage.key
        if stored.nbytes > region.nbytes:
            raise FormatError(f"{name} repeats the {region.nbytes:,} bytes of its storage")
        plain = not (opened.swaps(stored) or stored.conj or stored.neg)
        if not plain or not stored.numel or region.offset % stored.dtype.itemsize:
            values[name] = opened.read(stored)
            continue
        if key not in storages:
            pages = pages or mmap.mmap(region.fd, 0, access=mmap.ACCESS_COPY)
            whole = torch.frombuffer(pages, dtype=torch.uint8, count=region.nbytes, offset=region.offset)
            storages[key] = whole.untyped_storage()
        empty = torch.empty(0, dtype=stored.dtype, device="cpu")
        first = stored.storage.start + stored.offset
        values[name] = empty.set_(storages[key], first, stored.shape, stored.stride)
    return values


def _named(error: ModsurgError, path: Path) -> ModsurgError:
    text = str(error)
    return error if text.startswith(str(path)) else type(error)(f"{path}: {text}")
