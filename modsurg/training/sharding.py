"""A sharded run (FSDP2) in files: torch.distributed.checkpoint writes the parts, a small file beside them the rest."""

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modsurg.checkpoints.runs import Run, restore, save_checkpoint
from modsurg.training import processes

if TYPE_CHECKING:
    from modsurg.training.keeping import Interrupted
    from modsurg.training.trainer import Trainer

OWN = "run.safetensors"


def save(trainer: "Trainer", path: str | os.PathLike[str], own: dict[str, Any]) -> None:
    """Write a directory; all processes take part."""
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.checkpoint.state_dict_saver import save as write

    model, optimizer = get_state_dict(trainer.model, trainer.optimizer)
    write({"model": model, "optimizer": optimizer}, checkpoint_id=os.fspath(path))
    if processes.rank() == 0:
        save_checkpoint(Path(path) / OWN, step=trainer.step, trainer=own, **_small(trainer))


def load(trainer: "Trainer", path: Path, run: Run) -> None:
    """Set a model, sharded or whole, and its optimizer from a directory; all processes take part."""
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load as read

    model, optimizer = get_state_dict(trainer.model, trainer.optimizer)
    state: dict[str, Any] = {"model": model, "optimizer": optimizer}
    read(state, checkpoint_id=os.fspath(path), no_dist=trainer.world == 1)
    restore(run, _small(trainer))
    set_state_dict(
        trainer.model, trainer.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )


def rotate(trainer: "Trainer", directory: Path, left: "Interrupted | None", improved: bool) -> None:
    """Write a new directory, point `last` (and `best`) to it, and remove those that nobody points to."""
    from modsurg.training import keeping

    name = f"sharded-{trainer.step:08d}" + (f"-{left.samples}" if left else "")
    keeping.save(trainer, directory / name, left)
    processes.gathered(None)
    if processes.rank():
        return
    links = ["last", *(["best"] if improved else [])]
    for link in links:
        temporary = directory / f".{link}.{os.getpid()}"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(name)
        os.replace(temporary, directory / link)
    kept = {os.readlink(directory / link) for link in ("last", "best") if (directory / link).is_symlink()}
    others = sorted(path.name for path in directory.glob("sharded-*") if path.name not in kept)
    for old in others[: -trainer.keep or None]:
        shutil.rmtree(directory / old)


def _small(trainer: "Trainer") -> dict[str, Any]:
    from modsurg.training.keeping import stateful

    return {name: value for name, value in stateful(trainer).items() if name not in ("model", "optimizer", "average")}
