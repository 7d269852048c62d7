"""Whole models as torch.save writes them. The pickle is read as data; `structure.build` makes the model of it."""

import mmap
from collections.abc import Mapping
from pathlib import Path
from pickle import PickleError
from typing import Final

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from modsurg.checkpoints.formats.atomic import pending
from modsurg.checkpoints.formats.torch_save.find_state import find_models
from modsurg.checkpoints.formats.torch_save.module import PickledTree, module_tree
from modsurg.checkpoints.formats.torch_save.reader import open_torch
from modsurg.checkpoints.formats.torch_save.tensors import Stored, TorchFile
from modsurg.errors import FormatError, SaveError, TrustError, counted
from modsurg.structure.build import build, describe
from modsurg.structure.describe import children_first
from modsurg.structure.encode import slots
from modsurg.structure.trust import Renames, Trusted
from modsurg.tree.wrappers import unwrap, wrapper_kind

PICKLED: Final = (".pt", ".pth", ".bin")


def load_pickled(path: Path, part: str | None, trust: Trusted, rename: Renames | None) -> nn.Module:
    """Open what `torch.save(model)` wrote; see `load_model`."""
    with open(path, "rb") as file:
        opened = open_torch(file.fileno(), path)
        tree = _read_tree(opened, part)
        return build(tree.data, trust, rename, _map_tensors(opened, tree.tensors))


def save_pickled(model: nn.Module, path: Path) -> None:
    """Write a model with torch.save; before the file takes its name, see that `load_pickled` will open it."""
    model = unwrap(model)
    children_first(model)  # refuses one that holds itself
    for name, module in model.named_modules():
        if wrapper_kind(module) is not None:
            describe(model)  # says what to save in its place
        if slots(type(module)):
            what = f"{name or 'the model'} has __slots__, which torch leaves out of a pickle"
            raise SaveError(f"{what}: save it as {path.stem}.safetensors")
    describe(model)  # says by its path what no file may hold
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
        line = (
            f'load_model(path, part="{next(iter(models))}")'
            if models
            else "build the model, then load_state(model, path)"
        )
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
