"""Several processes under torchrun: which one this is, and what they agree on."""

import os
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from modsurg.errors import TrainingError, listed
from modsurg.training.process_exit import empty_at_exit, leave_at_exit

Strategy = Literal["ddp", "fsdp"]


def join_processes(device: torch.device) -> int:
    """Join the process group that torchrun describes; returns how many processes there are, 1 without torchrun."""
    if not dist.is_available() or (int(os.environ.get("WORLD_SIZE", "1")) == 1 and not dist.is_initialized()):
        return 1
    if not dist.is_initialized():
        import torch.distributed.nn  # noqa: F401  # whose functions take a group that is there as default, and keep it

        dist.init_process_group(backend=dist.get_default_backend_for_device(device))
        leave_at_exit()
    return dist.get_world_size()


def has_processes() -> bool:
    """Whether this process is one of a group."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Give this process's number; 0 is the one that writes."""
    return dist.get_rank() if has_processes() else 0


def local_device(device: torch.device) -> torch.device:
    """Of several accelerators in a machine, the one for this process."""
    local = os.environ.get("LOCAL_RANK")
    if device.type == "cpu" or device.index is not None or local is None:
        return device
    device = torch.device(device.type, int(local))
    torch.accelerator.set_device_index(device.index)
    return device


def wrap_in_ddp(model: nn.Module, device: torch.device) -> nn.Module:
    """Wrap a model for data-parallel training."""
    ids = None if device.type == "cpu" else [device.index]
    wrapper = nn.parallel.DistributedDataParallel(model, device_ids=ids)
    empty_at_exit(wrapper)
    return wrapper


def trainable(model: nn.Module) -> list[bool]:
    """Tell of each parameter whether it trains."""
    return [p.requires_grad for p in model.parameters()]


def watch_calls(runner: nn.Module) -> None:
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
    empty_at_exit(mesh)
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


def summed(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """Add up numbers over all processes."""
    if not has_processes():
        return values
    dtype = torch.float32 if device.type == "mps" else torch.float64
    numbers = torch.tensor(list(values.values()), dtype=dtype, device=device)
    try:
        dist.all_reduce(numbers)
    except RuntimeError as error:
        raise peer_lost_error(error) from error
    return dict(zip(values, numbers.tolist(), strict=True))


def any_of(flag: bool, device: torch.device) -> bool:
    """Whether the flag is up in any process."""
    return summed({"flag": float(flag)}, device)["flag"] > 0


def gathered(value: Any) -> list[Any]:
    """The values of all processes, by rank."""
    if not has_processes():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def is_peer_lost(error: BaseException) -> bool:
    """Whether an error says that another process is gone.

    Example:
        >>> is_peer_lost(RuntimeError("Connection closed by peer [127.0.0.1]:4711"))
        True
    """
    words = ("connection closed by peer", "connection reset by peer", "broken pipe", "timed out", "timeout")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


def peer_lost_error(error: BaseException) -> TrainingError:
    """Give the error of a process that can't go on because another one is gone."""
    return TrainingError(
        f"process {rank()}: another process of this run has ended, so this one ends too. Start all of them again with "
        f"fit(..., resume=True) to go on from the last checkpoint. ({str(error).splitlines()[0][:160]})"
    )
