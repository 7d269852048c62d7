"""Which classes and functions a file may name, and how a name becomes one without running anything else.

A name is written `module:qualname`, as in `torch.nn.modules.conv:Conv2d`. Nothing is imported unless its package is
trusted, and an object counts only where it was defined: `torch.nn.modules.module:OrderedDict` is not torch.nn's own.
"""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from types import BuiltinFunctionType, FunctionType

import torch

from modsurg.errors import TrustError, counted

Trusted = Iterable[str | type | Callable[..., object]] | str | type | Callable[..., object]
Renames = Mapping[str, str | type | Callable[..., object]]

# Modules of these packages hold no code that touches files, processes or the network when a model runs.
_PACKAGES = (
    "torch.nn",
    "torch.ao.nn",
    "torch.ao.quantization.stubs",
    "torch.ao.quantization.fake_quantize",
    "torch.ao.quantization.observer",
    "torchvision.models",
    "torchvision.ops",
    "torchvision.transforms",
    "torch.distributions",
    "torch.optim.swa_utils",
)
# Functions have to be named more narrowly: torchvision.models has builders that download weights.
_FUNCTIONS = (
    "torch.nn.functional",
    "torch.functional",
    "torchvision.ops",
    "torchvision.models.optical_flow.raft",
    "math",
)
_BUILTIN_HOMES = ("torch._C._nn", "torch._C._special", "torch._C._linalg", "torch._C._fft", "math")
_PLAIN = {
    f"{home}:{name}"
    for home, names in {
        "builtins": "bool int float complex str bytes list tuple dict set frozenset slice range object type "
        "Ellipsis abs all any divmod len max min pow repr reversed round sorted sum zip",
        "collections": "OrderedDict defaultdict Counter deque",
        "argparse": "Namespace",
        "functools": "partial",
        "modsurg.tree.eval_lock": "Held",
        "types": "SimpleNamespace",
        "datetime": "date datetime time timedelta timezone",
        "decimal": "Decimal",
        "fractions": "Fraction",
        "pathlib": "PosixPath WindowsPath PurePosixPath PureWindowsPath",
        "uuid": "UUID SafeUUID",
        "logging": "getLogger",
        "re": "_compile",
        "torch": "Tensor Size device dtype Generator",
        "torch._C": "Generator",
        "torch.autograd.function": "Function",
        "torch.utils.hooks": "RemovableHandle",
        "numpy": "dtype ndarray bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64",
        "numpy._core.multiarray": "_reconstruct scalar",
        "numpy.core.multiarray": "_reconstruct scalar",
    }.items()
    for name in names.split()
}
# Where Python 3.13 alone has the classes of `pathlib`; a file is to be the same for every Python.
_MOVED = {"pathlib._local": "pathlib"}
# What a hostile file names; no model has a use for them.
_RUNS = frozenset(
    {
        "builtins",
        "code",
        "copyreg",
        "ctypes",
        "functools",
        "importlib",
        "io",
        "marshal",
        "multiprocessing",
        "nt",
        "operator",
        "os",
    }
    | {
        "pdb",
        "pickle",
        "posix",
        "pty",
        "runpy",
        "shutil",
        "signal",
        "socket",
        "subprocess",
        "sys",
        "tempfile",
        "timeit",
    }
    | {"trace", "webbrowser", "torch.hub", "torch.package", "torch.serialization", "torch.utils.cpp_extension"}
)


def qualified_name(value: object) -> str | None:
    """The name under which a class or function can be found again, None for a local or anonymous one.

    Example:
        >>> qualified_name(torch.nn.Conv2d), qualified_name(torch.relu), qualified_name(lambda: 0)
        ('torch.nn.modules.conv:Conv2d', 'torch:relu', None)
    """
    module = getattr(value, "__module__", None) or "builtins"
    module = _MOVED.get(module, module)
    for qualname in (getattr(value, "__qualname__", ""), getattr(value, "__name__", "")):
        if qualname and module in sys.modules and _find(module, qualname) is value:
            return f"{module}:{qualname}"
    return None


