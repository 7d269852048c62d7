"""Watches a copied model while it runs: module calls, shapes, torch functions."""

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from math import prod
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from modsurg.tracing.functorch import is_transforming, unwrap_tensor
from modsurg.tracing.macs import RULES, count
from modsurg.tracing.meta_checks import check
from modsurg.tracing.meta_copy import SMALL, to_meta
from modsurg.tracing.shape_rules import shaped
from modsurg.tree.walk import Tree

Shape = tuple[int, ...]

_FACTORY_NAMES = """
    arange as_tensor asarray empty empty_permuted empty_strided eye full linspace logspace ones rand randint randn
    randperm range scalar_tensor tensor tril_indices triu_indices zeros bartlett_window blackman_window hamming_window
    hann_window kaiser_window fft_fftfreq fft_rfftfreq sparse_coo_tensor
"""
_FACTORIES = frozenset(_FACTORY_NAMES.split())
_READ = frozenset({"arange", "ones"})  # masks and positions: made to be looked at
LARGE = 1 << 24
_FROM_DATA = frozenset({"as_tensor", "asarray", "tensor", "scalar_tensor"})
_MOVES = frozenset({"cuda", "cpu", "xpu", "npu", "pin_memory"})
_ON_DEVICE = frozenset({"pin_memory", "generator"})


@dataclass(frozen=True, slots=True)
class Failure:
    """The innermost module whose forward raised.

    Attributes:
        path: Where it is; `""` is the model itself.
        kind: Its class's name.
        weights: Shapes of its own parameters, by name.
        inputs: Shapes of the tensors that it was given.
        error: What it raised.
    """

    path: str
    kind: str
    weights: dict[str, Shape]
    inputs: tuple[Shape, ...]
    error: Exception

    @property
    def place(self) -> str:
        """Path and class."""
        return f"{self.path} ({self.kind})" if self.path else self.kind

    @property
    def message(self) -> str:
        """What it raised, in one line."""
        text = " ".join(str(self.error).split("\n\n")[0].split()) or type(self.error).__name__
        return text if len(text) <= 400 else text[:397] + "..."

    def __str__(self) -> str:
        held = "".join(f", {name} {_written(shape)}" for name, shape in self.weights.items())
        given = " on " + ", ".join(map(_written, self.inputs)) if self.inputs else ""
        return f"{self.path or 'the model'} ({self.kind}{held}){given}: {self.message}"


def _written(shape: Shape) -> str:
    return "x".join("?" if size < 0 else str(size) for size in shape) or "scalar"


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in what a module takes or returns: nested tuples, lists, mappings, dataclasses."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)
    elif is_dataclass(value):
        for each in fields(value):
            yield from tensors(getattr(value, each.name))


def shapes(value: Any) -> tuple[Shape, ...]:
    """The shapes of those tensors, in order; a dimension that has no one size, in a nested tensor, is -1."""
    return tuple(_ragged(tensor) if tensor.is_nested else tuple(tensor.shape) for tensor in tensors(value))


def _ragged(tensor: torch.Tensor) -> Shape:
    sizes: list[int] = []
    for dim in range(tensor.dim()):
        try:
            size = tensor.size(dim)
        except RuntimeError:
            size = -1
        sizes.append(size if isinstance(size, int) else -1)
    return tuple(sizes)


class Recorder:
    """Keeps what happens at every path while the model that it watches runs.

    Args:
        tree: The watched model's tree. Each module's `forward` is replaced on the module object itself, so that calls
            that go past `__call__` are seen as well: never watch a user's model.
    """

    def __init__(self, tree: Tree) -> None:
        self.calls: Counter[str] = Counter()
        self.inputs: dict[str, tuple[Shape, ...]] = {}
        self.outputs: dict[str, tuple[Shape, ...]] = {}
        self.macs: Counter[str] = Counter()
        self.activations: Counter[str] = Counter()
        self.used: set[int] = set()
        self.uncounted: set[str] = set()
        self.failure: Failure | None = None
        self._stack: list[str] = []
        self._storages: set[StorageWeakRef] = set()
        for paths in tree.paths.values():
            self._watch(tree.modules[paths[0]], paths)

    def _watch(self, module: nn.Module, paths: list[str]) -> None:
        if isinstance(module, torch.jit.ScriptModule):
            if not hasattr(module, "forward"):  # never called in what was scripted
                return
            original = _by_operators(module.forward)
        else:
            original = module.forward

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            path = self._enter(paths, (args, kwargs))
            try:
                out = original(*args, **kwargs)
            except Exception as error:
                self._fail(path, module, (args, kwargs), error)
                raise
            finally:
                self._stack.pop()
            self._leave(path, out)
            return out

        vars(module)["forward"] = forward

    def _enter(self, paths: list[str], given: Any) -> str:
        path = paths[0] if len(paths) == 1 else self._reached(paths)
        self._stack.append(path)
        self.calls[path] += 1
        if self.calls[path] == 1:
            self.inputs[path] = shapes(given)
        self._new(given)
        return path

    def _reached(self, paths: list[str]) -> str:
        """The path of a tied module by which it was called: below the module that calls, the least called one."""
        for caller in reversed(self._stack):
            inside = [path for path in paths if path.startswith(f"{caller}." if caller else "")]
            if inside:
                return min(inside, key=self.calls.__getitem__)
        return min(paths, key=self.calls.__getitem__)

    def _leave(self, path: str, out: Any) -> None:
        if path not in self.outputs:
            self.outputs[path] = shapes(out)
        self.activations[path] += sum(tensor.numel() * tensor.element_size() for tensor in self._new(out))

    def _new(self, value: Any) -> list[torch.Tensor]:
        """The tensors whose memory was not seen before."""
        found = []
        for tensor in tensors(value):
            tensor = unwrap_tensor(tensor)
            if tensor.layout is not torch.strided:
                continue
            storage = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]  # torch's own
            if storage not in self._storages:
                self._storages.add(storage)
                found.append(tensor)
        return found

    def _fail(self, path: str, module: nn.Module, given: Any, error: Exception) -> None:
        known = self.failure.error if self.failure else None
        if known is None or known not in (error, error.__cause__, error.__context__):
            weights = {name: tuple(each.shape) for name, each in module._parameters.items() if each is not None}
            self.failure = Failure(path, type(module).__name__, weights, shapes(given), error)

    def count(self, name: str, args: Any, kwargs: Any, out: Any) -> None:
        """Credit a function's multiply-adds to the module that is running."""
        try:
            self.macs[self._stack[-1] if self._stack else ""] += count(name, args, kwargs, out)
        except (AssertionError, AttributeError, IndexError, RuntimeError, StopIteration, TypeError, ValueError):
            self.uncounted.add(name)


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Calls again, one by one, what TorchScript computes, so that `Functions` sees it. It comes with much to import."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def _by_operators(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def watched(*args: Any, **kwargs: Any) -> Any:
        with _Operators():  # type: ignore[no-untyped-call]  # torch's own
            return function(*args, **kwargs)

    return watched


