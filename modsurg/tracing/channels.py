"""Run a model once on meta with labels on its channels, and tell which of them can only change together."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from modsurg.tracing.channel_op import Op, Rule, UnknownOperationError, plain_dims, pointwise
from modsurg.tracing.compute_rules import COMPUTE_RULES
from modsurg.tracing.inputs import arguments, dtypes_to_try, forked_random
from modsurg.tracing.labels import FIXED, Dim, Factor, Labels
from modsurg.tracing.layout_rules import LAYOUT_RULES
from modsurg.tracing.meta_copy import Cloner, to_example, to_meta
from modsurg.tracing.observer import Failure, Functions, Recorder, tensors
from modsurg.tracing.sizes import Attribute, Size, mark_attributes, uses
from modsurg.tree.walk import Tree, walk

Leaf = tuple[str, str]

_RULES: dict[str, Rule] = LAYOUT_RULES | COMPUTE_RULES


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one operation gave.

    Attributes:
        name: Of the operation, in ATen.
        module: Path of the module whose forward called it.
        dims: The dimensions of each tensor.
    """

    name: str
    module: str
    dims: list[list[Dim]]


@dataclass(slots=True)
class Channels:
    """The channels of a model, from one run of it.

    Attributes:
        leaves: The dimensions of each parameter and buffer that was used, by module path and name.
        sets: For each label, the number of its set.
        reads: For each parameter, the dimensions by which it reads its input.
        outcomes: What each operation gave, in order.
        attributes: Numbers of modules that forward uses as sizes, and the dimension that has this size.
        refused: For a set, the operation of which nothing is known, and its module.
        spanned: For a set, an operation that runs over all its channels at once.
        macs: Multiply-adds of the run.
        parameters: Number of parameters of the model, used or not.
    """

    leaves: dict[Leaf, list[Dim]]
    sets: torch.Tensor
    reads: dict[Leaf, set[int]] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)
    attributes: dict[Attribute, Dim] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)
    spanned: dict[int, str] = field(default_factory=dict)
    macs: int = 0
    parameters: int = 0

    @property
    def fixed(self) -> int:
        """The number of the set that can't change."""
        return int(self.sets[FIXED])


class _Counter(Recorder):
    """Counts multiply-adds, unseen by the rules."""

    rules: "_Rules | None" = None

    def count(self, name: str, args: Any, kwargs: Any, out: Any) -> None:
        """See `Recorder`."""
        assert self.rules is not None
        self.rules.paused = True
        super().count(name, args, kwargs, out)
        self.rules.paused = False


class _Marked(Functions):
    """Reads of `shape` give numbers that say which tensor they are from, and numbers that are used are noted."""

    def __init__(self, recorder: Recorder, rules: "_Rules") -> None:
        super().__init__(recorder, meta=True)
        self._rules = rules

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs)
        name = getattr(func, "__name__", "")
        if isinstance(out, torch.Size):
            return self._rules.sized(args[0], out)
        if name == "size":
            at = args[1] if len(args) > 1 else (kwargs or {}).get("dim")
            return Size(out, self._rules.dims(args[0])[at], self._rules.checks) if at is not None else out
        if name == "multi_head_attention_forward":
            self._rules.attention(args, kwargs or {})
        elif name == "conv2d" or name in ("conv1d", "conv3d"):
            self._rules.grouped(args, kwargs or {})
        elif name == "group_norm":
            self._rules.normalized_groups(args, kwargs or {}, out)
        elif isinstance(out, (torch.Tensor, tuple, list)):
            self._rules.use(uses(name, args, kwargs or {}, out, self._rules.dims))
        return out


