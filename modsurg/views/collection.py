"""A model's tree, and what its shadow did, as rows."""

from collections import Counter
from collections.abc import Iterator, Mapping

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from modsurg.tree.shadow import Trace, run
from modsurg.tree.walk import Tree, walk
from modsurg.tree.wrappers import unwrap, wrapper_kind
from modsurg.views.labels import detail
from modsurg.views.rows import Content, Row, Totals, add_up, mark_frozen
from modsurg.views.units import written


def collect(model: nn.Module, example: object = None) -> tuple[Content, Trace | None]:
    """Read a model, and run its shadow if there is an example."""
    outer = wrapper_kind(model)
    inner: nn.Module = unwrap(model._modules["module"]) if outer in ("DDP", "DataParallel") else unwrap(model)  # type: ignore[arg-type]  # they hold one
    trace = None if example is None else run(inner, example, fallback=True)
    tree = walk(inner)
    reader = _Reader(tree, trace)
    content = reader.content()
    if outer:
        content.about.append(f"in {type(model).__name__}")
    return content, trace


class _Reader:
    """One pass over a tree; what was met before is known by the object itself, which `_met` keeps alive."""

    def __init__(self, tree: Tree, trace: Trace | None) -> None:
        self._tree = tree
        self._trace = trace
        self._shadows = walk(trace.model).modules if trace and trace.model else {}
        self._met: dict[int, tuple[torch.Tensor, str]] = {}
        self._shared: dict[int, int] = {}
        self._sorts: dict[str, list[tuple[torch.dtype, torch.device]]] = {}
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
        about = self._about(rows)
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
        row.detail = detail(vars(self._shadows.get(path, module))) or (
            "" if path == "" and module._modules else _held(module)
        )
        if "parametrizations" in module._modules and is_parametrized(module):
            row.kind = kind.removeprefix("Parametrized")
        self._trace_row(row, first)
        return row

    def _weigh(self, row: Row, module: nn.Module, fresh: bool) -> None:
        if not (module._parameters or module._buffers):
            return
        for name, tensor, parameter in self._tensors(row.path, module):
            key = f"{row.path}.{name}" if row.path else name
            if is_lazy(tensor):
                row.notes.append(f"{name} lazy")
                continue
            number = tensor.numel()
            if parameter or tensor.is_floating_point():
                self._sorts.setdefault(row.path, []).append((tensor.dtype, tensor.device))
            if id(tensor) in self._met:
                if parameter:
                    self._shared[id(tensor)] = number
                if fresh:
                    row.notes.append(f"{name} = {self._met[id(tensor)][1]}")
                continue
            self._met[id(tensor)] = (tensor, key)
            self._elements[tensor.dtype, tensor.device] += number if parameter else 0
            if parameter:
                row.params += number
                row.trainable += number if tensor.requires_grad else 0
                self._totals.param_bytes += number * tensor.element_size()
            else:
                row.buffers += number
                self._totals.buffer_bytes += number * tensor.element_size()

    def _tensors(self, path: str, module: nn.Module) -> Iterator[tuple[str, torch.Tensor, bool]]:
        for held, parameter in ((module._parameters, True), (module._buffers, False)):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if is_lazy(tensor) and path in self._shadows:
                    shadow = self._shadows[path]
                    tensor = (shadow._parameters if parameter else shadow._buffers)[name] or tensor
                yield name, tensor, parameter

    def _trace_row(self, row: Row, first: str) -> None:
        trace = self._trace
        if trace is None or (trace.note.startswith("not run") and not trace.calls):
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

    def _about(self, rows: Mapping[str, Row]) -> list[str]:
        """Device, dtype and mode of most of the model; rows that differ are given a note."""
        modes = {module.training for module in self._tree.modules.values()}
        mode = "train and eval" if len(modes) > 1 else "train" if True in modes else "eval"
        if not self._elements:
            return [mode]
        dtype, device = self._elements.most_common(1)[0][0]
        for path, sorts in self._sorts.items():
            if path in rows:
                others = dict.fromkeys(str(each)[6:] for each, _ in sorts if each != dtype)
                others |= dict.fromkeys(str(each) for _, each in sorts if each != device)
                rows[path].notes.extend(others)
        return [str(device), str(dtype)[6:], mode]


def _held(module: nn.Module) -> str:
    """The parameters of a layer of unknown habits: `pos_embedding 1x197x768`."""
    own = [(name, each) for name, each in module._parameters.items() if each is not None and not is_lazy(each)]
    return ", ".join(f"{name} {written(each.shape)}" for name, each in own[:2]) + (", ..." if len(own) > 2 else "")
