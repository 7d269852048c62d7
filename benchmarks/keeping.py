"""What keeping costs: states of one size and whole models, saved, opened and converted; page cache warm."""

import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.harness import Table, Way, extra_memory, fresh, interleaved, there
from modsurg import load_model, load_state, save_model, save_state

MEGABYTES = 400
SPARSE = """
import json, pathlib, sys, tempfile, subprocess, time
size, tensors = 8192 * 8192 * 2, 745
header = {f"layers.{n}.weight": {"dtype": "BF16", "shape": [8192, 8192], "data_offsets": [n * size, (n + 1) * size]}
          for n in range(tensors)}
text = json.dumps(header).encode()
with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder, "big.safetensors")
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + tensors * size)
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", CODE, str(file)], stdout=subprocess.DEVNULL, check=True)
    print(time.perf_counter() - start)
"""
CONVERT = """
import resource, sys, tempfile, time
from pathlib import Path
import torch
from modsurg import convert, save_state
from benchmarks.harness import extra_memory
with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    save_state({f"w{n}": torch.ones(25 << 20) for n in range(20)}, folder / SOURCE)
    print(extra_memory(lambda: convert(folder / SOURCE, folder / TARGET)))
"""


def model_of(megabytes: int) -> nn.Module:
    """Matrices of 4 MB."""
    return nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(megabytes // 4)))


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """A parameter's own memory."""
    return memoryview(tensor.detach().numpy()).cast("B")


def write_raw(path: Path, model: nn.Module) -> None:
    """The same bytes without a format."""
    with path.open("wb", buffering=0) as file:
        for tensor in model.parameters():
            file.write(bytes_of(tensor))
        os.fsync(file.fileno())


def read_raw(path: Path, model: nn.Module) -> None:
    """The same bytes into the parameters' own memory, by two threads."""
    tensors = list(model.parameters())
    ends = torch.tensor([0, *(tensor.nbytes for tensor in tensors)]).cumsum(0).tolist()

    def read(half: int) -> None:
        fd = os.open(path, os.O_RDONLY)
        for tensor, start in list(zip(tensors, ends, strict=False))[half::2]:
            os.preadv(fd, [bytes_of(tensor)], start)
        os.close(fd)

    threads = [threading.Thread(target=read, args=(half,)) for half in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def savers(folder: Path, model: nn.Module) -> dict[str, Way]:
    """Ways to save, each to a place of its own."""
    import torch.distributed.checkpoint as dcp

    ways: dict[str, Way] = {
        "save_state .safetensors": lambda: save_state(model, folder / "a.safetensors"),
        "raw write and fsync": lambda: write_raw(folder / "raw", model),
        "save_state .pt": lambda: save_state(model, folder / "a.pt"),
        "safetensors.save_file, no fsync": lambda: save_file(model.state_dict(), folder / "b.safetensors"),
        "torch.save, no fsync": lambda: torch.save(model.state_dict(), folder / "b.pt"),
        "DCP save": lambda: dcp.save(model.state_dict(), checkpoint_id=folder / "dcp"),
    }
    if there("huggingface_hub"):
        from huggingface_hub import save_torch_model

        (folder / "hub").mkdir()
        ways["huggingface_hub.save_torch_model, no fsync"] = lambda: save_torch_model(model, folder / "hub")
    if there("accelerate"):
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        ways["accelerate save_model, no fsync"] = lambda: accelerator.save_model(model, folder / "accelerate")
    return ways


def loaders(folder: Path, model: nn.Module) -> dict[str, Way]:
    """Ways to load what `savers` wrote."""
    import torch.distributed.checkpoint as dcp

    ways: dict[str, Way] = {
        "load_state .safetensors": lambda: load_state(model, folder / "a.safetensors"),
        "preadv into the parameters": lambda: read_raw(folder / "raw", model),
        "load_file + load_state_dict": lambda: model.load_state_dict(load_file(folder / "a.safetensors")),
        "load_state .pt": lambda: load_state(model, folder / "a.pt"),
        "torch.load + load_state_dict": lambda: model.load_state_dict(torch.load(folder / "b.pt")),
        "DCP load": lambda: dcp.load(model.state_dict(), checkpoint_id=folder / "dcp"),
    }
    if there("huggingface_hub"):
        from huggingface_hub import load_torch_model

        ways["huggingface_hub.load_torch_model"] = lambda: load_torch_model(model, folder / "hub")
    if there("accelerate"):
        from accelerate import load_checkpoint_in_model

        ways["accelerate load_checkpoint_in_model"] = lambda: load_checkpoint_in_model(model, folder / "accelerate")
    return ways


def memory(title: str, ways: dict[str, Way], limit: float) -> Table:
    """The same ways, one call each, in megabytes."""
    return Table(f"{title}, extra memory", {name: [extra_memory(way)] for name, way in ways.items()}, limit, unit="MB")


def states(runs: int) -> list[Table]:
    """One state saved and loaded."""
    size, rest = f"{MEGABYTES} MB in {MEGABYTES // 4} tensors", ("raw write and fsync",)
    with tempfile.TemporaryDirectory() as name:
        folder, model = Path(name), model_of(MEGABYTES)
        save, load = savers(folder, model), loaders(folder, model)
        saved = interleaved(save, runs)
        loaded = interleaved(load, runs)
        note = "An xxh3 hash of every tensor is stored, in step with the write."
        tables = [Table(f"`save_state`, {size}", saved, 1.15, rest, note=note)]
        best = ("preadv into the parameters", "load_file + load_state_dict")
        tables.append(Table(f"`load_state`, {size}", _without(loaded, "load_state .pt"), 1.15, best))
        pickled = {way: loaded[way] for way in ("load_state .pt", "torch.load + load_state_dict")}
        tables.append(Table(f"`load_state` of a .pt file, {size}", pickled, 1 / 4, ("torch.load + load_state_dict",)))
        return [*tables, memory("`save_state`", save, 4.2), memory("`load_state`", load, 4.2)]


def _without(times: dict[str, list[float]], name: str) -> dict[str, list[float]]:
    return {way: values for way, values in times.items() if way != name}


def whole_models(runs: int) -> list[Table]:
    """A whole model opened."""
    return [_whole(name, runs) for name in ("resnet152", "vit_b_16")]


def _whole(name: str, runs: int) -> Table:
    build: Callable[[], nn.Module] = getattr(torchvision.models, name)
    with tempfile.TemporaryDirectory() as given:
        folder, model = Path(given), build()
        save_model(model, folder / "model.safetensors")
        torch.save(model, folder / "model.pt")
        ways: dict[str, Way] = {
            "load_model": lambda: load_model(folder / "model.safetensors"),
            "constructor + load_state_dict": lambda: build().load_state_dict(load_file(folder / "model.safetensors")),
            "torch.load of the pickle, mmap, unsafe": lambda: torch.load(
                folder / "model.pt", mmap=True, weights_only=False
            ),
        }
        times = interleaved(ways, runs)
    note = f"The pickle's ratio may be up to 1/1.5 of ours: {_ratio(times):.2f}."
    return Table(f"`load_model`, {name}", times, 1 / 8, ("constructor + load_state_dict",), note=note)


def _ratio(times: dict[str, list[float]]) -> float:
    table = Table("", times)
    return table.value_of("torch.load of the pickle, mmap, unsafe") / table.value_of("load_model")


def sparse(runs: int) -> list[Table]:
    """A file of 100 GB that takes no room on the disk, from the shell, python's start included."""
    codes = {
        "modsurg summary FILE": "from modsurg.cli import main; main(['summary', sys.argv[1]])",
        "read_state, all keys": "from modsurg import read_state; list(read_state(sys.argv[1]))",
    }
    times = fresh({name: f"CODE = {'import sys; ' + code!r}\n{SPARSE}" for name, code in codes.items()}, runs)
    note = (
        "safetensors' own `safe_open` maps the file whole, which a machine with less memory may refuse; so it did here."
    )
    return [Table("A safetensors file of 100 GB, from the shell", times, 0.5, note=note)]


def conversion(runs: int) -> list[Table]:
    """2 GB in tensors of 100 MB."""
    names = {".safetensors to .pt": ("a.safetensors", "b.pt"), ".pt to shards": ("a.pt", "b.safetensors.index.json")}
    names["safetensors to DCP"] = ("a.safetensors", "b")
    codes = {way: f"SOURCE, TARGET = {pair!r}\n{CONVERT}" for way, pair in names.items()}
    return [Table("`convert`, 2 GB in tensors of 105 MB, extra memory", fresh(codes, min(runs, 3)), 210, unit="MB")]


MEASUREMENTS = (states, whole_models, sparse, conversion)
QUICK = (states, whole_models, sparse)
