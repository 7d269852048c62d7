"""Where the state_dict is in what somebody gave to torch.save: at the top, inside a checkpoint, or in TorchScript."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final

import torch

from modsurg.checkpoints.formats.documents import EXTRA_STATE
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
_PLAIN_BUILTINS: Final = (
    *("bool", "int", "float", "complex", "str", "bytes", "bytearray", "object"),
    *("list", "tuple", "dict", "set", "frozenset", "range", "xrange", "slice", "getattr"),
)
_DANGEROUS: Final = (
    *("os", "posix", "nt", "posixpath", "ntpath", "io", "_io", "sys", "site", "shutil", "tempfile", "linecache"),
    *("subprocess", "multiprocessing", "threading", "asyncio", "commands", "signal", "pty", "platform", "webbrowser"),
    *("importlib", "imp", "pkgutil", "runpy", "code", "codeop", "bdb", "pdb", "profile", "trace", "timeit", "pydoc"),
    *("pickle", "_pickle", "dill", "joblib", "shelve", "marshal", "sqlite3", "ctypes", "operator", "_operator"),
    *("socket", "ssl", "http", "urllib", "requests", "ftplib", "smtplib"),
)
_DANGEROUS_PARTS: Final = (
    "torch.hub.",
    "torch.load",
    "torch.serialization.load",
    "torch.jit.load",
    "torch.package.",
    "torch.utils.cpp_extension.",
    "types.FunctionType",
    "types.CodeType",
    "types.MethodType",
)
_REBUILDS: Final = ("torch._utils.", "torch._tensor.", "torch.nn.parameter.")
_OPTIMIZER: Final = re.compile(r"((?<![A-Za-z])[oO]ptim|Optim)(i[sz]er)?s?(?![a-z])")
_KINDS: Final = {
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_qtensor": "a quantised tensor",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch.nested._internal.nested_tensor.NestedTensor": "a nested tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor on meta, without values",
}
_DEEPEST: Final = 100
_NESTED: Final = 4
_MOST_NAMES: Final = 250_000
_LONGEST_NAME: Final = 2000
_MOST_PLAIN: Final = 1000


@dataclass(frozen=True)
class Pickled:
    """A value that lies pickled in a place of its own, by the name of that place."""

    key: str


@dataclass
class Found:
    """The state in a checkpoint.

    Attributes:
        taken: Where in the file it was, `""` for the top.
        left: What lay beside it, by its place in the file.
        tensors: By key, in the order of the file.
        unreadable: Keys of the state whose tensors are not read here (sparse, quantised), and why.
        extra: Values of `get_extra_state`, by key, tensors in them still `Stored`.
        order: All the keys.
        versions: Module path -> its `_version`, where it is not 1.
        tree: Of a whole model, what `outline` reads.
    """

    taken: str
    left: dict[str, object] = field(default_factory=dict)
    tensors: dict[str, Stored] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    extra: dict[str, object] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    versions: Mapping[str, int] = field(default_factory=dict)
    tree: Mapping[str, Any] | None = None

    @property
    def plain(self) -> dict[str, object]:
        """What of `left` is a number, a text or None, or a short list or dictionary of those."""
        return {name: item for name, item in self.left.items() if _is_plain(item) or _is_plain_container(item)}

    def left_tensors(self) -> list[str]:
        """Find the names in `left` under which there are tensors, at any depth."""
        known: dict[int, bool] = {}
        return [name for name, item in self.left.items() if _holds_tensors(item, known)]


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
        TrustError: The file wants something called that is not data, or an object of some class stands for a weight.
        FormatError: A tensor, or anything else that is not a state; nothing at `part`.
    """
    value = pickle.value if part is None else _at(pickle.value, part)
    path = [part] if part else []
    if isinstance(value, Made) and is_scripted(value):
        return _collect(scripted_state(value, code), Found(""))
    if is_module(value):
        return _collect(module_state(value), Found(".".join(path), tree=module_tree(value).of_state()))
    _refuse_dangerous(pickle.made)
    if part is not None and isinstance(value, list | tuple):
        value = dict(_flat(value))
    if part is not None and isinstance(value, Stored):
        value = {part: value}
    if not isinstance(value, dict):
        if part is not None:
            raise FormatError(f"{part!r} is {_kind(value)}, not weights")
        raise FormatError(
            f"it holds {_kind(value)}, not a state_dict: use torch.load(path, weights_only=True), or save a state_dict"
        )
    left: dict[str, object] = {}
    while len(path) < _NESTED and (name := _inner(value)) is not None:
        left |= {_place(path, key): item for key, item in value.items() if key != name}
        path.append(name)
        value = value[name]
        if is_module(value):
            return _collect(module_state(value), Found(".".join(path), left, tree=module_tree(value).of_state()))
    state = _joined(value, path, left)
    if (part is not None or _is_optimizer(value)) and not any(isinstance(item, Stored) for item in state.values()):
        state = dict(_flat(value))
    return _collect(state, Found(".".join(path), left), path if part is None else ())


