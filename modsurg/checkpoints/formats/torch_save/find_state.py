"""Where the state_dict is in what somebody gave to torch.save: at the top, inside a checkpoint, or in TorchScript."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final

import torch

from modsurg.checkpoints.formats.torch_save.module import is_module, module_state, module_tree
from modsurg.checkpoints.formats.torch_save.tensors import Stored
from modsurg.checkpoints.formats.torch_save.torchscript import is_scripted, scripted_state
from modsurg.checkpoints.formats.torch_save.unpickler import Made, Name, Ordered, Unpickled, shown
from modsurg.errors import FormatError, TrustError

STATE_NAMES: Final = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "module",
    "network",
    "net",
    "params_ema",
    "params",
    "weights",
    "state_dict_ema",
    "model_ema",
    "ema",
)
_HARMLESS: Final = (
    "numpy.",
    "collections.",
    "datetime.",
    "pathlib.",
    "builtins.range",
    "builtins.slice",
    "builtins.frozenset",
    "copyreg._reconstructor",
    "torch.serialization._get_layout",
    "torch._utils._rebuild_",
    "torch._tensor._rebuild_from_type_v2",
    "torch.jit._pickle.",
)
_KINDS: Final = {
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_qtensor": "a quantised tensor",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch.nested._internal.nested_tensor.NestedTensor": "a nested tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor on meta, without values",
}
_DEEPEST: Final = 100
_NESTED: Final = 4


@dataclass(frozen=True)
class Pickled:
    """A value that lies pickled in a place of its own, by the name of that place."""

    key: str


@dataclass
class Found:
    """The state in a checkpoint.

    Attributes:
        taken: Where in the file it was, `""` for the top.
        left: What lay beside it and was left.
        plain: What of that is a number, a text or None.
        tensors: By key, in the order of the file.
        extra: Values of `get_extra_state`, by key, tensors in them still `Stored`.
        order: All the keys.
        versions: Module path -> its `_version`, where it is not 1.
        tree: Of a whole model, what `outline` reads.
    """

    taken: str
    left: list[str]
    plain: dict[str, object] = field(default_factory=dict)
    tensors: dict[str, Stored] = field(default_factory=dict)
    extra: dict[str, object] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    versions: Mapping[str, int] = field(default_factory=dict)
    tree: Mapping[str, Any] | None = None


def find_state(pickle: Unpickled, code: Callable[[str], str] = lambda name: "", part: str | None = None) -> Found:
    """The state_dict in a checkpoint: the top, what lies under one of `STATE_NAMES`, or the only dict of tensors.

    Of a whole model it is the tensors; its classes need not exist. Several dicts of tensors under other names (a
    generator and its discriminator) are taken together, each with its name before its keys.

    Args:
        pickle: What was saved.
        code: Gives the source text of a file of a TorchScript archive.
        part: Where the state is, in the words of `Found.left`, instead of looking for it. Tensors may lie deeper there,
            as in the state of an optimizer.

    Raises:
        TrustError: The file wants something called that is no data, or an object of some class stands for a weight.
        FormatError: A tensor, or anything else that is no state; nothing at `part`.
    """
    value = pickle.value if part is None else _at(pickle.value, part)
    path = [part] if part else []
    if isinstance(value, Made) and is_scripted(value):
        return _collect(scripted_state(value, code), Found("", []))
    if is_module(value):
        return _collect(module_state(value), Found(".".join(path), [], tree=module_tree(value).of_state()))
    _refuse_calls(pickle.made)
    if not isinstance(value, dict):
        raise FormatError(
            f"it holds {_kind(value)}, not a state_dict: use torch.load(path, weights_only=True), or save a state_dict"
        )
    left: list[str] = []
    plain: dict[str, object] = {}
    while len(path) < _NESTED and (name := _inner(value)) is not None:
        beside = {".".join((*path, shown(key))): item for key, item in value.items() if key != name}
        left += beside
        plain |= {key: item for key, item in beside.items() if _is_plain(item)}
        path.append(name)
        value = value[name]
        if is_module(value):
            return _collect(module_state(value), Found(".".join(path), left, plain, tree=module_tree(value).of_state()))
    state = _joined(value)
    if part is not None and not any(isinstance(item, Stored) for item in state.values()):
        state = dict(_flat(value))
    return _collect(state, Found(".".join(path), left, plain))


def find_models(value: Any, part: str | None = None) -> dict[str, Made]:
    """The whole models in what was saved, by their part: the top itself, or what lies under keys of dictionaries."""
    if part is not None:
        inner = _at(value, part)
        return {part: inner} if is_module(inner) else {}
    if is_module(value):
        return {"": value}
    found: dict[str, Made] = {}
    level: list[tuple[str, Any]] = [("", value)]
    met: set[int] = set()
    for _ in range(_NESTED):
        dictionaries = [(at, item) for at, item in level if isinstance(item, dict) and id(item) not in met]
        met.update(id(item) for _, item in dictionaries)
        level = [
            (f"{at}.{key}".strip("."), each)
            for at, item in dictionaries
            for key, each in item.items()
            if type(key) is str
        ]
        found |= {at: item for at, item in level if is_module(item)}
    return found


def rebuild(value: object, key: str, read: Callable[[Any], object]) -> Any:
    """Extra state as it was, with its leaves (`Stored` and `Pickled`) read.

    Args:
        value: As it was unpickled.
        key: Named in errors.
        read: Gives the value of a leaf.

    Raises:
        TrustError: An object of some class is in it.
        FormatError: It goes deeper than data does.
    """
    return _Rebuilding(key, read, {}).give(value, 0)


@dataclass
class _Rebuilding:
    """What stands at several places in the value is made once, so that shared containers take no time to unfold."""

    key: str
    read: Callable[[Any], object]
    done: dict[int, object]

    def give(self, value: Any, depth: int) -> Any:
        if depth > _DEEPEST:
            raise FormatError(f"{self.key} holds containers inside one another without an end")
        if id(value) not in self.done:
            self.done[id(value)] = self._make(value, depth + 1)
        return self.done[id(value)]

    def _make(self, value: Any, depth: int) -> object:
        if isinstance(value, Stored | Pickled):
            return self.read(value)
        if isinstance(value, Made | Name):
            dtype = getattr(torch, value.name, None) if isinstance(value, Name) and value.module == "torch" else None
            if isinstance(dtype, torch.dtype):
                return dtype
            raise _untrusted(f"{self.key} holds", value)
        if isinstance(value, dict):
            return {name: self.give(item, depth) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.give(item, depth) for item in value)
        return value


def _at(value: Any, part: str) -> Any:
    """What lies at a dotted path of keys, each of which may have dots in it."""
    if not part:
        return value
    keys = [key for key in value if isinstance(key, str)] if isinstance(value, dict) else []
    for key in keys:
        if part == key or part.startswith(f"{key}."):
            return _at(value[key], part[len(key) + 1 :])
    raise FormatError(f"there is no part {part!r} in it. It holds: {', '.join(map(shown, keys[:8])) or _kind(value)}")


def _inner(value: Mapping[Any, Any]) -> str | None:
    """The key under which the state is, None if this is the state."""
    for name in STATE_NAMES:
        if name in value and _leads(value[name]):
            return name
    if any(isinstance(item, Stored) for item in value.values()):
        return None
    inner = _dicts(value)
    return inner[0] if len(inner) == 1 else None


def _dicts(value: Mapping[Any, Any]) -> list[str]:
    """The keys of the dictionaries and models in which there are tensors; an optimizer's do not count."""
    return [key for key, item in value.items() if isinstance(key, str) and "optim" not in key and _leads(item)]


