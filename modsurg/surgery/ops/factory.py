"""The new module for each site: from a module, a class or a function."""

import copy
import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

from torch import nn

from modsurg.errors import EditError, ModsurgError

New: TypeAlias = (
    nn.Module | type[nn.Module] | Callable[[Any], nn.Module | None] | Callable[[Any, str], nn.Module | None]
)
Maker: TypeAlias = Callable[[nn.Module, str], nn.Module | None]


def maker(new: New, sites: int) -> Maker:
    """A function (old, path) -> new module.

    Args:
        new: A module (for one site; without parameters it is copied for each of several), a module class, called
            without arguments, or `fn(old)` / `fn(old, path)`.
        sites: How many sites there are.

    Raises:
        EditError: A module with parameters for several sites, or something that makes no module.
    """
    if isinstance(new, nn.Module):
        return _from_module(new, sites)
    if isinstance(new, type) and issubclass(new, nn.Module):
        kind = new
        return lambda old, path: _construct(kind, path)
    if not callable(new):
        raise EditError(
            f"{new!r} makes no module; give a module, a module class such as nn.ReLU, or a function (old) -> module."
        )
    return caller(new)


def caller(function: Callable[..., object]) -> Maker:
    """Call `function(old)` or `function(old, path)`, as it wants, and check what it returns.

    Raises:
        EditError: It is not a function, as a module given as a wrapper, or takes other arguments.
    """
    if isinstance(function, nn.Module) or not callable(function):
        kind = type(function).__name__
        raise EditError(
            f"a wrapper is a class, or a function of the old module, not a {kind} that is there already; "
            "make it around the old one: lambda old: nn.Sequential(old, new)."
        )
    wants_path = _wants_path(function)

    def make(old: nn.Module, path: str) -> nn.Module | None:
        try:
            made = function(old, path) if wants_path else function(old)
        except ModsurgError:
            raise
        except Exception as error:
            error.add_note(f'It was called for "{path}" ({type(old).__name__}); nothing was changed.')
            raise
        if made is not None and not isinstance(made, nn.Module):
            raise EditError(
                f'for "{path}" the function returned a {type(made).__name__}, not a module; '
                "return a module, or None to leave this one as it is."
            )
        return made

    return make


def _from_module(new: nn.Module, sites: int) -> Maker:
    if sites == 1:
        return lambda old, path: new
    if next(new.parameters(), None) is not None:
        name = type(new).__name__
        raise EditError(
            f"one {name} with parameters for {sites} sites would tie them together. "
            f"Make one for each: lambda old: {name}(...)."
        )
    first = [new]
    return lambda old, path: first.pop() if first else copy.deepcopy(new)


def _construct(kind: type[nn.Module], path: str) -> nn.Module:
    try:
        return kind()
    except TypeError as error:
        raise EditError(
            f'{kind.__name__}() for "{path}" failed: {error}. '
            f"Say how to make it from the old one: lambda old: {kind.__name__}(...)."
        ) from error


def _wants_path(function: Callable[..., object]) -> bool:
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:
        return False
    if not accepts(function, 1) and not accepts(function, 2):
        raise EditError(
            f"{function!r} can't be called with the old module, nor with it and its path; "
            "write it as (old) or (old, path): lambda old: nn.GELU()."
        )
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in positional if p.default is p.empty]
    return len(required) >= 2 or (len(positional) >= 2 and positional[1].name == "path")


def accepts(function: Callable[..., object], count: int) -> bool:
    """Whether the function can be called with so many arguments, as far as it says what it takes."""
    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:  # of C
        pass
    return True
