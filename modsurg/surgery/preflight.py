"""Check on meta tensors that an edited model runs, before the edit is committed."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import nn

from modsurg.errors import ExampleError, listed
from modsurg.tracing.trace import Trace, run
from modsurg.tree.walk import parents, walk

Example: TypeAlias = torch.Tensor | tuple[Any, ...] | Mapping[str, Any]


def preflight(root: nn.Module, example: Example, fresh: Iterable[nn.Module]) -> list[str]:
    """Run a copy of the model on meta; nothing is computed, and nothing of the model is touched.

    Args:
        root: The edited model.
        example: A tensor, a tuple of arguments, a dict of keyword arguments, or a shape.
        fresh: The new modules: those that are never called become warnings.

    Returns:
        Warnings.

    Raises:
        ExampleError: The forward fails; the message names the first module that does, and the shapes.
    """
    trace = run(root, example, keep_mode=True)
    if trace.failure is not None:
        hint = f"\n{trace.hint}" if trace.hint else ""
        raise ExampleError(f"the edited model does not run on the example; nothing was changed. {trace.failure}{hint}")
    warnings = [f"the example was {trace.note}"] if trace.note else []
    return warnings + _warn_of_uncalled(walk(root).paths, trace, fresh)


def _warn_of_uncalled(paths: Mapping[int, list[str]], trace: Trace, fresh: Iterable[nn.Module]) -> list[str]:
    """Write one warning for each cause, however many modules it concerns; what lies inside one is not repeated."""
    uncalled = set(trace.uncalled)
    by_cause: dict[str, list[str]] = {}
    for module in fresh:
        for path in paths.get(id(module), ())[:1]:
            if path in uncalled and uncalled.isdisjoint(set(parents(path)) - {""}):
                why = trace.bypassed.get(path, "the forward of its parent does not use it")
                by_cause.setdefault(why, []).append(f'"{path}" ({type(module).__name__})')
    return [
        f"{listed(names, 3)} {'is' if len(names) == 1 else 'are'} never called: {why}."
        for why, names in by_cause.items()
    ]