def _leads(value: object) -> bool:
    """Whether a state or a whole model is in there."""
    seen: set[int] = set()
    level = [value]
    for _ in range(_NESTED):
        if any(is_module(item) for item in level):
            return True
        inside = [item for item in level if isinstance(item, dict) and id(item) not in seen]
        seen.update(map(id, inside))
        named = [pair for item in inside for pair in item.items() if isinstance(pair[0], str)]
        if any(isinstance(item, Stored) for _, item in named):
            return True
        level = [item for key, item in named if "optim" not in key]
    return False


def _joined(value: Mapping[Any, Any], depth: int = 0) -> Mapping[Any, Any]:
    """The dictionaries in `value`, with their names before their keys; itself, if the tensors are in it."""
    several = [] if any(isinstance(item, Stored) for item in value.values()) else _dicts(value)
    if not several or depth > _NESTED:
        return value
    parts = {name: value[name] for name in several}
    states = {name: module_state(part) if is_module(part) else _joined(part, depth + 1) for name, part in parts.items()}
    return {f"{name}.{key}": item for name, state in states.items() for key, item in state.items()}


def _flat(value: object) -> Iterator[tuple[str, object]]:
    """What lies in nested dictionaries and lists, by dotted keys; what is there more than once, at its first place."""
    met: set[int] = set()
    waiting: list[tuple[tuple[str, ...], object]] = [((), value)]
    while waiting:
        path, value = waiting.pop()
        if len(path) > _DEEPEST:
            raise FormatError(f"{'.'.join(path[:3])} holds containers inside one another without an end")
        if not isinstance(value, dict | list | tuple):
            yield ".".join(path), value
        elif id(value) not in met:
            met.add(id(value))
            items = list(value.items() if isinstance(value, dict) else enumerate(value))
            waiting += [((*path, shown(key)), item) for key, item in reversed(items)]


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _collect(value: Mapping[Any, Any], found: Found) -> Found:
    for key, item in value.items():
        if isinstance(item, Stored) and isinstance(key, str):
            found.tensors[key] = item
        elif isinstance(key, str) and key.rpartition(".")[2] == "_extra_state":
            found.extra[key] = item
        elif isinstance(item, Stored):
            raise FormatError(f"a tensor stands under the key {shown(key)}, which is no text, so it is no state_dict")
        elif isinstance(item, Made):
            _refuse_object(shown(key), item)
            found.left.append(shown(key))
            continue
        else:
            found.left.append(shown(key))
            if _is_plain(item):
                found.plain[shown(key)] = item
            continue
        found.order.append(key)
    if not found.order and value:
        items = (f"{shown(key)} {item!r:.60}" if _is_plain(item) else shown(key) for key, item in value.items())
        raise FormatError(f"there is no state_dict in it. It holds: {', '.join(islice(items, 8))}")
    metadata = value.state.get("_metadata") if isinstance(value, Ordered) and isinstance(value.state, dict) else None
    found.versions = _versions(metadata)
    return found


