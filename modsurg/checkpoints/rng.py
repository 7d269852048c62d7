"""The random states of a process: python, numpy where it is imported, torch on the CPU and on accelerators."""

import random
import sys
from typing import Any

import torch

from modsurg.errors import FormatError


def seed(number: int) -> None:
    """Seed python, numpy where it is imported, and torch on every device."""
    random.seed(number)
    torch.manual_seed(number)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(number % 2**32)


def random_states() -> dict[str, Any]:
    """Give the state of every generator that a training step may draw from, as plain data and tensors.

    Example:
        >>> states = random_states()
        >>> first = torch.rand(3)
        >>> set_random_states(states)
        >>> torch.equal(torch.rand(3), first)
        True
    """
    states: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if "numpy" in sys.modules:
        states["numpy"] = sys.modules["numpy"].random.get_state()
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch has no types here
        states["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state()
    return states


def check_random_states(states: dict[str, Any]) -> None:
    """See that `set_random_states` will take these; nothing is set.

    Raises:
        FormatError: No states, or damaged ones.
    """
    try:
        random.Random().setstate(states["python"])
        torch.Generator().set_state(states["torch"])
        if "numpy" in states:
            import numpy

            numpy.random.RandomState().set_state(states["numpy"])
        accelerators = [*states.get("cuda", ()), *([states["mps"]] if "mps" in states else [])]
        if not all(isinstance(state, torch.Tensor) and state.dtype == torch.uint8 for state in accelerators):
            raise TypeError("the state of an accelerator is not a tensor of bytes")
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError, OverflowError) as error:
        raise FormatError(f"the random states in it are damaged: {error}") from error


def set_random_states(states: dict[str, Any]) -> None:
    """Set what `random_states` gave. Accelerators that this machine does not have are left out."""
    random.setstate(states["python"])
    torch.set_rng_state(states["torch"])
    if "numpy" in states:
        import numpy

        numpy.random.set_state(states["numpy"])
    if len(states.get("cuda", ())) == torch.cuda.device_count() > 0:
        torch.cuda.set_rng_state_all(states["cuda"])
    if "mps" in states and torch.backends.mps.is_available():
        torch.mps.set_rng_state(states["mps"])
