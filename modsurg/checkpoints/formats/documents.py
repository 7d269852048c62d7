"""What a file says of itself in its metadata, above all one of `save_checkpoint`; read without torch."""

from collections.abc import Container
from typing import Final

RUN: Final = "modsurg.run"
"""The name in the metadata under which a run says what it holds."""
TIES: Final = "modsurg.ties"
"""The name under which tied tensors stand: position, name and stored name of each."""
UNREADABLE: Final = (LookupError, TypeError, ValueError, AttributeError, RecursionError)
EXTRA_STATE: Final = "_extra_state"
"""The last segment of the key under which torch keeps what a module gives besides tensors."""


def is_state(state: object, tensors: Container[object]) -> bool:
    """Whether a state in a run is that of a module: tensors that the file has, and nothing else but extra state.

    Args:
        state: As the run says it.
        tensors: Names of the tensors in the file.

    Example:
        >>> is_state({"weight": {"$tensor": "model.weight"}}, {"model.weight"}), is_state({"lr": 0.1}, set())
        (True, False)
    """
    if not isinstance(state, dict):
        return False
    values = [value for key, value in state.items() if key.rpartition(".")[2] != EXTRA_STATE]
    return bool(values) and all(isinstance(value, dict) and value.get("$tensor") in tensors for value in values)
