"""Does the edited model still run? Asked on meta tensors, before the edit is committed."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import nn

from modsurg.errors import ExampleError
from modsurg.tracing.trace import run
from modsurg.tree.walk import walk

Example: TypeAlias = torch.Tensor | tuple[Any, ...] | Mapping[str, Any]


def preflight(root: nn.Module, example: Example, fresh: Iterable[nn.Module]) -> list[str]:
    """Run a shadow of the model; nothing is computed, and nothing of the model is touched.

    Args:
        root: The edited model.
        example: A tensor, a tuple of arguments, a dict of keyword arguments, or a shape.
        fresh: The new modules: those that are never called become warnings.

    Returns:
        Warnings.

    Raises:
        ExampleError: The forward fails; the message names the first module that does, and the shapes.
    """
    trace = run(root, example)
    if trace.failure is not None:
        raise ExampleError(f"the edited model does not run on the example; nothing was changed. {trace.failure}")
    warnings = [f"the example was {trace.note}"] if trace.note else []
    paths = walk(root).paths
    uncalled = set(trace.uncalled)
    for module in fresh:
        for path in paths.get(id(module), ())[:1]:
            if path in uncalled:
                why = trace.bypassed.get(path, "the forward of its parent does not use it")
                warnings.append(f'"{path}" ({type(module).__name__}) is never called: {why}.')
    return warnings
