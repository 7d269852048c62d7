"""A sharded run (FSDP2) in files: torch.distributed.checkpoint writes the parts of the model and its optimizer."""

import itertools
import os
import shutil
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

OWN = "run.safetensors"


def free_name(directory: Path, step: int) -> str:
    """A directory that is not there yet: `last` may point to another of the same step, which has to outlive a kill."""
    names = (f"sharded-{step:08d}" + (f"-{again}" if again else "") for again in itertools.count())
    return next(name for name in names if not (directory / name).exists())


def save(path: str | os.PathLike[str], model: nn.Module, optimizer: Optimizer) -> None:
    """Write a directory; all processes take part."""
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.checkpoint.state_dict_saver import save as write

    weights, moments = get_state_dict(model, optimizer)
    write({"model": weights, "optimizer": moments}, checkpoint_id=os.fspath(path))


def load(path: Path, model: nn.Module, optimizer: Optimizer, *, alone: bool) -> None:
    """Set a model, sharded or whole, and its optimizer from a directory; all processes take part, if not `alone`."""
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load as read

    weights, moments = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": weights, "optimizer": moments}
    read(state, checkpoint_id=os.fspath(path), no_dist=alone)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def point(directory: Path, name: str, links: list[str], keep: int) -> None:
    """Let `last` and `best` be the new directory; remove those to which nothing points, but for the latest `keep`."""
    for link in links:
        temporary = directory / f".{link}.linking"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(name)
        os.replace(temporary, directory / link)
    kept = {os.readlink(directory / link) for link in ("last", "best") if (directory / link).is_symlink()}
    others = [path for path in directory.glob("sharded-*") if path.name not in kept]
    others.sort(key=lambda path: (path.stat().st_mtime_ns, path.name))
    for old in others[: -keep or None]:
        shutil.rmtree(old)