def _versions(metadata: object) -> dict[str, int]:
    if not isinstance(metadata, dict):
        return {}
    local = {path: item.get("version") for path, item in metadata.items() if isinstance(item, dict)}
    return {path: n for path, n in local.items() if isinstance(path, str) and type(n) is int and n != 1}


def _refuse_calls(made: list[Made]) -> None:
    for item in made:
        if item.called and not shown(item.maker).startswith(_HARMLESS):
            raise _untrusted("it wants to call", item)


def _refuse_object(key: str, item: Made) -> None:
    kind = _KINDS.get(shown(item.maker))
    if kind is not None:
        raise FormatError(f"{key} is {kind}: only torch.load(path, weights_only=True) can read it")
    if not item.called:
        raise _untrusted(f"{key} is an object of", item)


def _untrusted(what: str, value: Made | Name) -> TrustError:
    name = shown(value if isinstance(value, Name) else value.maker)
    loaded, place = "torch.load(path, weights_only=False)", "If you trust whoever made the file"
    if name.endswith(".DTensor"):
        loaded = f"{{key: value.full_tensor() for key, value in {loaded}.items()}}"
        place += ", in a process group of as many ranks as wrote it"
    return TrustError(
        f"{what} {name}, which is no data. Nothing of it ran. {place}: save_state({loaded}, 'state.safetensors')"
    )


def _kind(value: object) -> str:
    if isinstance(value, Made):
        return f"an object of {shown(value.maker)}"
    return "a tensor" if isinstance(value, Stored) else f"a {type(value).__name__}"
