"""Modules whose statistics are frozen: they stay in evaluation mode, whatever `model.train()` says."""

from torch import nn


class EvalLock:
    """Stands in for a module's `train` method and keeps the module in evaluation mode.

    An instance attribute of the module, so that the class, its repr and its state_dict stay what they are and forward
    costs nothing. It deep-copies and pickles with the module.

    Attributes:
        module: The module that is held.
        mode: The mode that was last asked for; the module takes it when it is let go.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.mode = module.training

    def __call__(self, mode: bool = True) -> nn.Module:
        """Take note of the mode and hand it on to the children; the module itself stays in evaluation mode."""
        self.mode = mode
        if held(self.module) is self:  # not so where a copy.copy of the module shares this, and the module was let go
            self.module.training = False
        for child in self.module.children():
            child.train(mode)
        return self.module

    def __repr__(self) -> str:
        return "held in evaluation mode (modsurg.unfreeze lets it go)"


def held(module: nn.Module) -> EvalLock | None:
    """What holds `module` in evaluation mode, if it is held."""
    holder = module.__dict__.get("train")
    return holder if isinstance(holder, EvalLock) else None


def hold(module: nn.Module) -> None:
    """Keep `module` in evaluation mode until `release`.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> hold(norm)
        >>> nn.Sequential(norm).train()[0].training
        False
        >>> release(norm)
        >>> norm.training
        True
    """
    if held(module) is None:
        module.__dict__["train"] = EvalLock(module)
    module.training = False


def release(module: nn.Module) -> None:
    """Give `module` its `train` method back, and the mode that was last asked for."""
    holder = held(module)
    if holder is not None:
        del module.__dict__["train"]
        module.training = holder.mode


def mode(module: nn.Module) -> bool:
    """The mode that was asked for: `module.training`, unless the module is held."""
    holder = held(module)
    return module.training if holder is None else holder.mode
