"""Several processes under torchrun: who is who, who has which part of the data, what they agree on."""

import atexit
import gc
import os
import sys
import threading
import weakref
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, Literal, TypeGuard

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from modsurg.errors import BatchError, TrainingError, counted, listed
from modsurg.training.data import length, parts, rebuilt

Strategy = Literal["ddp", "fsdp"]

_PATIENCE = 10.0

_made: list[weakref.ref[Any]] = []


def join(device: torch.device) -> int:
    """Join the process group that torchrun describes; returns how many processes there are, 1 without torchrun."""
    if not dist.is_available() or (int(os.environ.get("WORLD_SIZE", "1")) == 1 and not dist.is_initialized()):
        return 1
    if not dist.is_initialized():
        import torch.distributed.nn  # noqa: F401  # whose functions take a group that is there as default, and keep it

        dist.init_process_group(backend=dist.get_default_backend_for_device(device))
        asked = threading.Event()
        leaver = threading.Thread(target=_destroy, args=(asked,), daemon=True)
        leaver.start()  # an interpreter that ends starts no thread any more
        atexit.register(_leave, asked, leaver)
    return dist.get_world_size()


def _leave(asked: threading.Event, leaver: threading.Thread) -> None:
    """Leave the group that `join` made, and wait for its threads, while the interpreter is still whole.

    A thread of gloo's that lets go of its last tensor later than that takes the process down (SIGABRT). The threads end
    with the last holder of the group, so what was made here to hold it is emptied. After an error nothing is waited
    for, and else not for long: the other processes may never do their part of what is under way. (Before 2.8, torch
    waits for them with Python's lock held, whatever is done here.)
    """
    if not dist.is_initialized() or hasattr(sys, "last_value"):
        return
    asked.set()
    leaver.join(_PATIENCE)


def _destroy(asked: threading.Event) -> None:
    asked.wait()
    _let_go()
    dist.destroy_process_group()  # last: it alone waits without Python's lock, from torch 2.8 on


def _let_go() -> None:
    made = [holder for holder in (one() for one in _made) if holder is not None]
    meshes = {id(holder) for holder in made}
    for one in gc.get_objects():
        if type(one).__name__ == "FSDPMeshInfo" and id(vars(one).get("mesh")) in meshes:
            made.append(one)
    for holder in made:
        vars(holder).clear()


def rank() -> int:
    """This process's number; 0 is the one that writes."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def local_device(device: torch.device) -> torch.device:
    """Of several accelerators in a machine, the one for this process."""
    local = os.environ.get("LOCAL_RANK")
    if device.type == "cpu" or device.index is not None or local is None:
        return device
    device = torch.device(device.type, int(local))
    torch.accelerator.set_device_index(device.index)
    return device


def parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """Wrap a model for data-parallel training."""
    ids = None if device.type == "cpu" else [device.index]
    wrapper = nn.parallel.DistributedDataParallel(model, device_ids=ids)
    _made.append(weakref.ref(wrapper))
    return wrapper


def trained(model: nn.Module) -> list[bool]:
    """Of each parameter, whether it trains."""
    return [p.requires_grad for p in model.parameters()]


def watch(runner: nn.Module) -> None:
    """Let a runner remember that it was called."""
    runner.register_forward_pre_hook(lambda module, inputs: module.__dict__.update(called=True))


def check_forward(runner: nn.Module, where: object) -> None:
    """Refuse a loss that did not come through the runner, which joins the gradients of all processes.

    Raises:
        TrainingError: With the call that goes through it.
    """
    if not runner.__dict__.pop("called", False):
        fix = "call trainer.runner(inputs), or epoch.forward(batch)"
        raise TrainingError(f"{where}: the model was called itself, so that each process would train alone: {fix}.")


def check_gradients(model: nn.Module, where: object) -> None:
    """Refuse a backward pass that left a parameter without a gradient: DDP joins none before it has them all.

    Raises:
        TrainingError: With their names.
    """
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if without:
        fix = 'modsurg.freeze(model, "...") what the loss does not depend on'
        raise TrainingError(f"{where}: {listed(without, 1)} got no gradient, and DDP waits for one: {fix}.")


def check_loss(loss: object, optimizer: Optimizer) -> None:
    """Refuse a loss with parameters that train: nobody would join their gradients.

    Raises:
        TrainingError: With what to do instead.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    own = [name for name, p in loss.named_parameters() if id(p) in held] if isinstance(loss, nn.Module) else []
    if own:
        fix = "make it a part of the model, whose forward gives its value to the loss"
        raise TrainingError(f"{own[0]} of the loss would train alone in each process: {fix}.")


def check_sharding(device: torch.device, precision: str, average: object) -> None:
    """Refuse what does not go with sharding.

    Raises:
        TrainingError: With what to do instead.
    """
    if device.type == "cpu" and torch.__version__ < "2.9":
        text = "before torch 2.9, fully_shard adds up the gradients of the processes on a cpu instead of averaging them"
        raise TrainingError(f'{text}: strategy="ddp".')
    if precision == "fp16":
        raise TrainingError('strategy="fsdp" has no gradient scaler: precision="bf16".')
    if average is not None:
        raise TrainingError('strategy="fsdp" can\'t average a sharded model: average=None, or strategy="ddp".')