class Trust:
    """What the caller trusts, by package or by object, besides torch.nn and torchvision.

    Args:
        trust: Names of packages, modules or classes (`"timm"`), and classes or functions themselves. A class also
            answers for `__main__.<its name>`.
        rename: Dotted name in the file -> the class that took its place, or its dotted name; also a package or module
            -> its new name.

    Raises:
        TrustError: Something that is neither a name nor a class or function.
    """

    def __init__(self, trust: Trusted = (), rename: Renames | None = None) -> None:
        given = [trust] if isinstance(trust, str) or callable(trust) else list(trust)
        self._packages = tuple(name for name in given if isinstance(name, str))
        self._objects: dict[str, object] = {}
        self._doubles: list[str] = []
        self._renames = {_dotted(name): target for name, target in (rename or {}).items()}
        for value in [value for value in given if not isinstance(value, str)]:
            self._take(value)

    def _take(self, value: object) -> None:
        qualname = getattr(value, "__qualname__", None)
        if qualname is None:
            raise TrustError(f'trust names packages ("timm") and classes (Net), not {value!r:.80}')
        answer = f"__main__.{qualname}"
        known = self._objects.setdefault(answer, value)
        self._objects[_place(value)] = value
        if known is not value and self._objects[answer] is known and getattr(known, "__module__", "") != "__main__":
            self._doubles.append(answer)

    def resolve(self, names: Sequence[str]) -> list[object]:
        """The objects of these names, in order.

        Raises:
            TrustError: Names that are not trusted, all of them, or that are not there any more. Before the first is
                imported, all are known to be trusted.

        Example:
            >>> Trust().resolve(["torch.nn.modules.linear:Linear"])
            [<class 'torch.nn.modules.linear.Linear'>]
        """
        targets = [self._target(name) for name in names]
        untrusted = [name for name in targets if isinstance(name, str) and not self._allows_module(name)]
        if untrusted:
            raise TrustError(_untrusted(sorted(set(untrusted))))
        found: list[object] = []
        lost: dict[str, ImportError | LookupError] = {}
        for target in targets:
            try:
                found.append(self._load(target) if isinstance(target, str) else target)
            except (ImportError, LookupError) as error:
                lost[_dotted(str(target))] = error
            except TrustError:
                untrusted.append(str(target))
        if untrusted:
            raise TrustError(_untrusted(sorted(set(untrusted))))
        if lost:
            raise TrustError(_lost(lost))
        return found

    def _target(self, name: str) -> object:
        """The object itself where the caller gave it, otherwise its (new) name."""
        module, _, qualname = name.partition(":")
        name = f"{_MOVED.get(module, module)}:{qualname}"
        dotted = _dotted(name)
        new = self._renames.get(dotted)
        if new is not None:
            return _split(new) if isinstance(new, str) else new
        for old, prefix in self._renames.items():
            if isinstance(prefix, str) and (module == old or module.startswith(f"{old}.")):
                name = f"{prefix}{module[len(old) :]}:{qualname}"
                break
        if _dotted(name) in self._doubles:
            raise TrustError(
                f"two of the classes would answer for {_dotted(name)}: say rename={{{_dotted(name)!r}: ...}}"
            )
        return self._objects.get(_dotted(name), name)

    def _allows_module(self, name: str) -> bool:
        module, _, qualname = name.partition(":")
        if name in _PLAIN:
            return True
        if not all(part.isidentifier() for part in (*module.split("."), *qualname.split("."))):
            return False
        if any(part.startswith("__") for part in (*module.split("."), *qualname.split("."))) and module != "__main__":
            return False
        return module == "torch" or _holds(module, (*_PACKAGES, *_FUNCTIONS, *_BUILTIN_HOMES)) or self._named(name)

    def _named(self, name: str) -> bool:
        """Whether the caller's own names cover this one: a package, a module, or the class itself."""
        return _dotted(name) in self._packages or _holds(name.partition(":")[0], self._packages)

    def _load(self, name: str) -> object:
        module, _, qualname = name.partition(":")
        if module not in sys.modules:
            import_module(module)
        value = _find(module, qualname)
        if value is None:
            raise LookupError(f"{module} has no {qualname}")
        if name in _PLAIN or self._is_own(value, name):
            return value
        raise TrustError(name)

    def _is_own(self, value: object, name: str) -> bool:
        """Whether the object was defined in what is trusted, and is of a kind that may be named."""
        home = getattr(value, "__module__", None) or ""
        if isinstance(value, type):
            own = _dotted(f"{home}:{value.__qualname__}") in self._packages
            return own or _holds(home, (*_PACKAGES, *self._packages))
        if isinstance(value, FunctionType):
            own = f"{home}.{value.__qualname__}" in self._packages
            return own or _holds(home, (*_FUNCTIONS, *self._packages))
        if isinstance(value, BuiltinFunctionType):
            module, _, short = name.partition(":")
            is_math = module in _BUILTIN_HOMES or (module == "torch" and hasattr(torch.Tensor, short))
            return is_math or _holds(home, self._packages) or _place(value) in self._packages
        return False


