"""A model on meta, where running it costs nothing: what is called, with which shapes, and how much it computes."""

import re
import sys
import textwrap
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from inspect import getattr_static
from typing import Any

import torch
from torch import nn

from modsurg.tracing.inputs import arguments, dtypes_to_try, forked_random, shapes_of, with_batch
from modsurg.tracing.meta_copy import Cloner, to_example, to_meta, to_real
from modsurg.tracing.observer import Failure, Functions, Recorder, Shape
from modsurg.tree.walk import Tree, walk
from modsurg.tree.wrappers import unwrap


@dataclass(frozen=True)
class Trace:
    """What one forward did. Every mapping goes from a module's path; the root is `""`.

    A module object that stands at several paths is recorded at the path through which it was reached.

    Attributes:
        calls: Number of calls; paths that were never called are absent.
        inputs: Shapes of the tensors that went in, at the first call.
        outputs: Shapes of the tensors that came out, at the first call.
        macs: Multiply-adds, all calls, everything below the path included.
        activations: Bytes of the outputs that the modules made, everything below included; views cost nothing.
        uncalled: Paths of the modules that were called at none of their paths; containers are left out.
        bypassed: Why a path's call can go unseen: its parent reads the weights itself.
        failure: The innermost module that failed, or None.
        hint: How the example could be mended, where a forward failed: the line to write.
        note: What kept the model from running on meta, or how it was run instead; empty when all went well.
        model: The shadow that ran; a lazy module has its shapes there.
    """

    calls: dict[str, int] = field(default_factory=dict)
    inputs: dict[str, tuple[Shape, ...]] = field(default_factory=dict)
    outputs: dict[str, tuple[Shape, ...]] = field(default_factory=dict)
    macs: dict[str, int] = field(default_factory=dict)
    activations: dict[str, int] = field(default_factory=dict)
    uncalled: tuple[str, ...] = ()
    bypassed: dict[str, str] = field(default_factory=dict)
    failure: Failure | None = None
    hint: str = ""
    note: str = ""
    model: nn.Module | None = None


def shadow(model: nn.Module) -> nn.Module:
    """Copy a model onto the meta device: the same tree, classes and attributes, and no memory for the weights.

    Forward, backward and state hooks are left behind, but for those by which torch.nn implements a layer (weight norm,
    spectral norm, lazy modules). What is tied stays tied. The model itself is only read.

    Example:
        >>> model = nn.Linear(2, 3)
        >>> shadow(model).weight
        Parameter containing:
        tensor(..., device='meta', size=(3, 2), requires_grad=True)
    """
    return Cloner(to_meta).model(unwrap(model))


def run(model: nn.Module, example: object, *, fallback: bool = False, keep_mode: bool = False) -> Trace:
    """Run a shadow of the model and record what happens; the model, its mode and the random state stay as they are.

    Args:
        model: Any module, on any device; a torch.compile wrapper is looked through.
        example: What forward takes: a tensor, a tuple of arguments, a dict of keyword arguments, or in place of a
            tensor its shape, such as `(1, 3, 224, 224)`.
        fallback: Where the forward can't run on meta (its shapes depend on data), run a real copy instead, which costs
            the model's memory and a forward.
        keep_mode: A model in train mode runs in train mode only; where a norm wants more than one value, the norms
            alone run in eval mode. Otherwise what fails in train mode is tried in eval mode.

    Returns:
        The trace. An error in forward is not raised: it is the trace's `failure`.

    Example:
        >>> trace = run(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), (2, 4))
        >>> trace.outputs["1"], trace.macs[""]
        (((2, 8),), 64)
    """
    trace = _run(unwrap(model), example, fallback, keep_mode)
    larger = with_batch(example) if trace.failure else None
    if larger is not None and _run(unwrap(model), larger, fallback, keep_mode).failure is None:
        sizes = ", ".join(str(("batch", *shape)).replace("'", "") for shape in shapes_of(example))
        return replace(trace, hint=f"Try: the batch size as the first one: {sizes}.")
    return trace


