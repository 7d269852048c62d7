"""Hints for other libraries: what transformers, timm and peft keep beside a layer, and what an edit leaves outdated.

The one file that knows names of other libraries. Every hint is worked out after the edit, from the model as it is then,
and ends in a line of code that can be executed where `model` is the edited model.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from modsurg.errors import ResizeError, listed
from modsurg.surgery.changes import Change
from modsurg.surgery.journal import Journal
from modsurg.surgery.resize.values import Resized
from modsurg.tree.walk import Tree, parents

_COUNTS = (  # of layers
    "num_layers",
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "depth",
    "num_blocks",
    "encoder_layers",
    "decoder_layers",
    "num_encoder_layers",
    "num_decoder_layers",
)
_NUMBERS = ("layer_idx", "layer_id", "layer_number")  # by which a layer finds its keys and values in a cache
_FLAGS = ("gradient_checkpointing",)  # that a method of the model sets on its layers
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_POSITIONS = ("max_position_embeddings", "n_positions", "num_positions", "max_target_positions", "max_source_positions")
_OUTPUTS = ("vocab_size", "num_labels", "num_classes")
_SIZES = {  # a size of a layer, and what a configuration or a parent calls it
    "num_embeddings": ("vocab_size", "type_vocab_size", *_POSITIONS),
    "out_features": _OUTPUTS,
    "out_channels": _OUTPUTS,
    "in_channels": ("num_channels", "in_chans", "in_channels"),
    "nf": _OUTPUTS,
    "image_size": ("image_size",),
}
Configs = dict[int, tuple[str, Any, list[str]]]
"""By the `id` of a configuration: where it is, itself, and the paths of the modules that hold it."""
_OFFSETS = dict.fromkeys(_POSITIONS, (0, 1, 2)) | dict.fromkeys(("num_labels", "num_classes"), (0, 1))


def collect_hints(before: Tree, after: Tree, changes: Sequence[Change], journal: Journal) -> list[str]:
    """Work out what an edit leaves outdated in other places of the model.

    Args:
        before: The model before the edit.
        after: The model after it.
        changes: What the edit did.
        journal: What the edit touched.

    Returns:
        Notes, each with the line that brings one place up to date.
    """
    sizes = _changed_sizes(after, changes)
    kept = ((module, journal.dicts.get(id(module._modules))) for module in before.modules.values())
    containers = {
        id(module): (module, [child for _, child in entry[1]])
        for module, entry in kept
        if entry is not None and isinstance(module, nn.ModuleList | nn.Sequential) and id(module) in after.paths
    }
    if not sizes and not containers:
        return []
    configs = _configs(after)
    notes: list[str] = []
    stale: dict[tuple[str, int], dict[str, None]] = {}
    for path, size, old, new in sizes:
        notes += _sibling_embeddings(after, path, size, old, new)
    for path, size, old, new in sizes:
        for text, value, places in _stale_sizes(after, configs, path, size, old, new):
            stale.setdefault((text, value), {}).update(dict.fromkeys(places))
    notes += [f"{text}: {' = '.join((*places, str(value)))}" for (text, value), places in stale.items()]
    for path, size, old, new in sizes:
        notes += [*_packed_outputs(after, path, size, old, new), *_stale_buffers(after, path, size, old, new)]
    problem = _read(_read(after.root, "config"), "problem_type")
    if problem and any("num_labels" in text for text, _ in stale):
        notes.append(f"the loss was chosen for the old labels ({problem}): model.config.problem_type = None")
    for key, (container, children) in containers.items():
        notes += _stale_counts(after, configs, after.paths[key][0], container, children)
        notes += _layer_numbers(after.paths[key][0], container, children)
    return list(dict.fromkeys(notes))


def warn_of_lost_parts(tree: Tree, changes: Iterable[Change]) -> list[str]:
    """Warn of what went with a module and is missed elsewhere: an activation in a norm, a shared table, a flag."""
    changes = [change for change in changes if change.old is not None and change.old is not change.new]
    return [
        *_lost_activations(changes),
        *_lost_parts(tree, changes),
        *_lost_flags(tree, changes),
        *warn_of_unused_copies(tree, changes),
    ]


def refuse_adapter(path: str, module: nn.Module) -> None:
    """Refuse to resize a layer of peft as a whole: its parts go together, or one copy of it is not in use.

    Raises:
        ResizeError: Names the copy that is in use, or the line that takes the adapter off.
    """
    if not type(module).__module__.startswith("peft."):
        return
    kind, copies = type(module).__name__, module._modules.get("modules_to_save")
    if isinstance(copies, nn.ModuleDict):
        names = [name for name in _listed(_read(module, "active_adapters")) if name in copies]
        for name in [*names, *copies][:1]:
            raise ResizeError(
                f'"{path}" is a {kind} of peft, which calls its copy "{name}": '
                f'resize(model, "{path}.modules_to_save.{name}", ...).'
            )
    raise ResizeError(
        f'"{path}" is a {kind} of peft, whose adapter goes with the size of the layer. '
        "Merge the adapter first: model = model.merge_and_unload()."
    )


def warn_of_unused_copies(tree: Tree, changes: Iterable[Change]) -> list[str]:
    """Warn of an edit of the copy that peft keeps aside and does not call."""
    return [
        f'"{path}" is the copy that peft keeps aside: {type(tree.parent(path)).__name__} calls modules_to_save instead.'
        for change in changes
        for path in change.paths
        if path.rpartition(".")[2] == "original_module" and "modules_to_save" in tree.parent(path)._modules
    ]


def _listed(value: object) -> list[str]:
    return [value] if isinstance(value, str) else list(value) if isinstance(value, list | tuple) else []


def _changed_sizes(after: Tree, changes: Iterable[Change]) -> list[tuple[str, str, int, int]]:
    """Find the layers whose size is another than before the edit: path, name of the size, old and new number."""
    found: dict[tuple[int, str], tuple[int, int]] = {}
    for change in changes:
        for name, (was, now) in _size_pairs(change).items():
            first, _ = found.pop((id(change.old), name), (was, was))
            found[id(change.new), name] = first, now
    return [
        (after.paths[key][0], name, was, now)
        for (key, name), (was, now) in found.items()
        if was != now and key in after.paths
    ]


def _size_pairs(change: Change) -> dict[str, tuple[int, int]]:
    if isinstance(change.detail, Resized):
        pairs = change.detail.sizes.items()
        return {
            name: (old, new) for name, (old, new) in pairs if name in _SIZES and type(old) is int and type(new) is int
        }
    if change.kind != "replace" or change.old is None or change.new is None:
        return {}
    old = _sizes(change.old) if change.old._parameters or change.old._modules else {}
    new = _sizes(change.new) if old else {}
    return {name: (old[name], new[name]) for name in old.keys() & new.keys()}


def _sizes(module: nn.Module) -> dict[str, int]:
    """The sizes of a layer; of several layers in one module those of the first input and the last output."""
    found: dict[str, int] = {}
    for layer in module.modules():
        for name in _SIZES:
            value = vars(layer).get(name)
            if type(value) is int and not (name.startswith("in") and name in found):
                found[name] = value
    return found


def _configs(tree: Tree) -> Configs:
    """Find every configuration, and those inside it."""
    found: Configs = {}
    for path, module in tree.modules.items():
        config = _read(module, "config") if "config" in vars(module) else None
        waiting = [(f"{_place(path)}.config", config, [path])] if hasattr(config, "__dict__") else []
        while waiting:
            place, config, holders = waiting.pop(0)
            if id(config) in found:
                found[id(config)][2].extend(holders)
                continue
            found[id(config)] = (place, config, holders)
            inner = [(name, value) for name, value in vars(config).items() if type(value).__name__.endswith("Config")]
            waiting += [(f"{place}.{name}", value, []) for name, value in inner]
    return found


def _stale_sizes(
    tree: Tree, configs: Configs, path: str, size: str, old: int, new: int
) -> Iterator[tuple[str, int, list[str]]]:
    """Find the numbers beside a layer that go with its old size: what to say, the right number, and where it belongs.

    Of several configurations those count whose module the layer is in; the others where none of these has the number.
    """
    owners = list(parents(path))
    every = {place: config for place, config, _ in configs.values()}
    near = {place: config for place, config, holders in configs.values() if not set(holders).isdisjoint(owners)}
    modules = {_place(owner): tree.modules[owner] for owner in owners}
    for name in _SIZES[size]:
        if name == "num_labels" and _read(tree.root, name) is None:  # every configuration of transformers has it
            continue
        found = _matching(near, name, old, new) or _matching(every, name, old, new)
        found |= _matching(modules, name, old, new)
        for says, value in dict.fromkeys(found.values()):
            places = [place for place, pair in found.items() if pair == (says, value)]
            yield f"the model may go by its {name}, which still says {says}", value, places


def _packed_outputs(tree: Tree, path: str, size: str, old: int, new: int) -> list[str]:
    """The number of classes beside a head that has several outputs, one for each anchor, of every class."""
    owner = path.rpartition(".")[0]
    says = _own(tree.modules[owner], "num_classes")
    if _SIZES[size] is not _OUTPUTS or type(says) is not int or says < 2 or old - says in (0, 1) or old % says:
        return []
    each = old // says
    notes = [
        f"{path}: its outputs are packed, {each} for each of {says} classes, and were kept by position, not by class"
    ]
    if new % each == 0:
        line = f"{_place(owner)}.num_classes = {new // each}"
        notes.insert(
            0, f"the model may go by its num_classes, which still says {says} ({each} for each of {says}): {line}"
        )
    return notes


def _matching(owners: Mapping[str, Any], name: str, old: int, new: int) -> dict[str, tuple[int, int]]:
    """Places whose number goes with the old size: what they say, and what they should say."""
    found: dict[str, tuple[int, int]] = {}
    for place, owner in owners.items():
        says = _own(owner, name)
        if isinstance(says, Integral) and not isinstance(says, bool) and old - int(says) in _OFFSETS.get(name, (0,)):
            found[f"{place}.{name}"] = (int(says), new - (old - int(says)))
    return found


def _sibling_embeddings(tree: Tree, path: str, size: str, old: int, new: int) -> list[str]:
    """Of a language model's input and output table the one that still has the old size."""
    notes = []
    for owner in parents(path) if size in ("num_embeddings", "out_features") else ():
        pair = [_call(tree.modules[owner], f"get_{side}_embeddings") for side in ("input", "output")]
        if any(each is tree.modules[path] for each in pair):
            for other, name, what in zip(pair, ("num_embeddings", "out_features"), ("rows", "outputs"), strict=True):
                if isinstance(other, nn.Module) and id(other) in tree.paths and _read(other, name) == old:
                    at = tree.paths[id(other)][0]
                    notes.append(f'{at} still has {old} {what}: modsurg.resize(model, "{at}", {name}={new})')
    return notes