def shard(model: nn.Module, optimizer: Optimizer, device: torch.device) -> None:
    """Spread the model over the processes (FSDP2), each block of its lists by itself, and point the optimizer there.

    Raises:
        TrainingError: The optimizer has a state already, which can't be spread.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if optimizer.state:
        raise TrainingError('strategy="fsdp" needs an optimizer that has made no step: make a new one.')
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [[names.get(id(p)) for p in group["params"]] for group in optimizer.param_groups]
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    _made.append(weakref.ref(mesh))
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for block in module:
                fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    sharded = dict(model.named_parameters())
    for group, members in zip(optimizer.param_groups, groups, strict=True):
        group["params"] = [
            p if name is None else sharded[name] for p, name in zip(group["params"], members, strict=True)
        ]


def share_of(loader: Iterable[Any]) -> Iterable[Any]:
    """This process's part of a validation loader: no sample twice and none left out, so not always as many for each.

    The samples of a DataLoader are those that the sampler of the first process draws; a sampler that is distributed
    already stays. Of anything else each process takes every n-th batch.
    """
    world = dist.get_world_size()
    if _is_distributed(loader):
        return loader
    if not _by_sampler(loader):
        return islice(loader, rank(), None, world)
    sampler = _sampler(loader)
    order = range(len(sampler)) if type(sampler) is SequentialSampler else gathered(list(sampler))[0]
    return _dealt(loader, order[rank() :: world])


def divided(loader: Iterable[Any], seed: int) -> Iterable[Any]:
    """This process's part of a training loader.

    The samples of a DataLoader are dealt out by a DistributedSampler, so that its batch size is that of one process; a
    sampler that is distributed already stays. Of anything else each process takes every n-th batch.

    Raises:
        BatchError: A sampler whose order would be lost.
    """
    if _is_distributed(loader):
        return loader
    if not _by_sampler(loader):
        return Turns(loader)
    sampler, data = _sampler(loader), loader.dataset
    shuffle = type(sampler) is RandomSampler
    plain = type(sampler) is SequentialSampler or (shuffle and not sampler.replacement)
    if not plain or len(sampler) != length(data):
        kind, fix = type(sampler).__name__, "sampler=DistributedSampler(dataset)"
        if sampler is loader.batch_sampler:
            fix = f"batch_sampler={kind}(DistributedSampler(dataset), ...), whose `sampler` is that one"
        raise BatchError(f"train_loader: {kind} gives every process all of its samples: {fix}.")
    drop_last = getattr(loader.batch_sampler, "drop_last", False)
    return _dealt(loader, DistributedSampler(data, shuffle=shuffle, seed=seed, drop_last=drop_last))


def _by_sampler(loader: object) -> TypeGuard[DataLoader[Any]]:
    return type(loader) is DataLoader and not isinstance(loader.dataset, IterableDataset)


def _sampler(loader: DataLoader[Any]) -> Any:
    """What says a loader's order: its sampler, or a batch sampler of the user's own."""
    batches = loader.batch_sampler
    if batches is None:
        return loader.sampler
    return batches.sampler if type(batches) is BatchSampler else batches


def _is_distributed(loader: object) -> bool:
    return any(hasattr(part, "num_replicas") for part in parts(loader))


def _dealt(loader: DataLoader[Any], order: Any) -> DataLoader[Any]:
    """The loader over a part of its order."""
    batches = loader.batch_sampler
    if batches is None:
        return rebuilt(loader, loader.dataset, sampler=order, batch_size=None)
    if type(batches) is not BatchSampler:
        return rebuilt(loader, loader.dataset, batch_sampler=order)
    return rebuilt(loader, loader.dataset, sampler=order, batch_size=batches.batch_size, drop_last=batches.drop_last)


class Turns:
    """Every n-th batch of a loader, as many for each process; those that do not go round are left out."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.world = dist.get_world_size()
        batches = length(loader)
        if batches is not None and batches < self.world:
            raise BatchError(
                f"{counted(batches, 'batch', 'batches')} for {self.world} processes: each needs one at least."
            )

    def __len__(self) -> int:
        return len(self.loader) // self.world

    def __getattr__(self, name: str) -> Any:
        if name == "loader":
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __iter__(self) -> Iterator[Any]:
        rounds = zip(*[iter(self.loader)] * self.world, strict=False)
        return (batches[rank()] for batches in rounds)


def summed(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """Add up numbers over all processes."""
    if not (dist.is_available() and dist.is_initialized()):
        return values
    dtype = torch.float32 if device.type == "mps" else torch.float64
    numbers = torch.tensor(list(values.values()), dtype=dtype, device=device)
    try:
        dist.all_reduce(numbers)
    except RuntimeError as error:
        raise farewell(error) from error
    return dict(zip(values, numbers.tolist(), strict=True))


def any_of(flag: bool, device: torch.device) -> bool:
    """Whether the flag is up in any process."""
    return summed({"flag": float(flag)}, device)["flag"] > 0


def gathered(value: Any) -> list[Any]:
    """The values of all processes, by rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def lost(error: BaseException) -> bool:
    """Whether an error says that another process is gone.

    Example:
        >>> lost(RuntimeError("Connection closed by peer [127.0.0.1]:4711"))
        True
    """
    words = ("connection closed by peer", "connection reset by peer", "broken pipe", "timed out", "timeout")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


def farewell(error: BaseException) -> TrainingError:
    """What a process says that can't go on because another one is gone."""
    return TrainingError(
        f"process {rank()}: another process of this run has ended, so this one ends too. Start all of them again with "
        f"fit(..., resume=True) to go on from the last checkpoint. ({str(error).splitlines()[0][:160]})"
    )
