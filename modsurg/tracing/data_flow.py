"""Which module makes a tensor, and what uses it: read from one forward on meta."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from modsurg.tracing.inputs import arguments, dtypes_to_try, forked_random
from modsurg.tracing.trace import shadow
from modsurg.tree.walk import walk

# Asking for these of a tensor does not use its values.
_FACTS = frozenset(
    ("__get__", "__len__", "dim", "ndimension", "size", "stride", "numel", "nelement", "element_size", "get_device")
) | {"is_contiguous", "is_complex", "is_floating_point", "is_signed", "storage_offset"}


@dataclass(frozen=True, slots=True)
class ModuleCall:
    """One call of a module.

    Attributes:
        path: The module's first path.
        inputs: The tensors that it was given.
        outputs: The tensors that it returned.
    """

    path: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@dataclass
class DataFlow:
    """What one forward did with its tensors. All of them are on meta.

    Attributes:
        calls: Of every module, in the order in which they ended.
        outputs: What the model returned.
        uses: How often each tensor was an argument of a function of torch, by `id`.
    """

    calls: list[ModuleCall] = field(default_factory=list)
    outputs: tuple[Tensor, ...] = ()
    uses: Counter[int] = field(default_factory=Counter)


def record_data_flow(model: nn.Module, example: object) -> DataFlow:
    """Run a copy of the model on meta in evaluation mode, and record its tensors; the model is only read.

    Args:
        model: Any module.
        example: What forward takes, or a shape.

    Raises:
        Exception: What forward raises, where it does not run.
    """
    failure: Exception | None = None
    for dtypes in dtypes_to_try(example):
        copied = shadow(model).eval()
        try:
            with forked_random():
                args, kwargs = arguments(example, copied, dtypes)
                return _run(copied, args, kwargs)
        except Exception as error:
            failure = failure or error
    assert failure is not None
    raise failure


class _Uses(TorchFunctionMode):
    def __init__(self, flow: DataFlow) -> None:
        super().__init__()
        self._flow = flow
        self._held: list[Tensor] = []  # so that no id is given to a second tensor

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") not in _FACTS:
            for tensor in _tensors((args, kwargs)):
                self._flow.uses[id(tensor)] += 1
                self._held.append(tensor)
        return func(*args, **(kwargs or {}))


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> DataFlow:
    flow = DataFlow()
    tree = walk(model)

    def record(path: str, module: nn.Module, given: Any, named: Any, made: Any) -> None:
        flow.calls.append(ModuleCall(path, tuple(_tensors((given, named))), tuple(_tensors(made))))

    for module in model.modules():
        module.register_forward_hook(partial(record, tree.paths[id(module)][0]), with_kwargs=True)
    args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
    with torch.no_grad(), _Uses(flow):
        flow.outputs = tuple(_tensors(model(*args, **kwargs)))
    return flow


def _tensors(value: object) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