def _stale_buffers(tree: Tree, path: str, size: str, old: int, new: int) -> list[str]:
    """Buffers of other modules that have the old size: a bias of all tokens, the numbers of all positions."""
    if size not in ("num_embeddings", "out_features"):
        return []
    lines = []
    for paths in tree.paths.values():
        module = tree.modules[paths[0]]
        if type(module).__module__.startswith("torch.nn.") or path in paths:
            continue
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.ndim and buffer.shape[-1] == old:
                lines.append((f"{paths[0]}.{name}".lstrip("."), _grow(f"{_place(paths[0])}.{name}", name, buffer, new)))
    same = [name for name, line in lines if line is None]
    notes = [f"{name} still has the old size {old}: {line}" for name, line in lines if line is not None]
    return notes + ([f"still of the old size {old}: {listed(same, 3)}; make them again for {new}"] if same else [])


def _grow(place: str, name: str, buffer: torch.Tensor, new: int) -> str | None:
    """The line that gives a buffer the new size: counted on, a larger triangle, or zeros at the end."""
    old = buffer.shape[-1]
    counts = not buffer.is_floating_point() and not buffer.is_complex() and buffer.dtype != torch.bool
    if buffer.is_meta:
        return None
    if counts and torch.equal(buffer, torch.arange(old, device=buffer.device).expand_as(buffer)):
        shape = f".expand({', '.join(map(str, buffer.shape[:-1]))}, -1)" if buffer.ndim > 1 else ""
        return f"{place} = torch.arange({new}, device={place}.device){shape}"
    if buffer.ndim > 1 and buffer.shape[-2] == old:
        if not torch.equal(buffer, torch.ones_like(buffer).tril()):
            return None
        shape = ", ".join(map(str, (*buffer.shape[:-2], new, new)))
        return f"{place} = {place}.new_ones({shape}).tril()"
    if bool((buffer == 0).all()) or new < old:
        return f"{place} = torch.nn.functional.pad({place}, (0, {new - old}))"
    return None if counts else f"{place} = torch.nn.functional.pad({place}, (0, {new - old}))"