def _place(path: Sequence[str], key: object) -> str:
    return ".".join((*path, shown(key)))


def _holds_tensors(value: object, known: dict[int, bool], depth: int = 0) -> bool:
    """Whether there are tensors in a value; so deep that nobody looks there may be."""
    if (isinstance(value, Stored) and value.shape) or depth > _DEEPEST:
        return True
    if isinstance(value, Made):
        if shown(value.maker).startswith(_REBUILDS):
            return True
        inside = [value.args, value.state, value.items, value.pairs]
    elif isinstance(value, dict):
        inside = [*value.values(), getattr(value, "state", None)]
    elif isinstance(value, list | tuple | set | frozenset):
        inside = list(value)
    else:
        return False
    if id(value) not in known:
        known[id(value)] = False
        known[id(value)] = any(_holds_tensors(item, known, depth + 1) for item in inside)
    return known[id(value)]


def _is_optimizer(value: Mapping[Any, Any]) -> bool:
    """Whether it is the state_dict of an optimizer."""
    return isinstance(value.get("state"), dict) and isinstance(value.get("param_groups"), list)


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
    """What lies at a dotted path of keys, each of which may have dots in it, and of places in lists and tuples."""
    if not part:
        return value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    names = [(str(key), item) for key, item in items if isinstance(key, str | int)]
    for name, item in names:
        if part == name or part.startswith(f"{name}."):
            return _at(item, part[len(name) + 1 :])
    here = ", ".join(shown(name) for name, _ in names[:8]) or _kind(value)
    raise FormatError(f"there is no part {part!r} in it. It holds: {here}")


def _inner(value: Mapping[Any, Any]) -> str | None:
    """The key under which the state is, None if this is the state."""
    for name in STATE_NAMES:
        if name in value and _count(value[name]):
            return name
    inner = _states(value)
    return inner[0] if len(inner) == 1 else None


def _states(value: Mapping[Any, Any]) -> list[str]:
    """The keys of the dictionaries and models in which the tensors are; none if they are here.

    A few tensors beside dictionaries of more, or single numbers such as a loss, are not the state. An optimizer's
    tensors do not count.
    """
    counts = {
        key: _count(item)
        for key, item in value.items()
        if isinstance(key, str) and not _OPTIMIZER.search(key) and key.rpartition(".")[2] != EXTRA_STATE
    }
    inner = [key for key, count in counts.items() if count]
    loose = [item for item in value.values() if isinstance(item, Stored)]
    few = len(loose) < sum(counts.values()) or all(not item.shape for item in loose)
    return inner if few else []


def _count(value: object) -> int:
    """How many tensors are in dictionaries and whole models at most so deep, each container counted once."""
    seen: set[int] = set()
    level = [value]
    count = 0
    for _ in range(_NESTED):
        count += sum(is_module(item) for item in level)
        inside = [item for item in level if isinstance(item, dict) and id(item) not in seen]
        seen.update(map(id, inside))
        named = [pair for item in inside for pair in item.items() if isinstance(pair[0], str)]
        count += sum(isinstance(item, Stored) for _, item in named)
        level = [item for key, item in named if not _OPTIMIZER.search(key)]
    return count


def _joined(value: Mapping[Any, Any], path: Sequence[str], left: dict[str, object]) -> Mapping[Any, Any]:
    """The dictionaries in `value`, with their names before their keys; itself, if the tensors are in it.

    Args:
        value: Where to look.
        path: Its place in the file.
        left: Receives what is beside the dictionaries.
    """
    several = _states(value) if len(path) <= _NESTED else []
    if not several:
        return value
    left |= {_place(path, key): item for key, item in value.items() if key not in several}
    joined: dict[str, object] = {}
    for name in several:
        part = value[name]
        state = module_state(part) if is_module(part) else _joined(part, (*path, name), left)
        joined |= {f"{name}.{key}": item for key, item in state.items()}
        if len(joined) > _MOST_NAMES:
            raise FormatError(f"it has more than {_MOST_NAMES:,} tensors by name: choose a part of it")
    return joined


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


def _is_plain_container(value: object) -> bool:
    """Whether this is a dictionary or a list that prints shortly, however often it holds the same one."""
    waiting, budget = [value], _MOST_PLAIN
    while waiting:
        item = waiting.pop()
        budget -= 1
        if isinstance(item, dict | list | tuple):
            keys, items = (list(item), list(item.values())) if isinstance(item, dict) else ([], list(item))
            if len(items) > budget or not all(map(_is_plain, keys)):
                return False
            waiting += items
        elif budget < 0 or not _is_plain(item):
            return False
    return isinstance(value, dict | list | tuple)