class Functions(TorchFunctionMode):
    """Sees every torch function, counts it, and keeps all of them on meta if asked to.

    Args:
        recorder: Told of what is computed.
        meta: Keep on meta what is moved to another device.
    """

    def __init__(self, recorder: Recorder, meta: bool) -> None:
        super().__init__()
        self._recorder = recorder
        self._meta = meta

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return func(*args, **(kwargs or {}))
        kwargs = kwargs or {}
        out = self._call_on_meta(func, name, args, kwargs) if self._meta else func(*args, **kwargs)
        self._recorder.used.update(id(arg) for arg in args if isinstance(arg, nn.Parameter))
        plain = name.partition(".")[0]
        if plain in RULES:
            self._recorder.count(plain, args, kwargs, out)
        return out

    def _call_on_meta(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        if name in _MOVES and args and isinstance(args[0], torch.Tensor):
            return args[0]
        if name == "to":
            args, kwargs = _stay(args, kwargs)
        elif name in _FACTORIES or kwargs.get("device") is not None:
            return _call_factory(func, name, args, kwargs)
        check(func, args, kwargs)
        if not is_transforming() and not torch.is_grad_enabled():
            # under torch.vmap a tensor's shape is not all there is of it, and a shape alone has no gradient
            out = shaped(name, args, kwargs)
            if out is not NotImplemented:
                return out
        try:
            return func(*args, **kwargs)
        except (RuntimeError, TypeError):
            moved, named = _moved(args), _moved(kwargs)
            if "grouped_mm" in name:  # its meta kernel takes bfloat16 alone
                return func(*(_lowered(each) for each in moved), **named).to(args[0].dtype)
            if moved is args and named is kwargs:
                raise
            return func(*moved, **named)


def _call_factory(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """Make a tensor where the forward wants it: a function may keep it for the next call of the model itself.

    On meta, masks and positions that are small are made for real, for a forward that looks at their values.
    """
    size = _elements(name, args, kwargs)
    if str(kwargs.get("device")) == "meta":  # the device of another tensor
        if name in _READ and size <= SMALL:
            return func(*args, **{key: value for key, value in kwargs.items() if key != "device"})
        out = shaped(name, args, kwargs)
        return func(*args, **kwargs) if out is NotImplemented else out
    on_meta = {key: value for key, value in kwargs.items() if key not in _ON_DEVICE} | {"device": "meta"}
    if any(isinstance(each, torch.Tensor) and each.is_meta for each in args) and name in _FACTORIES:
        return func(*args, **on_meta)  # of a value that is not known
    if name not in _FROM_DATA and size > LARGE:
        raise NotImplementedError(f"{name} makes a tensor of {size:,} elements that is not on meta")
    try:
        return func(*args, **kwargs)
    except (AssertionError, RuntimeError):
        if kwargs.get("device") is None:
            raise
        return func(*args, **on_meta)  # a device that is not there: nothing made on it can have been kept


def _elements(name: str, args: Any, kwargs: Mapping[str, Any]) -> int:
    """Return about how many elements a factory is asked for."""
    if name.endswith("_like"):
        return int(args[0].numel())
    if name in ("arange", "range") and all(isinstance(each, int) for each in args):
        return len(range(*args))
    shape = next((each for each in (*args, *kwargs.values()) if isinstance(each, (tuple, list))), args)
    return prod(each for each in shape if isinstance(each, int))


def _lowered(value: Any) -> Any:
    return value.bfloat16() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _stay(args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The arguments of `to` with the device that the tensor is on."""
    device = args[0].device
    kept = {key: device if key == "device" and value is not None else value for key, value in kwargs.items()}
    return tuple(device if isinstance(arg, (torch.device, str)) else arg for arg in args), kept


def _moved(value: Any) -> Any:
    """The same arguments with every tensor on meta; the same object where they all are."""
    if isinstance(value, torch.Tensor):
        return value if value.is_meta else to_meta(value)
    if type(value) in (tuple, list):
        items = [_moved(item) for item in value]
        return type(value)(items) if any(a is not b for a, b in zip(items, value, strict=True)) else value
    if type(value) is dict:
        moved = {key: _moved(item) for key, item in value.items()}
        return moved if any(moved[key] is not item for key, item in value.items()) else value
    return value