def _stale_counts(
    after: Tree, configs: Configs, path: str, container: nn.Module, old: Sequence[nn.Module | None]
) -> list[str]:
    """Numbers of layers, and lists with an entry for each layer, beside a container that got more or fewer of them."""
    new = list(container._modules.values())
    if not path or len(old) == len(new):
        return []
    owners: dict[str, Any] = {_place(path.rpartition(".")[0]): after.parent(path)}
    if isinstance(container, nn.ModuleList):
        over = set(parents(path))
        owners |= {place: config for place, config, holders in configs.values() if not over.isdisjoint(holders)}
    notes, places = [], dict[str, list[str]]()
    for place, owner in owners.items():
        says = {name: _own(owner, name) for name in _count_names(owner, path)}
        name = next((name for name, value in says.items() if type(value) is int and value == len(old)), None)
        if name:
            places.setdefault(name, []).append(f"{place}.{name}")
        lists = vars(owner) if place.endswith("config") or ".config." in place else {}
        for name, value in lists.items():
            if isinstance(value, list | tuple) and len(value) == len(old) and ("layer" in name or "types" in name):
                kept = _entries(list(value), old, new)
                notes.append(f"{place}.{name} has an entry for each of {len(old)} layers: {place}.{name} = {kept!r}")
    counts = [
        f"the model may go by its {name}, which still says {len(old)}: {' = '.join((*where, str(len(new))))}"
        for name, where in places.items()
    ]
    return counts + notes