def _run(model: nn.Module, example: object, fallback: bool, keep_mode: bool) -> Trace:
    best: Trace | None = None
    for dtypes in dtypes_to_try(example):
        before: Trace | None = None
        for mode in _MODES if any(module.training for module in model.modules()) else ("own",):
            if before and before.failure and _skips(mode, keep_mode, before.failure):
                continue
            way = _Way(dtypes=dtypes, mode=mode)
            trace = _attempt(model, example, way)
            if trace.failure and _GRADIENTS in str(trace.failure.error):  # forward itself takes a gradient
                way = replace(way, grad=True)
                trace = _attempt(model, example, way)
            if trace.failure and _is_limit(trace.failure):
                trace = _without_meta(model, example, way, trace, fallback)
            if trace.failure is None:
                return _with_note(trace, way, before)
            before = before or trace
            if best is None or sum(trace.calls.values()) > sum(best.calls.values()):
                best = trace
    assert best is not None
    return best


@dataclass(frozen=True, slots=True)
class _Way:
    """How to run: the dtypes for shapes, in which mode, on meta or for real, with gradients."""

    dtypes: tuple[torch.dtype | None, ...] = ()
    mode: str = "own"
    meta: bool = True
    grad: bool = False


_MODES = ("own", "norms in eval", "eval")
_ONE_VALUE = "Expected more than 1"


def _skips(mode: str, keep_mode: bool, failure: Failure) -> bool:
    """Return whether another mode would not help: norms alone where they did not complain, or not allowed."""
    return keep_mode if mode == "eval" else _ONE_VALUE not in failure.message


def _attempt(model: nn.Module, example: object, way: _Way) -> Trace:
    copied = Cloner(to_meta if way.meta else to_real).model(model)
    for module in copied.modules() if way.mode != "own" else ():
        if way.mode == "eval" or "running_mean" in module._buffers:
            module.training = False
    tree = walk(copied)
    recorder = Recorder(tree)
    functions = Functions(recorder, way.meta)
    failure = None
    try:
        with forked_random():
            given = arguments(example, copied, way.dtypes)
            args, kwargs = Cloner(to_example if way.meta else to_real).value(given)
            with torch.set_grad_enabled(way.grad), _eager(), functions:
                copied(*args, **kwargs)
    except Exception as error:
        failure = recorder.failure
        if failure is None or error not in (failure.error, failure.error.__context__):
            failure = Failure("", type(model).__name__, {}, (), error)
    return _trace(copied, tree, recorder, failure)


def _eager() -> AbstractContextManager[Any]:
    """Functions that are compiled run as they are written: compiling costs seconds, and hides what they call."""
    loaded = any(name in sys.modules for name in ("torch._dynamo", "torch.nn.attention.flex_attention"))
    return torch.compiler.set_stance("force_eager") if loaded else nullcontext()


def _trace(model: nn.Module, tree: Tree, recorder: Recorder, failure: Failure | None) -> Trace:
    uncalled = () if failure else tuple(_uncalled(tree, recorder.calls))
    names = ", ".join(sorted(recorder.uncounted))
    return Trace(
        calls=dict(recorder.calls),
        inputs=recorder.inputs,
        outputs=recorder.outputs,
        macs=_summed(recorder.macs),
        activations=_summed(recorder.activations),
        uncalled=uncalled,
        bypassed=_bypassed(tree, recorder.calls, uncalled, recorder.used),
        failure=failure,
        note=f"multiply-adds of {names} could not be counted" if names else "",
        model=model,
    )


def _summed(own: Mapping[str, int]) -> dict[str, int]:
    """Each path's own number, and those of everything below it."""
    total: Counter[str] = Counter({"": 0})
    for path, number in own.items():
        total[""] += number
        while path:
            total[path] += number
            path = path.rpartition(".")[0]
    return dict(total)


def _uncalled(tree: Tree, calls: Mapping[str, int]) -> Iterator[str]:
    reached: set[str] = set()
    for path in calls:
        for known in tree.paths[id(tree.modules[path])]:
            while known and known not in reached:
                reached.add(known)
                known = known.rpartition(".")[0]
    for path, module in tree.modules.items():
        container = getattr_static(type(module), "forward") is nn.Module.forward or type(module).__module__.startswith(
            "torch.ao."
        )
        if path and path not in reached and not container:
            yield path


