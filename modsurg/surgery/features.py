"""Outputs of inner modules: `features` as a module of its own, `capture` while the model runs as usual."""

import copy
import inspect
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only  # torch has no public name for walking nested outputs

from modsurg.errors import EditError, ExampleError, WrapperError
from modsurg.surgery.preflight import Example
from modsurg.tracing.inputs import arguments, dtypes_to_try
from modsurg.tracing.trace import Trace, run, shadow
from modsurg.tree.selection import Where, resolve
from modsurg.tree.walk import walk
from modsurg.tree.wrappers import unwrap, wrapper_kind

_PARALLEL = ("DDP", "DataParallel")


class FeatureExtractor(nn.Module):
    """A model whose call returns the outputs of some of its modules; see `features`.

    Its parameters, buffers, keys and mode are those of the model, which it holds and does not change.

    Attributes:
        model: The model itself.
        paths: The paths whose outputs are returned, in order.
        whole: Whether the model always runs to its end.
        counts: How often each path is called, for each shape of the inputs that was seen; None where it is not known.
        fixed: The same for every shape, of a model that was cut.
    """

    model: nn.Module
    paths: list[str]
    whole: bool
    counts: dict[str, dict[str, int] | None]

    fixed: dict[str, int] | None

    def __init__(
        self, model: nn.Module, paths: Sequence[str], whole: bool = False, fixed: dict[str, int] | None = None
    ) -> None:
        super().__init__()
        inner = _inside(model)
        # The same dictionaries, so that keys and tensors are the model's.
        for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[name] = inner.__dict__[name]
        self.__dict__.update(
            model=model, paths=list(paths), whole=whole, training=inner.training, counts={}, fixed=fixed
        )

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Run the model up to the last output that is wanted.

        Returns:
            The output of each path, in the order of `paths`; a list where the module was called several times.
        """
        counts = self.fixed or (None if self.whole else self._count_calls(args, kwargs))
        return self.run(counts, args, kwargs)

    def run(self, counts: Mapping[str, int] | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Run the model until each path was called so many times; whole, if that is not known."""
        left = sum(counts.values()) if counts else 0
        seen: dict[str, list[Any]] = {path: [] for path in self.paths}

        def keep(path: str, output: Any) -> None:
            nonlocal left
            left -= 1
            seen[path].append(output if left == 0 else _clone(output))
            if left == 0:
                raise _LastOutput

        modules = walk(_inside(self.model)).modules
        with ExitStack() as hooks:
            for path in self.paths:
                hooks.callback(modules[path].register_forward_hook(partial(_give, partial(keep, path))).remove)
            with suppress(_LastOutput):
                unwrap(self.model)(*args, **kwargs)
        for path in self.paths:
            if not seen[path]:
                raise EditError(_never_called(_inside(self.model), path, None))
        return {path: found[0] if len(found) == 1 else found for path, found in seen.items()}

    def _count_calls(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, int] | None:
        """How often each path is called with inputs of these shapes; None if that can't be found out on meta."""
        shapes = [
            tuple(each.shape) if isinstance(each, torch.Tensor) else type(each) for each in tree_leaves((args, kwargs))
        ]
        key = repr((self.training, list(kwargs), shapes))
        if key not in self.counts:
            example = _as_example(self.model, args, kwargs)
            trace = None if example is None else run(self.model, example, keep_mode=True)
            known = trace is not None and trace.failure is None and not trace.note
            self.counts[key] = check_calls(self.model, self.paths, trace) if known and trace is not None else None
        return self.counts[key]

    def train(self, mode: bool = True) -> "FeatureExtractor":
        """Set the mode of the model, and of this with it."""
        self.model.train(mode)
        self.training = mode
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The state of the model, under its own keys."""
        return _inside(self.model).state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state of the model."""
        return _inside(self.model).load_state_dict(state_dict, strict, assign)

    def extra_repr(self) -> str:
        """The paths."""
        return f"features of {', '.join(self.paths)}"


class _LastOutput(BaseException):
    """Ends a forward; no `except Exception` on the way catches it."""


