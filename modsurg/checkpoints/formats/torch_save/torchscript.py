"""The state in an archive of torch.jit.save, whose pickle holds module objects. No code in it is compiled or run."""

import re
from collections.abc import Callable, Iterator
from typing import Final

from modsurg.checkpoints.formats.torch_save.tensors import Stored
from modsurg.checkpoints.formats.torch_save.unpickler import Made, Name
from modsurg.errors import FormatError

ROOT: Final = "__torch__"
_DEEPEST: Final = 100
_LISTS: Final = re.compile(r"\s+__parameters__ = \[(.*)\]\s+__buffers__ = \[(.*)\]")


def is_scripted(value: object) -> bool:
    """Whether it is an object of a class that TorchScript compiled."""
    return isinstance(value, Made) and isinstance(value.maker, Name) and value.maker.module.split(".")[0] == ROOT


def scripted_state(module: Made, code: Callable[[str], str]) -> dict[str, Stored]:
    """Parameters and buffers, those of a module before those of its children.

    Args:
        module: What the pickle holds.
        code: Gives the source text of a file of the archive, `""` for none. The text says which tensors are parameters
            and buffers; without it, every tensor is taken.

    Raises:
        FormatError: A module that keeps its state in its own way, as packed quantised ones do.
    """
    return dict(_walk(module, code, "", 0))


def _walk(module: Made, code: Callable[[str], str], prefix: str, depth: int) -> Iterator[tuple[str, Stored]]:
    if not isinstance(module.state, dict) or depth > _DEEPEST:
        raise FormatError(
            f"it is TorchScript, and {prefix.rstrip('.') or 'its module'} keeps its state in a way of its own: "
            "save_state(torch.jit.load(path).state_dict(), 'state.safetensors') unpacks it"
        )
    for name in _declared(module, code):
        item = module.state.get(name)
        if isinstance(item, Stored):
            yield f"{prefix}{name}", item
    for name, item in module.state.items():
        if isinstance(item, Made) and is_scripted(item):
            yield from _walk(item, code, f"{prefix}{name}.", depth + 1)


def _declared(module: Made, code: Callable[[str], str]) -> list[str]:
    """The names of the parameters and buffers, as the class lists them."""
    assert isinstance(module.maker, Name)
    text = code(f"code/{module.maker.module.replace('.', '/')}.py")
    start = text.find(f"class {module.maker.name}(Module):\n")
    lists = _LISTS.match(text, text.find("\n", start)) if start >= 0 else None
    if lists is None:
        return [str(name) for name in module.state]
    return re.findall(r'"([^"]*)"', lists[1] + lists[2])