def _count_names(owner: object, path: str) -> list[str]:
    """What the number of layers is called, where a configuration may have one for each of two stacks."""
    side = next((side for side in ("decoder", "encoder") if side in path), "coder")
    named = [name for name in _COUNTS if side in name and _own(owner, name) is not None]
    return named or [name for name in _COUNTS if "coder" not in name]


def _entries(value: list[Any], old: Sequence[nn.Module | None], new: Sequence[nn.Module | None]) -> list[Any]:
    """The entries of the layers that stay; a new layer has that of the layer before it."""
    place = {id(layer): number for number, layer in enumerate(old)}
    kept: list[Any] = []
    for layer in new:
        kept.append(value[place[id(layer)]] if id(layer) in place else kept[-1] if kept else value[0])
    return kept


def _layer_numbers(path: str, container: nn.Module, old: Sequence[nn.Module | None]) -> list[str]:
    """The line that numbers layers again which hold their own number, where one of them is wrong now."""
    if not isinstance(container, nn.ModuleList):  # a Sequential gives its layers no cache
        return []
    new = enumerate(container._modules.values())
    moved = [(n, child) for n, child in new if n >= len(old) or old[n] is not child]
    wrong = dict.fromkeys(name for n, child in moved for name, value in _own_numbers(child) if value != n)
    before = [dict(_own_numbers(child)) for child in old] if wrong else []
    known = [name for name in wrong if all(one.get(name, n) == n for n, one in enumerate(before))]
    each = " = ".join(_attribute_of("layer", name) for name in known)
    line = f"for n, layer in enumerate({_place(path)}): {each} = n"
    return [f"layers hold their own number, which changed: {line}"] if known else []