def features(model: nn.Module, where: Where, *, example: Example | None = None, cut: bool = False) -> FeatureExtractor:
    """Make a module that returns what comes out of inner modules, and stops after the last one that is wanted.

    The model is not copied and not changed: the extractor holds it, has its parameters and its keys, and trains with
    it. Where the model stops is found on meta, once for each shape of the inputs. What is wrapped by torch.compile or
    DDP runs whole.

    Args:
        model: Any model. Forward hooks are set for the time of a call.
        where: See `select`; the outputs come in this order.
        example: What forward takes, as in `edit`. With it, a module that is never called is refused now, and not at the
            first call.
        cut: Return a copy that leaves out the modules that are not reached; needs `example`. `save_model` keeps it.

    Returns:
        A module. Its call takes what the model takes and returns `{path: output}`; a module that is called several
        times gives a list. Outputs are not detached.

    Raises:
        NoMatchError: Nothing matches.
        EditError: A container that is iterated and never called; the message names its last child.
        ExampleError: The model does not run on the example.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> found = features(model, ["0", "1"])(torch.ones(1, 4))
        >>> {path: tuple(output.shape) for path, output in found.items()}
        {'0': (1, 8), '1': (1, 8)}
    """
    root = _inside(model)
    if (kind := wrapper_kind(unwrap(model))) not in (None, *_PARALLEL):
        raise WrapperError(
            f"the model is a {kind} module, whose inner modules give no outputs. Try: features before wrapping."
        )
    paths = [site.path for site in resolve(walk(root), where, ordered=True)]
    for path in paths:
        if type(root.get_submodule(path)).forward is nn.Module.forward:
            raise EditError(_never_called(root, path, None))
    if cut and example is None:
        raise EditError(
            "cut=True needs an example, to find what is reached. Try: features(model, where, example=x, cut=True)"
        )
    if example is not None:
        trace = run(root, example, keep_mode=True)
        if trace.failure is not None:
            raise ExampleError(f"the model does not run on the example. {trace.failure}")
        counts = check_calls(root, paths, trace)
        if cut:
            return FeatureExtractor(_without_unreached(root, paths, counts, example), paths, fixed=counts)
    return FeatureExtractor(model, paths, whole=root is not model)


@contextmanager
def capture(
    model: nn.Module, where: Where, *, detach: bool = False, device: torch.device | str | None = None
) -> Generator[Mapping[str, Any]]:
    """Keep the outputs that pass at some modules while the model runs as usual: in training, in `generate`.

    Args:
        model: Any model. Forward hooks are set for the length of the block.
        where: See `select`.
        detach: Take the outputs out of the graph.
        device: Where to keep them; by default where they are.

    Yields:
        `seen`: `seen[path]` is the output, or a list where the module was called several times in the block. A path
        that was not called is absent.

    Raises:
        NoMatchError: Nothing matches.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        >>> with capture(model, "0", detach=True) as seen:
        ...     _ = model(torch.ones(1, 4))
        >>> seen["0"].shape, seen["0"].requires_grad
        (torch.Size([1, 8]), False)
    """
    sites = resolve(walk(_inside(model)), where, ordered=True)
    calls: dict[str, list[Any]] = {}
    seen = _Captured(calls)

    def keep(path: str, output: Any) -> None:
        def kept(tensor: torch.Tensor) -> torch.Tensor:
            tensor = tensor.detach() if detach else tensor
            return tensor.clone() if device is None else tensor.to(device, copy=True)

        calls.setdefault(path, []).append(tree_map_only(torch.Tensor, kept, output))

    with ExitStack() as hooks:
        for site in sites:
            hook = partial(_give, partial(keep, site.path))
            hooks.callback(site.module.register_forward_hook(hook).remove)
        yield seen


class _Captured(Mapping[str, Any]):
    """The outputs by path: one, or a list of several."""

    def __init__(self, calls: dict[str, list[Any]]) -> None:
        self._calls = calls

    def __getitem__(self, path: str) -> Any:
        found = self._calls[path]
        return found[0] if len(found) == 1 else list(found)

    def __iter__(self) -> Any:
        return iter(self._calls)

    def __len__(self) -> int:
        return len(self._calls)

    def __repr__(self) -> str:
        return f"<outputs of {', '.join(self._calls) or 'no module yet'}>"