def _find(module: str, qualname: str) -> object:
    """Look the name up in the dictionaries of the module and its classes; no attribute is fetched, so no code runs."""
    value: object = sys.modules[module]
    for part in qualname.split("."):
        if value is not sys.modules[module] and not isinstance(value, type):
            return None
        value = vars(value).get(part)
    return value


def _holds(module: str, packages: Iterable[str]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def _dotted(name: str) -> str:
    return name.replace(":", ".")


def _place(value: object) -> str:
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}"


def _split(name: str) -> str:
    if ":" in name:
        return name
    module, _, qualname = name.rpartition(".")
    return f"{module}:{qualname}"


def _package(name: str) -> str:
    """What to trust for this name: its package, or the class alone in torch's mixed bags; "" for the class itself."""
    module, _, qualname = name.partition(":")
    parts = module.split(".")
    if parts[0] == "__main__" or "<locals>" in qualname:
        return ""
    if _holds(module, ("torch.utils", "torch._C")):
        return _dotted(name)
    return ".".join(parts[: 2 if parts[0] == "torch" else 1])


def _untrusted(names: Sequence[str]) -> str:
    tops = {name: _package(name) for name in names}
    foreign = [name for name in names if _holds(name.partition(":")[0], _RUNS)]
    packages = sorted({top for name, top in tops.items() if name not in foreign} - {""})
    classes = [name.rpartition(":")[2].rpartition("<locals>.")[2] for name in names if not tops[name]]
    entries = [*(f'"{package}"' for package in packages), *classes]
    count = counted(len(names), "name is", "names are")
    lines = [f"{count} not trusted; nothing of it was imported or run.", *(f"  {_dotted(name)}" for name in names)]
    if foreign:
        lines.append(f"No model needs {', '.join(map(_dotted, foreign))}: the file may be hostile.")
    elif entries:
        lines.append(f"If you trust them: load_model(path, trust=({', '.join(entries)},))")
    return "\n".join(lines)


def _lost(lost: Mapping[str, ImportError | LookupError]) -> str:
    names = sorted(lost)
    modules = {error.name if isinstance(error, ModuleNotFoundError) else None for error in lost.values()}
    module = next(iter(modules)) if len(modules) == 1 and len(names) > 1 else None
    rename = f'{{"{names[0]}": {names[0].rpartition(".")[2]}}}'
    if module is not None:
        rename = f'{{"{module}": "new_{module}"}}, trust=("new_{module}",)'
    lines = [f"  {name}: {lost[name]}" for name in names]
    return (
        "not there any more:\n" + "\n".join(lines) + f"\nInstall the package, or say what took its place: "
        f"load_model(path, rename={rename})"
    )
