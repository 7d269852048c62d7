"""Modules that hold another model inside them: torch.compile, DDP, FSDP, TorchScript."""

import sys

from torch import nn

from modsurg.errors import WhereError


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside a torch.compile wrapper; any other model as it is.

    Raises:
        WhereError: It is not a module.

    Example:
        >>> import torch
        >>> model = nn.Linear(2, 2)
        >>> unwrap(torch.compile(model)) is model
        True
    """
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    while dynamo is not None and isinstance(model, dynamo.OptimizedModule):
        model = model._modules["_orig_mod"]
    if not isinstance(model, nn.Module):
        made = f"a {type(model).__name__}" if not isinstance(model, type) else f"the class {model.__name__}"
        raise WhereError(f"the model is {made}, not an nn.Module object; the model comes first, `where` second.")
    return model


def wrapper_kind(module: nn.Module) -> str | None:
    """Which wrapper that owns its parameters this module is: "DDP", "FSDP", "FSDP2", "ScriptModule" or None.

    Example:
        >>> import torch
        >>> wrapper_kind(torch.jit.script(nn.Linear(2, 2)))
        'ScriptModule'
    """
    for base in type(module).__mro__:
        package, kind = _KINDS.get(base.__name__, ("", ""))
        if package and base.__module__.startswith(package):
            return kind
    return None


_KINDS = {
    "DistributedDataParallel": ("torch.nn.parallel", "DDP"),
    "DataParallel": ("torch.nn.parallel", "DataParallel"),
    "FullyShardedDataParallel": ("torch.distributed", "FSDP"),
    "FSDPModule": ("torch.distributed", "FSDP2"),
    "ScriptModule": ("torch.jit", "ScriptModule"),
}