def _attribute_of(variable: str, name: str) -> str:
    inner, _, attribute = name.rpartition(".")
    if all(part.isidentifier() for part in name.split(".")):
        return f"{variable}.{name}"
    return f'{variable}.get_submodule("{inner}").{attribute}'


def _own_numbers(layer: nn.Module | None) -> Iterator[tuple[str, int]]:
    for path, module in layer.named_modules() if layer is not None else ():
        for name in _NUMBERS:
            value = vars(module).get(name)
            if type(value) is int:
                yield f"{path}.{name}".lstrip("."), value


def _lost_activations(changes: Iterable[Change]) -> list[str]:
    """A norm that is gone and held more than a norm, as those of timm hold the activation behind it."""
    lost = [
        (f'"{change.paths[0]}.{name}" ({type(child).__name__})', name)
        for change in changes
        if isinstance(change.old, _NORMS)
        for name, child in change.old._modules.items()
        if child is not None and not isinstance(child, nn.Identity | ParametrizationList | nn.ModuleDict)
        if change.new is None
        or (name not in change.new._modules and not any(child is module for module in change.new.modules()))
    ]
    if not lost:
        return []
    return [
        f"submodules of the replaced norm were dropped: {listed([each for each, _ in lost], 3)}. "
        f"To keep it: replace(model, ..., lambda old: nn.Sequential(<the new norm>, old.{lost[0][1]}))."
    ]


def _lost_parts(tree: Tree, changes: Iterable[Change]) -> list[str]:
    """What only the removed one of several layers held, as the first layer of T5 holds the table of positions."""
    gone = {path for change in changes for path in change.paths}
    warnings = []
    for change in changes:
        path, old = change.paths[0], change.old
        parent = tree.parent(path)
        if old is None or not old._modules or not isinstance(parent, nn.ModuleList):
            continue
        if change.new is not None and type(change.new) is not type(old):
            continue
        prefix = path.rpartition(".")[0]
        siblings = [child for name, child in parent._modules.items() if f"{prefix}.{name}".lstrip(".") not in gone]
        kept = [each for each in (*siblings, change.new) if type(each) is type(old)]
        if kept:
            held = {name for each in kept for name, _ in each.named_modules()}
            lost = [name for name, _ in old.named_modules() if name not in held]
            outer = [name for name in lost if name.rpartition(".")[0] not in lost]
            warnings += [f'"{path}.{name}" is gone: no other {type(old).__name__} there has one.' for name in outer]
    return warnings


def _lost_flags(tree: Tree, changes: Iterable[Change]) -> list[str]:
    lost = [
        (f'"{change.paths[0]}"', name)
        for change in changes
        if change.new is not None and change.kind == "replace"
        for name in _FLAGS
        if vars(change.old).get(name) is True and _read(change.new, name) is not True
    ]
    if not lost:
        return []
    enable = f"model.{lost[0][1]}_enable()"
    more = f": {enable}" if hasattr(tree.root, f"{lost[0][1]}_enable") else "."
    return [f"{listed([path for path, _ in lost], 3)} had {lost[0][1]} = True, and the new module has not{more}"]


def _place(path: str) -> str:
    return f'model.get_submodule("{path}")' if path else "model"


def _read(owner: object, name: str) -> object:
    """An attribute; None where there is none, or where asking for it raises."""
    try:
        return getattr(owner, name, None)
    except Exception:  # a property or a configuration of the user's own may raise anything
        return None


def _own(owner: object, name: str) -> object:
    """An attribute, but for one of another module, to which a wrapper passes on what it does not have."""
    passed_on = isinstance(owner, nn.Module) and name not in vars(owner) and not hasattr(type(owner), name)
    return None if passed_on else _read(owner, name)


def _call(owner: object, name: str) -> object:
    """What a method without arguments returns; None where there is none, or where it raises."""
    method = _own(owner, name)
    try:
        return method() if callable(method) else None
    except Exception:  # NotImplementedError of a model without such a layer, or anything of the user's
        return None