def _collect(value: Mapping[Any, Any], found: Found, path: Sequence[str] = ()) -> Found:
    for key, item in value.items():
        if isinstance(key, str) and len(key) > _LONGEST_NAME:
            raise FormatError(f"a key has {len(key):,} letters, which no state_dict has: {shown(key)}")
        if isinstance(item, Stored) and isinstance(key, str):
            found.tensors[key] = item
        elif isinstance(key, str) and key.rpartition(".")[2] == EXTRA_STATE:
            found.extra[key] = item
        elif isinstance(item, Stored):
            raise FormatError(f"the key {shown(key)} of a tensor is not text, so this is not a state_dict")
        elif isinstance(item, Made):
            reason = _refuse_weight(shown(key), item)
            if reason and isinstance(key, str):
                found.unreadable[key] = reason
            found.left[_place(path, key)] = item
            continue
        else:
            found.left[_place(path, key)] = item
            continue
        found.order.append(key)
    if not found.order and _holds_arrays(value):
        raise FormatError(
            "its values are arrays of numpy, not tensors. If you trust whoever made the file, load it by "
            "torch.load(path, weights_only=False), and give torch.as_tensor of each array to save_state"
        )
    if not found.order and found.unreadable:
        raise FormatError(next(iter(found.unreadable.values())))
    if not found.order and value:
        items = (f"{shown(key)} {item!r:.60}" if _is_plain(item) else shown(key) for key, item in value.items())
        raise FormatError(f"there is no state_dict in it. It holds: {', '.join(islice(items, 8))}")
    metadata = value.state.get("_metadata") if isinstance(value, Ordered) and isinstance(value.state, dict) else None
    found.versions = _versions(metadata)
    return found


def _holds_arrays(value: Mapping[Any, Any]) -> bool:
    inside = [item for each in value.values() if isinstance(each, dict) for item in each.values()]
    makers = {str(item.maker) for item in (*value.values(), *inside) if isinstance(item, Made)}
    return any(maker.startswith("numpy.") and maker.endswith("._reconstruct") for maker in makers)


def _versions(metadata: object) -> dict[str, int]:
    if not isinstance(metadata, dict):
        return {}
    local = {path: item.get("version") for path, item in metadata.items() if isinstance(item, dict)}
    return {path: n for path, n in local.items() if isinstance(path, str) and type(n) is int and n != 1}


def _refuse_dangerous(made: list[Made]) -> None:
    """Refuse a file that asks for what is known to do harm; whatever else it asks for is only described."""
    for item in made:
        names = [name for name in (item.maker, *item.args) if isinstance(name, Name)]
        if any(map(_is_dangerous, names)) or _reaches_inside(item):
            raise _untrusted("refused: opening it would run", item)


def _is_dangerous(name: Name) -> bool:
    root = name.module.partition(".")[0]
    if root == "builtins":
        return name.name not in _PLAIN_BUILTINS
    return root in _DANGEROUS or str(name).startswith(_DANGEROUS_PARTS)


def _reaches_inside(made: Made) -> bool:
    """Whether it gets anything but a public function of a class by `getattr`."""
    if str(made.maker) != "builtins.getattr":
        return False
    plain = len(made.args) == 2 and isinstance(made.args[0], Name) and isinstance(made.args[1], str)
    return not plain or str(made.args[1]).startswith("_") or not made.called


def _refuse_weight(key: str, item: Made) -> str:
    """Refuse what could be a weight if it were made; the reason, for a tensor of a kind that is not read here."""
    kind = _KINDS.get(shown(item.maker))
    if kind is not None:
        return f"{key} is {kind}: only torch.load(path, weights_only=True) can read it"
    if not item.called or shown(item.maker).startswith(_REBUILDS):
        raise _untrusted(f"{key} is not a tensor but", item)
    return ""


def _untrusted(what: str, value: Made | Name) -> TrustError:
    name = shown(value if isinstance(value, Name) else value.maker)
    loaded, place = "torch.load(path, weights_only=False)", "If you trust whoever made the file"
    if name.endswith(".DTensor"):
        loaded = f"{{key: value.full_tensor() for key, value in {loaded}.items()}}"
        place += ", in a process group of as many ranks as wrote it"
    return TrustError(f"{what} {name}. Nothing ran. {place}: save_state({loaded}, 'state.safetensors')")


def _kind(value: object) -> str:
    if isinstance(value, Made):
        return f"an object of {shown(value.maker)}"
    if isinstance(value, bool | int | float | str):
        return f"{'the text' if isinstance(value, str) else 'the number'} {value!r:.60}"
    return "a tensor" if isinstance(value, Stored) else f"a {type(value).__name__}"