class _Rules(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Labels what each operation gives."""

    def __init__(self, tree: Tree, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.paused = False
        self.labels = Labels()
        self.outcomes: list[Outcome] = []
        self.used: dict[Attribute, Dim] = {}
        self.leaves: dict[Leaf, list[Dim]] = {}
        self.checks: list[tuple[Size, Dim]] = []
        self._recorder = recorder
        self._names: dict[int, Leaf] = {}
        self._dims: dict[int, list[Dim]] = {}
        self._alive: list[torch.Tensor] = []
        self._weights: set[int] = set()
        self._picked: dict[int, Dim] = {}
        for path, module in tree.modules.items():
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    self._names.setdefault(id(tensor), (path, name))
                    self._weights.add(id(tensor))
                    self._alive.append(tensor)

    def dims(self, tensor: torch.Tensor) -> list[Dim]:
        """The dimensions of a tensor; those of a parameter get labels when it is first used."""
        known = self._dims.get(id(tensor))
        if known is not None and len(known) == tensor.dim():
            return known
        leaf = self._names.get(id(tensor))
        if leaf is None or not tensor.is_floating_point():
            return self._keep(tensor, plain_dims(tensor))
        dims: list[Dim] = [(self.labels.fresh(size),) for size in tensor.shape]
        self.leaves[leaf] = dims
        return self._keep(tensor, dims)

    def _keep(self, tensor: torch.Tensor, dims: list[Dim]) -> list[Dim]:
        self._dims[id(tensor)] = dims
        self._alive.append(tensor)
        return dims

    def read(self, given: Iterable[torch.Tensor]) -> None:
        """Take note that the values of these tensors are used."""
        for tensor in given:
            self.labels.fix(self._picked.pop(id(tensor), ()))

    def sized(self, tensor: torch.Tensor, shape: torch.Size) -> torch.Size:
        """A shape whose numbers say where they are from."""
        return torch.Size([Size(size, dim, self.checks) for size, dim in zip(shape, self.dims(tensor), strict=True)])

    def use(self, found: Sequence[tuple[Size, Dim]]) -> None:
        """What one number sizes belongs together."""
        for size, dim in found:
            if prod(f.size for f in dim) != size:
                continue
            if isinstance(size.source, Attribute):
                self.labels.ties.append((self.used.setdefault(size.source, dim), dim))
            else:
                self.labels.ties.append((size.source, dim))

    def grouped(self, args: Any, kwargs: Any) -> None:
        """The number of groups of a convolution is one of its attributes."""
        groups = args[6] if len(args) > 6 else kwargs.get("groups", 1)
        if isinstance(groups, Size) and groups > 1:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            outputs = self.dims(weight)[0]
            self.use([(groups, self.labels.split(outputs[0], (groups, weight.shape[0] // groups))[:1])])

    def normalized_groups(self, args: Any, kwargs: Any, out: torch.Tensor) -> None:
        """So is the number of groups of a norm."""
        groups = args[1] if len(args) > 1 else kwargs["num_groups"]
        ids = self.labels.flatten(self.dims(out)[1])
        if groups > 1 and ids is not None:
            parts = self.labels.split(Factor(len(ids), ids), (groups, len(ids) // groups), whole_groups=True)
            if isinstance(groups, Size):
                self.use([(groups, parts[:1])])
            else:
                self.labels.fix(parts[:1])

    def attention(self, args: Any, kwargs: Any) -> None:
        """Torch's own attention takes its inner width from its input's."""
        named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        weight = args[11] if len(args) > 11 else kwargs["out_proj_weight"]
        self.labels.unify(self.dims(named["query"])[-1], self.dims(weight)[1])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = _normalize(args) if func is torch.ops.aten.native_batch_norm.default else None
        out = func(*args, **kwargs) if out is None else out
        if self.paused:
            return out
        given = [each for each in _flat((*args, *kwargs.values())) if isinstance(each, torch.Tensor)]
        results = [
            each for each in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(each, torch.Tensor)
        ]
        self.read(given)
        name = func._schema.name.partition("::")[2]
        module = self._recorder._stack[-1] if self._recorder._stack else ""
        known = self._apply(func, name, module, args, kwargs, out, given)
        for tensor, dims in zip(results, known, strict=False):
            self._keep(tensor, dims)
        for tensor in results[len(known) :]:
            self._keep(tensor, plain_dims(tensor, fixed=not known))
        if given and all(id(each) in self._weights for each in given):
            self._weights.update(id(each) for each in results)
        self.outcomes.append(Outcome(name, module, [self.dims(tensor) for tensor in results]))
        return out

    def _apply(
        self, func: Any, name: str, module: str, args: Any, kwargs: Any, out: Any, given: list[torch.Tensor]
    ) -> list[list[Dim]]:
        if not given:
            return [plain_dims(each, fixed=False) for each in _flat((out,)) if isinstance(each, torch.Tensor)]
        known = any(f.ids is not None for tensor in given for dim in self.dims(tensor) for f in dim)
        if not known and name not in _FOLLOWING:
            return []
        rule = _RULES.get(name)
        if rule is None and torch.Tag.pointwise in func.tags:
            rule = pointwise
        try:
            if rule is None:
                raise UnknownOperationError
            found: Any = rule(Op(name, args, kwargs, out, self.labels, self.dims, self._weights, self._picked))
        except UnknownOperationError:
            where = f'"{module}"' if module else "the model"
            self.labels.refuse([dim for tensor in given for dim in self.dims(tensor)], f"{name} in {where}")
            return []
        return list(found) if isinstance(out, (tuple, list)) else [found]


def _normalize(args: Sequence[Any]) -> tuple[torch.Tensor, ...] | None:
    """What batch norm gives on meta, where torch decomposes it into many operations; None if a size is wrong."""
    x, *rest, training = args[:6]
    if x.dim() < 2 or any(each is not None and each.shape != x.shape[1:2] for each in rest):
        return None
    saved = x.shape[1] if training else 0
    return torch.empty_like(x), x.new_empty(saved), x.new_empty(saved)


_FOLLOWING = ("expand", "repeat", "view", "clone", "add", "mul", "cat")


def _flat(values: Sequence[Any]) -> list[Any]:
    return [each for value in values for each in (value if isinstance(value, (tuple, list)) else (value,))]


def channels(model: nn.Module, example: object) -> Channels | Failure:
    """Run a copy of the model on meta, in the mode in which it is, and label its channels.

    Args:
        model: Any module; it stays as it is.
        example: What forward takes, or shapes; see `trace.run`.

    Returns:
        The channels, or what failed.
    """
    failure: Failure | None = None
    for dtypes in dtypes_to_try(example):
        for training in (True, False) if model.training else (False,):
            found = _attempt(model, example, dtypes, training)
            if isinstance(found, Channels):
                return found
            failure = failure or found
    assert failure is not None
    return failure


def _attempt(
    model: nn.Module, example: object, dtypes: tuple[torch.dtype | None, ...], training: bool
) -> Channels | Failure:
    copied = Cloner(to_meta).model(model)
    if not training:
        copied.eval()
    tree = walk(copied)
    recorder = _Counter(tree)
    rules = recorder.rules = _Rules(tree, recorder)
    mark_attributes(tree, rules.checks)
    try:
        with forked_random():
            args, kwargs = Cloner(to_example).value(arguments(example, copied, dtypes))
            with torch.enable_grad(), _Marked(recorder, rules), rules:
                rules.read(tensors(copied(*args, **kwargs)))
            rules.use(rules.checks)
    except Exception as error:
        return recorder.failure or Failure("", type(model).__name__, {}, (), error)
    found = _result(rules, sum(recorder.macs.values()))
    found.parameters = sum(parameter.numel() for parameter in copied.parameters())
    return found


def _result(rules: _Rules, macs: int) -> Channels:
    labels = rules.labels
    sets = labels.resolve()
    found = Channels(rules.leaves, sets, outcomes=rules.outcomes, attributes=rules.used, macs=macs)
    for leaf, dims in rules.leaves.items():
        found.reads[leaf] = {n for n, dim in enumerate(dims) if id(dim[0].ids) in labels.read}
    for notes, target in ((labels.refused, found.refused), (labels.spanned, found.spanned)):
        for ids, text in notes:
            for number in set(sets[ids].tolist()) - {found.fixed}:
                target.setdefault(number, text)
    return found
