"""Whole models as torch.save writes them: a pickle, which is a program. It is read as data before anything of it runs.

Nothing but torch's own rebuilding of tensors and a few constructors of plain values may be called; every class that it
allocates and every function that it refers to has to be trusted. Then torch's restricted unpickler does the rest.
"""

import copyreg
import os
import pickle
import threading
from collections import ChainMap, defaultdict, deque
from collections.abc import Callable, Mapping, Set
from functools import partial
from inspect import getattr_static
from pathlib import Path
from pickle import PickleError, UnpicklingError
from types import SimpleNamespace
from typing import Any, BinaryIO, Final

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.serialization import get_safe_globals, get_unsafe_globals_in_checkpoint, safe_globals

from modsurg.checkpoints.formats.atomic import pending
from modsurg.checkpoints.formats.file_io import Region
from modsurg.checkpoints.formats.safetensors.header import foreign
from modsurg.checkpoints.formats.torch_save.module import is_module, module_tree
from modsurg.checkpoints.formats.torch_save.tensors import Storage, loading, stored_id
from modsurg.checkpoints.formats.torch_save.unpickler import Loading, Made, Unpickled, shown, unpickle
from modsurg.checkpoints.formats.torch_save.zip import Archive
from modsurg.checkpoints.makers import FUNCTIONS, frozen, may_be_hashed, may_be_made, torch_function
from modsurg.errors import FormatError, SaveError, TrustError
from modsurg.structure.build import describe
from modsurg.structure.describe import children_first
from modsurg.structure.encode import hides_code, slots
from modsurg.structure.module_state import COMPILED
from modsurg.structure.trust import Renames, Trust, Trusted
from modsurg.tree.eval_lock import Held, held
from modsurg.tree.wrappers import unwrap, wrapper_kind

PICKLED: Final = (".pt", ".pth", ".bin")

_TYPED: Final = "torch._tensor._rebuild_from_type_v2"
# torch keeps what its unpickler may name in one list for the whole process: only one file at a time may put names in.
_LOCK = threading.RLock()
_OWN: Final[dict[str, object]] = {"functools.partial": partial, "modsurg.tree.eval_lock.Held": Held}
_DAMAGED = (UnpicklingError, RuntimeError, TypeError, ValueError, LookupError, AttributeError, EOFError, OverflowError)


# torch's restricted unpickler fills lists and dicts only: these two are given what they hold when they are made.
_REDUCED: Final[ChainMap[type, Callable[[Any], Any]]] = ChainMap(
    {
        deque: lambda value: (deque, (list(value), value.maxlen)),
        defaultdict: lambda value: (defaultdict, (value.default_factory, dict(value))),
    },
    copyreg.dispatch_table,
)


class _Pickler(pickle.Pickler):
    dispatch_table = _REDUCED


_PICKLE: Final = SimpleNamespace(__name__="pickle", Pickler=_Pickler)


def load_pickled(path: Path, trust: Trusted, rename: Renames | None) -> nn.Module:
    """Open what `torch.save(model)` wrote; see `load_model`."""
    with open(path, "rb") as file, _LOCK:
        return _load(file, _checked(file, path, Trust(trust, rename)))


def read_tree(path: Path) -> dict[str, Any]:
    """The tree in a file of `torch.save(model)`, for `outline`; no class is looked up, and none has to exist.

    Raises:
        FormatError: It is no file of torch.save, damaged, or holds something else.
    """
    with open(path, "rb") as file:
        value = read_model(file, path).value
        assert isinstance(value, Made)
        return module_tree(value)


def save_pickled(model: nn.Module, path: Path) -> None:
    """Write a model with torch.save; before the file takes its name, see that `load_pickled` will open it."""
    model = unwrap(model)
    children_first(model)  # refuses one that holds itself
    for name, module in model.named_modules():
        if wrapper_kind(module) is not None:
            describe(model)  # says what to save in its place
        if slots(type(module)):
            what = f"{name or 'the model'} has __slots__, which torch leaves out of a pickle"
            raise SaveError(f"{what}: save it as {path.stem}.safetensors")
    tensors = (each for each in (*model.parameters(), *model.buffers()) if not is_lazy(each))
    with pending(path, sum(each.nbytes for each in tensors if each.layout is torch.strided)) as file:
        try:
            torch.save(model, file, pickle_module=_PICKLE)  # type: ignore[arg-type]  # it only calls write and flush
        except (PickleError, AttributeError, TypeError, RuntimeError) as error:
            if file.failure is not None:
                raise file.failure from error
            describe(model)  # says where, if it is the model
            raise SaveError(f"torch can't pickle it ({error}): save it as {path.stem}.safetensors") from error
        _try_to_open(model, file.temporary, path)
        file.commit()


def read_model(file: BinaryIO, path: Path) -> Unpickled:
    """Read the pickle of a whole model as data; nothing in it is looked up.

    Raises:
        FormatError: It is no file of torch.save, damaged, or holds something else.
        TrustError: A tensor that is made by something else than torch's own functions.
    """
    file.seek(0)
    problem = foreign(file.read(64), path)
    if problem:
        raise FormatError(problem)
    try:
        archive = Archive(Region(file.fileno(), 0, os.fstat(file.fileno()).st_size))
    except FormatError as error:
        raise FormatError(f"{error}; a model of torch older than 1.6 has to be saved again by it") from None

    def persistent(saved: object) -> Storage:
        storage = stored_id(saved)
        if archive.region(f"data/{storage.key}").nbytes < storage.numel * storage.dtype.itemsize:
            raise FormatError(f"storage {storage.key} is shorter than the pickle says")
        return storage

    calls = loading(persistent).calls
    own = {
        _TYPED: lambda *args: _typed(calls[_TYPED], *args),
        "builtins.frozenset": frozen,
    }
    read = unpickle(archive.read("data.pkl"), Loading({**calls, **own}, persistent))
    if not is_module(read.value):
        raise FormatError("it holds no model; if it is a state_dict, build the model, then load_state(model, path)")
    return read