def check_calls(model: nn.Module, paths: Sequence[str], trace: Trace) -> dict[str, int]:
    """How often each path is called.

    Raises:
        EditError: One is never called.
    """
    root = _inside(model)
    tree = walk(root)
    counts: dict[str, int] = {}
    for path in paths:
        aliases = tree.paths[id(tree.modules[path])]
        counts[path] = sum(trace.calls.get(alias, 0) for alias in aliases)
        if not counts[path]:
            raise EditError(_never_called(root, path, trace))
    return counts


def _inside(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of torch.compile and of data parallelism."""
    inner = unwrap(model)
    while wrapper_kind(inner) in _PARALLEL:
        inner = unwrap(inner.module)  # type: ignore[arg-type]  # both hold a module there
    return inner


def _never_called(root: nn.Module, path: str, trace: Trace | None) -> str:
    module = root.get_submodule(path)
    children = [f"{path}.{name}".strip(".") for name, child in module.named_children() if child is not None]
    if trace is not None:
        children = [child for child in children if trace.calls.get(child)]
    line = f' Try: "{children[-1]}", its last child that is called.' if children else ""
    return f'"{path}" ({type(module).__name__}) is never called, so nothing comes out of it.{line}'


def _give(keep: Callable[[Any], None], _module: nn.Module, _args: Any, output: Any) -> None:
    keep(output)


def _clone(output: Any) -> Any:
    """A copy that an in-place operation of the next module does not change."""
    return tree_map_only(torch.Tensor, torch.Tensor.clone, output)


def _as_example(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The arguments of a call as an example; None if they can't be written as one."""
    if not kwargs:
        return args
    if args:
        try:
            bound = inspect.signature(unwrap(model).forward).bind(*args, **kwargs)
        except TypeError:
            return None
        kwargs = dict(bound.arguments)
        parameters = inspect.signature(unwrap(model).forward).parameters
        if any(
            parameters[name].kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
            for name in kwargs
        ):
            return None
    return kwargs


def _without_unreached(root: nn.Module, paths: Sequence[str], counts: Mapping[str, int], example: Any) -> nn.Module:
    """A copy of the model without the modules that are not entered before the last output that is wanted.

    Raises:
        ExampleError: The model can't run on meta.
    """
    entered = _enter_until_last(root, paths, counts, example)
    if entered is None:
        raise ExampleError("the model does not run on meta, so that what it reaches is not known. Try: cut=False")
    modules = walk(root).modules
    reached = {id(modules[path]) for path in entered}
    unreached = {id(module): path for path, module in modules.items() if reached.isdisjoint(map(id, module.modules()))}
    outermost = [path for path in unreached.values() if id(modules[path.rpartition(".")[0]]) not in unreached]
    memo: dict[int, Any] = {key: nn.Identity() for key in unreached}
    short = copy.deepcopy(root, dict(memo))
    for path in outermost:
        parent, _, name = path.rpartition(".")
        del short.get_submodule(parent)._modules[name]
    if _enter_until_last(short, paths, counts, example) is None:  # forward looks at a module that it does not call
        return copy.deepcopy(root, memo)
    return short


def _enter_until_last(
    root: nn.Module, paths: Sequence[str], counts: Mapping[str, int], example: Any
) -> set[str] | None:
    """The paths that a run on meta enters before it stops after the last output; None if it fails."""
    for dtypes in dtypes_to_try(example):
        model = shadow(root)
        entered: set[str] = set()
        for path, module in walk(model).modules.items():
            module.register_forward_pre_hook(partial(_note_entry, entered, path))
        args, kwargs = arguments(example, model, dtypes)
        args, kwargs = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        try:
            with torch.no_grad():
                FeatureExtractor(model, paths).run(dict(counts), args, kwargs)
        except Exception:
            continue
        return entered
    return None


def _note_entry(entered: set[str], path: str, _module: nn.Module, _args: Any) -> None:
    entered.add(path)