def _bypassed(tree: Tree, calls: Mapping[str, int], uncalled: tuple[str, ...], used: set[int]) -> dict[str, str]:
    """Modules whose work is, or can be, done without calling them."""
    found = {}
    for path, module in tree.modules.items():
        if isinstance(module, nn.TransformerEncoderLayer) and not module.training:
            for name in module._modules:
                found[f"{path}.{name}" if path else name] = _FAST_PATH
    called = {id(each): path for path in calls for each in tree.modules[path]._parameters.values() if each is not None}
    for path in uncalled:
        for parameter in tree.modules[path]._parameters.values():
            if id(parameter) in called:
                found[path] = f"{called[id(parameter)]} has the same weights and is called in its place"
            elif id(parameter) in used:
                found[path] = f"{type(tree.parent(path)).__name__} reads its weights and does not call it"
    return found


_FAST_PATH = "in eval mode TransformerEncoderLayer can take a fast path that reads its weights and does not call it"


def _is_limit(failure: Failure) -> bool:
    """Whether the error is the shadow's (a value was asked for, a kernel is missing) and not the model's."""
    if not isinstance(failure.error, LookupError) and _LIMITS.search(str(failure.error)):  # a key may be any word
        return True
    frames = [frame for frame, _ in traceback.walk_tb(failure.error.__traceback__)]
    layer = frames[-1].f_globals.get("__name__", "").startswith("torch.nn.")  # it knows no such forward, no such input
    return isinstance(failure.error, NotImplementedError) and not layer


_GRADIENTS = "not require grad"
_NOT_RUN = "not run"
_UNKNOWN_SHAPE = re.compile(r"The register_meta function for (\S+)\(\) raises unimplemented")
_READ_ONLY = "(?:array|destination) is read-only"
_LIMITS = re.compile(
    r"\b[Mm]eta\b|same device|[Dd]ata.dependent|GuardOnData|fake impl|unsupported scalarType"
    r"|Cannot access (?:data pointer|storage) of|invalid python storage|data is not allocated"
    rf"|set the storage of a tensor on device|storage_device\.|{_READ_ONLY}|{_GRADIENTS}"
)


def _with_note(trace: Trace, way: _Way, before: Trace | None) -> Trace:
    if way.mode == "own" or before is None or before.failure is None:
        return trace
    if way.mode == "norms in eval":
        trained = f"run with its norms in eval mode; in train mode {before.failure}"
        return replace(trace, note="; ".join(filter(None, [trained, trace.note])))
    if trace.note.startswith(_NOT_RUN):
        note = f"{_NOT_RUN}: in train mode {before.failure}; in eval mode{trace.note.removeprefix(_NOT_RUN)[1:]}"
    else:
        note = "; ".join(filter(None, [f"run in eval mode; in train mode {before.failure}", trace.note]))
    return replace(trace, note=note)


def _without_meta(model: nn.Module, example: object, way: _Way, trace: Trace, fallback: bool) -> Trace:
    assert trace.failure is not None
    scripted = any(isinstance(module, torch.jit.ScriptModule) for module in model.modules())
    if scripted:
        why = "TorchScript runs as a whole, and what it calls inside is not seen"
    else:
        unknown = _UNKNOWN_SHAPE.search(trace.failure.message)
        depends = f"the shape of what {unknown[1]} gives depends on values" if unknown else ""
        reason = depends or textwrap.shorten(trace.failure.message, 100, placeholder=" ...")
        why = f"{trace.failure.place} can't run on meta tensors: {reason}"
    if fallback and not any(each.is_meta for each in model.parameters()):
        real = _attempt(model, example, replace(way, meta=False))
        if real.failure and re.search(_READ_ONLY, str(real.failure.error)):
            return replace(real, failure=None, uncalled=(), note=f"{_NOT_RUN}; {real.failure}")
        return replace(real, note=f"ran a real copy; {why}", uncalled=() if scripted else real.uncalled)
    return replace(trace, failure=None, uncalled=(), note=f"{_NOT_RUN}; {why}")