def _typed(rebuild: Callable[..., object], function: object, *args: object) -> object:
    if not str(function).startswith("torch._utils._rebuild_"):
        raise TrustError(f"it wants to call {function} to make a tensor; nothing of it ran")
    return rebuild(function, *args)


def _checked(file: BinaryIO, path: Path, trust: Trust) -> dict[str, object]:
    """What the pickle names besides torch's own, as trusted objects by dotted name; refuses what it must not do."""
    read = read_model(file, path)
    functions = sorted({name for name in map(torch_function, read.made) if name is not None})
    own = {name: value for name, value in _OWN.items() if any(str(made.maker) == name for made in read.made)}
    lookups = ("builtins.getattr", FUNCTIONS) if functions else ()
    names = [name for name in _names(file) if name not in (*lookups, *own)]
    asked = [*(":".join(name.rsplit(".", 1)) for name in names), *(f"torch:{name}" for name in functions)]
    found = trust.resolve(asked)
    named = {**dict(zip(names, found, strict=False)), **own}
    if functions:
        known = dict(zip(functions, found[len(names) :], strict=True))
        named |= {"builtins.getattr": lambda _, name: known[name], FUNCTIONS: torch._C._VariableFunctions}
    refused = sorted({str(made.maker) for made in read.made if not may_be_made(made, named)})
    if refused:
        raise TrustError(f"it wants to call {', '.join(refused)}, which is no data; nothing of it ran")
    for made in read.made:
        if made.keyed and not may_be_hashed(made, named):
            raise FormatError(f"the pickle has {shown(made)} as a key, which may take for ever to look up")
        kind = named.get(str(made.maker))
        if isinstance(kind, type) and issubclass(kind, nn.Module):
            if not isinstance(made.state, dict) and not _fills_itself(kind):
                raise FormatError(f"a {kind.__name__} in it has no attributes, or some beside them")
            for state in made.state if isinstance(made.state, tuple | list) else (made.state,):
                if isinstance(state, dict):
                    _refuse_methods(kind, state.keys(), _is_held(named, made))
    return named


def _fills_itself(kind: type[nn.Module]) -> bool:
    """Whether the class says itself what a pickle has of it, and takes that back: it need not be its attributes."""
    return kind.__getstate__ is not object.__getstate__ and kind.__setstate__ is not nn.Module.__setstate__


def _names(file: BinaryIO) -> list[str]:
    """The dotted names in the pickle that torch does not allow by itself."""
    file.seek(0)
    try:
        return sorted(get_unsafe_globals_in_checkpoint(file))
    except _DAMAGED as error:
        raise FormatError(f"torch can't read its pickle: {_reason(error)}") from error


def _is_held(named: Mapping[str, object], made: Made) -> bool:
    """Whether the `train` of a module is what `modsurg.freeze` puts there."""
    train = made.state.get("train") if isinstance(made.state, dict) else None
    if not isinstance(train, Made) or named.get(str(train.maker)) is not Held:
        return False
    return isinstance(train.state, dict) and train.state.get("module") is made


def _refuse_methods(kind: type[nn.Module], attributes: Set[str], held: bool) -> None:
    """Refuse a module whose `forward` (or another method) the file puts something else before."""
    others = attributes - ({"train"} if held else set())
    replaced = sorted(name for name in others if name == COMPILED or hides_code(getattr_static(kind, str(name), None)))
    if replaced:
        raise TrustError(f"the file replaces {', '.join(replaced)} of a {kind.__name__}; nothing of it ran")


def _load(file: BinaryIO | str, named: Mapping[str, object]) -> nn.Module:
    if not isinstance(file, str):
        file.seek(0)
    known = get_safe_globals()
    allowed: list[Any] = [(value, name) for name, value in named.items() if (value, name) not in known]
    try:
        with safe_globals(allowed):
            model = torch.load(file, map_location="cpu", weights_only=True, mmap=isinstance(file, str))
    except _DAMAGED as error:
        raise FormatError(f"torch can't open it: {_reason(error)}") from error
    if not isinstance(model, nn.Module):
        raise FormatError(f"it holds a {type(model).__name__}, not a model")
    for module in model.modules():
        holder = held(module)
        _refuse_methods(type(module), module.__dict__.keys(), holder is not None and holder.module is module)
    try:
        describe(model)
    except SaveError as error:
        raise TrustError(str(error).replace("can't be kept; nothing was written", "can't be trusted")) from None
    return model


def _reason(error: Exception) -> str:
    """What torch says, without its advice on what else to try."""
    return shown(str(error).rpartition("WeightsUnpickler error: ")[2].strip().partition("\n")[0], 300)


def _try_to_open(model: nn.Module, written: Path, path: Path) -> None:
    """See that the model that was written can be opened by someone who trusts it all; the weights are not read."""
    try:
        with open(written, "rb") as file, _LOCK:
            named = _checked(file, written, Trust(name for name in _names(file) if not name.startswith("builtins.")))
            _load(str(written), named)
    except (FormatError, TrustError) as error:
        describe(model)  # says where, if there is something that no file can keep
        names = [line.strip() for line in str(error).splitlines() if line.startswith("  ")]
        what = f"it asks for {', '.join(names)}" if names else str(error)
        raise SaveError(
            f"as a pickle it could not be opened again without trusting it blindly: {what}. "
            f"Save it as {path.stem}.safetensors"
        ) from error
