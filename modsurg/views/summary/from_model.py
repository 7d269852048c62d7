"""A model's tree, and what its shadow did, as rows."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from modsurg.tracing.trace import Trace, run
from modsurg.tree.walk import Tree, walk
from modsurg.tree.wrappers import unwrap, wrapper_kind
from modsurg.views.summary.layer_text import detail
from modsurg.views.summary.rows import Content, Row, Totals, add_up, mark_frozen
from modsurg.views.text import written


def collect(model: nn.Module, example: object = None) -> tuple[Content, Trace | None]:
    """Read a model, and run its shadow if there is an example."""
    inner, outer = opened(model)
    trace = None if example is None else run(inner, example, fallback=True)
    tree = walk(inner)
    reader = _Reader(tree, trace)
    content = reader.content()
    content.about += [f"in {name}" for name in outer if name != content.root.kind]
    return content, trace


def opened(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """The model inside torch.compile and data parallel, and the names of the wrappers that it is still, or was, in.

    Example:
        >>> opened(nn.DataParallel(nn.ReLU()))
        (ReLU(), ['DataParallel'])
    """
    names = []
    while kind := wrapper_kind(unwrap(model)):
        model = unwrap(model)
        names.append(type(model).__name__)
        if kind not in ("DDP", "DataParallel"):
            break
        model = cast(nn.Module, model._modules["module"])
    return unwrap(model), names


@dataclass(slots=True)
class _Met:
    """A tensor and where it was first; it is held so that its id stays its own."""

    tensor: torch.Tensor
    path: str
    name: str
    params: int

    def tie(self, name: str) -> str:
        """How another place says that it has the same tensor."""
        full = f"{self.path}.{self.name}" if self.path else self.name
        return f"= {full}" if name == self.name else f"{name} = {full}"


class _Reader:
    """One pass over a tree; what was met before is known by the object itself, which `_met` keeps alive."""

    def __init__(self, tree: Tree, trace: Trace | None) -> None:
        self._tree = tree
        self._trace = trace
        self._shadows = walk(trace.model).modules if trace and trace.model else {}
        self._met: dict[int, _Met] = {}
        self._shared: dict[int, int] = {}
        self._sorts: list[tuple[Row, tuple[torch.dtype, torch.device]]] = []
        self._elements: Counter[tuple[torch.dtype, torch.device]] = Counter()
        self._totals = Totals(modules=len(tree.paths))

    def content(self) -> Content:
        rows: dict[str, Row] = {}
        repeated: set[str] = set()
        for path, module in self._tree.modules.items():
            parent = path.rpartition(".")[0]
            row = self._row(path, module)
            if path and (parent not in rows or parent in repeated):
                continue
            if path:
                rows[parent].children.append(row)
            rows[path] = row
            if self._tree.paths[id(module)][0] != path:
                repeated.add(path)
        kept = list(rows.values())
        add_up(kept)
        mark_frozen(kept)
        about = self._about()
        return Content(kept[0], self._summed(kept[0]), about, self._trace.note if self._trace else "")

    def _summed(self, root: Row) -> Totals:
        totals = self._totals
        totals.params, totals.trainable_params, totals.buffers = root.params, root.trainable, root.buffers
        totals.frozen_params = root.params - root.trainable
        totals.shared_params = sum(self._shared.values())
        totals.macs, totals.activation_bytes = root.macs, root.activations
        return totals

    def _row(self, path: str, module: nn.Module) -> Row:
        kind = type(module).__name__
        if isinstance(module, torch.jit.ScriptModule):
            kind = module.original_name
        row = Row(path, kind)
        first = self._tree.paths[id(module)][0]
        if first != path:
            row.notes.append(f"= {first or 'the whole'}")
        self._weigh(row, module, first == path)
        row.detail = detail(vars(self._shadows.get(path, module)))
        if not row.detail and module._parameters and (path or not module._modules):
            row.detail = _held(module)
        if "parametrizations" in module._modules and is_parametrized(module):
            row.kind = kind.removeprefix("Parametrized")
        if self._trace is not None:
            self._trace_row(row, self._trace)
        return row

    def _weigh(self, row: Row, module: nn.Module, fresh: bool) -> None:
        for name, held, parameter in _tensors(module):
            met = self._met.get(id(held))
            if met is not None:
                self._shared[id(held)] = met.params
                if fresh:
                    row.notes.append(met.tie(name))
                continue
            tensor = held
            if is_lazy(held):
                tensor = self._settled(row.path, name, held)
                if is_lazy(tensor):
                    row.notes.append(f"{name} lazy")
                    self._met[id(held)] = _Met(held, row.path, name, 0)
                    continue
            number, nbytes = tensor.numel(), tensor.nbytes
            self._met[id(held)] = _Met(held, row.path, name, number if parameter else 0)
            if parameter:
                row.params += number
                row.trainable += number if tensor.requires_grad else 0
                self._totals.param_bytes += nbytes
            else:
                row.buffers += number
                self._totals.buffer_bytes += nbytes
            if parameter or tensor.is_floating_point():
                sort = (tensor.dtype, held.device)
                self._sorts.append((row, sort))
                self._elements[sort] += number if parameter else 0

    def _settled(self, path: str, name: str, lazy: torch.Tensor) -> torch.Tensor:
        """What a lazy parameter became in the shadow, where that ran."""
        shadow = self._shadows.get(path)
        found = None if shadow is None else shadow._parameters.get(name, shadow._buffers.get(name))
        return lazy if found is None else found

    @staticmethod
    def _trace_row(row: Row, trace: Trace) -> None:
        if not trace.calls:
            return
        row.calls = trace.calls.get(row.path, 0)
        row.macs = trace.macs.get(row.path, 0)
        row.activations = trace.activations.get(row.path, 0)
        row.inputs = trace.inputs.get(row.path)
        row.outputs = trace.outputs.get(row.path)
        if row.calls > 1:
            row.notes.append(f"{row.calls} calls")
        if row.path in trace.uncalled:
            row.notes.append("not called, weights read" if row.path in trace.bypassed else "not called")

    def _about(self) -> list[str]:
        """Device, dtype and mode of most of the model; rows that differ are given a note."""
        modes = {module.training for module in self._tree.modules.values()}
        mode = "train and eval" if len(modes) > 1 else "train" if True in modes else "eval"
        if not self._elements:
            return [mode]
        dtype, device = self._elements.most_common(1)[0][0]
        for row, sort in self._sorts if len(self._elements) > 1 else ():
            if sort != (dtype, device):
                others = (str(sort[0])[6:] if sort[0] != dtype else "", str(sort[1]) if sort[1] != device else "")
                row.notes += [each for each in others if each and each not in row.notes]
        return [str(device), str(dtype)[6:], mode]


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """Name, tensor, and whether it is a parameter. The packed weights of a quantised layer are buffers."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield name, parameter, True
    for name, buffer in module._buffers.items():
        if buffer is not None:
            yield name, buffer, False
    if type(module).__module__.startswith("torch.ao.nn."):
        for name in ("weight", "bias"):
            unpack = getattr(type(module), name, None)
            tensor = unpack(module) if callable(unpack) else None
            if isinstance(tensor, torch.Tensor):
                yield name, tensor, False


def _held(module: nn.Module) -> str:
    """The parameters of a layer of unknown habits: `pos_embedding 1x197x768`."""
    own = [(name, each) for name, each in module._parameters.items() if each is not None and not is_lazy(each)]
    return ", ".join(f"{name} {written(each.shape)}" for name, each in own[:2]) + (", ..." if len(own) > 2 else "")
