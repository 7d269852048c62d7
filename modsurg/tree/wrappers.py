"""Modules that hold another model inside them: torch.compile, DDP, FSDP, TorchScript."""

import sys

from torch import nn


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside a torch.compile wrapper; any other model as it is.

    Example:
        >>> import torch
        >>> model = nn.Linear(2, 2)
        >>> unwrap(torch.compile(model)) is model
        True
    """
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    while dynamo is not None and isinstance(model, dynamo.OptimizedModule):
        model = model._modules["_orig_mod"]
    return model


def wrapper_kind(module: nn.Module) -> str | None:
    """Which wrapper that owns its parameters this module is: "DDP", "FSDP", "FSDP2", "ScriptModule" or None.

    Example:
        >>> import torch
        >>> wrapper_kind(torch.jit.script(nn.Linear(2, 2)))
        'ScriptModule'
    """
    for base in type(module).__mro__:
        if (base.__module__, base.__name__) in _KINDS:
            return _KINDS[base.__module__, base.__name__]
    return None


_KINDS = {
    ("torch.nn.parallel.distributed", "DistributedDataParallel"): "DDP",
    ("torch.nn.parallel.data_parallel", "DataParallel"): "DataParallel",
    ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel"): "FSDP",
    ("torch.distributed.fsdp._fully_shard._fully_shard", "FSDPModule"): "FSDP2",
    ("torch.distributed._composable.fsdp.fully_shard", "FSDPModule"): "FSDP2",
    ("torch.jit._script", "ScriptModule"): "ScriptModule",
}
