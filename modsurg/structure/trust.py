"""Which classes and functions a file may name, and how a name becomes one without running anything else.

A name is written `module:qualname`, as in `torch.nn.modules.conv:Conv2d`. Nothing is imported unless its package is
trusted, and an object counts only where it was defined: `torch.nn.modules.module:OrderedDict` is not torch.nn's own.
"""

import enum
import re
import sys
from abc import ABC
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import Generic, Protocol, TypeGuard

import torch
from torch import nn

from modsurg.errors import TrustError, counted

Trusted = Iterable[str | type | Callable[..., object]] | str | type | Callable[..., object]
Renames = Mapping[str, str | type | Callable[..., object]]

# Modules of these packages hold no code that touches files, processes or the network when a model runs.
_PACKAGES = (
    "torch.nn",
    "torch.ao.nn",
    "torch.ao.quantization.stubs",
    "torchvision.models",
    "torchvision.ops",
    "torchvision.transforms",
    "modsurg.surgery.features",
)
# Of these, the package whose modules have objects of data classes as attributes: anchors, matchers, block settings.
_DATA_PACKAGE = "torchvision.models"


def _names(table: Mapping[str, str]) -> frozenset[str]:
    return frozenset(f"{home}:{name}" for home, names in table.items() for name in names.split())


# Every function that a file may name without the caller's word: pure ones, of numbers and tensors alone.
FUNCTIONS = _names(
    {
        "torch.nn.functional": "relu relu6 gelu elu selu celu silu mish hardswish hardsigmoid hardtanh leaky_relu glu "
        "rrelu sigmoid tanh softmax log_softmax softmin softsign tanhshrink logsigmoid softplus softshrink hardshrink "
        "threshold gumbel_softmax normalize dropout dropout2d interpolate pad linear layer_norm group_norm batch_norm "
        "max_pool1d max_pool2d max_pool3d _max_pool1d _max_pool2d _max_pool3d avg_pool1d avg_pool2d avg_pool3d "
        "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool1d adaptive_max_pool2d cross_entropy nll_loss "
        "mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits kl_div "
        "cosine_similarity pairwise_distance",
        "torch._C._nn": "gelu elu_ hardtanh hardtanh_ hardswish hardsigmoid leaky_relu leaky_relu_ log_sigmoid mish "
        "relu6 relu6_ silu silu_ softplus softshrink glu one_hot pad linear avg_pool2d avg_pool3d",
        "torch": "relu relu_ sigmoid tanh exp log log1p sqrt rsqrt square abs sin cos erf add sub mul div matmul cat "
        "stack sum mean clamp softmax log_softmax flatten selu selu_ celu celu_ rrelu pairwise_distance "
        "cosine_similarity avg_pool1d adaptive_avg_pool1d hardshrink",
        "torch.functional": "norm einsum",
        "math": "sqrt exp log sin cos tanh",
        "torchvision.ops.boxes": "box_iou",
        "torchvision.models.optical_flow.raft": "_pass_through_h",
        # of packages that have to be trusted besides
        "timm.layers.activations": "gelu gelu_tanh quick_gelu swish mish sigmoid tanh hard_swish hard_sigmoid",
    }
)
ENUMS = _names(
    {
        "torch.nn.utils.parametrizations": "_OrthMaps",
        "timm.layers.format": "Format",
        "peft.utils.peft_types": "PeftType TaskType",
        "transformers.utils.quantization_config": "QuantizationMethod",
        "transformers.generation.configuration_utils": "GenerationMode",
    }
)
_LONGEST_NAME = 500
CONTAINERS = frozenset({dict, list, tuple, set, str, bytes, int, float, OrderedDict, defaultdict, Counter, deque})
_TYPES = frozenset(f"{kind.__module__}:{kind.__qualname__}" for kind in CONTAINERS)
# With one of these a class has its own say when an object of it is filled, compared as an attribute or dropped.
_CODE = ("__del__", "__setstate__", "__get__", "__set__", "__delete__", "__set_name__", "__call__")
# Objects that torchvision's detectors call like functions; what they compute with are numbers.
_CALLED = _names({"torchvision.models.detection._utils": "BalancedPositiveNegativeSampler Matcher SSDMatcher"})
# Bases without code of their own that a class of a trusted package may have.
_PLAIN_BASES = frozenset({object, nn.Module, Generic, Protocol, ABC, *CONTAINERS})
# What a hostile file names; no model has a use for them.
_RUNS = re.compile(
    r"(builtins|code|copyreg|ctypes|functools|importlib|io|marshal|multiprocessing|nt|operator|os|pdb|pickle|posix|pty"
    r"|runpy|shutil|signal|socket|subprocess|sys|tempfile|timeit|trace|webbrowser"
    r"|torch\.(hub|package|serialization|utils\.cpp_extension))[.:]"
)


def qualified_name(value: object) -> str | None:
    """The name under which a class or function can be found again, None for a local or anonymous one.

    Example:
        >>> qualified_name(torch.nn.Conv2d), qualified_name(torch.relu), qualified_name(lambda: 0)
        ('torch.nn.modules.conv:Conv2d', 'torch:relu', None)
    """
    module = getattr(value, "__module__", None) or "builtins"
    for qualname in (getattr(value, "__qualname__", ""), getattr(value, "__name__", "")):
        if qualname and module in sys.modules and _find(module, qualname) is value:
            return f"{module}:{qualname}"
    return None


def is_data_class(kind: type) -> bool:
    """Whether objects of this class are data alone: attributes, and what a container holds.

    Example:
        >>> is_data_class(OrderedDict), is_data_class(nn.Linear), is_data_class(Path)
        (True, False, False)
    """
    if issubclass(kind, type | nn.Module | torch.Tensor | enum.Enum) or kind is object:
        return False
    if kind.__module__.partition(".")[0] in sys.stdlib_module_names and kind not in CONTAINERS:
        return False
    bases = [base for base in kind.__mro__ if base not in _PLAIN_BASES]
    called = f"{kind.__module__}:{kind.__qualname__}" in _CALLED
    return not any(name in vars(base) and not (called and name == "__call__") for base in bases for name in _CODE)


def is_module_class(kind: object) -> bool:
    """Whether this is a class of modules that Python source defines: not one of torch.fx or TorchScript."""
    if not isinstance(kind, type) or not issubclass(kind, nn.Module):
        return False
    return not any(_holds(base.__module__, ("torch.fx", "torch.jit", "torch.export")) for base in kind.__mro__)


def may_be_value(value: object) -> TypeGuard[Callable[..., object]]:
    """Whether a file may hold this as a value: a module class, a function, or one of Python's own types."""
    if isinstance(value, type):
        return is_module_class(value) or value in CONTAINERS
    return isinstance(value, FunctionType | BuiltinFunctionType)


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
        lost: dict[str, Exception] = {}
        for target in targets:
            try:
                found.append(self._load(target) if isinstance(target, str) else target)
            except TrustError:
                untrusted.append(str(target))
            except Exception as error:  # whatever importing a trusted module raises
                lost[_dotted(str(target))] = error
        if untrusted:
            raise TrustError(_untrusted(sorted(set(untrusted))))
        if lost:
            raise TrustError(_lost(lost))
        return found

    def _target(self, name: str) -> object:
        """The object itself where the caller gave it, otherwise its (new) name."""
        module, _, qualname = name.partition(":")
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
        parts = (*module.split("."), *qualname.split("."))
        hidden = any(part.startswith("__") for part in (parts[1:] if parts[0] == "__main__" else parts))
        if len(name) > _LONGEST_NAME or hidden or not all(part.isidentifier() for part in parts):
            return False
        if name in FUNCTIONS and _holds(module, ("torch", "torchvision", "math")):
            return True
        return name in _TYPES or _holds(module, _PACKAGES) or self._named(name)

    def _named(self, name: str) -> bool:
        """Whether the caller's own names cover this one: a package, a module, or the class itself."""
        return _dotted(name) in self._packages or _holds(name.partition(":")[0], self._packages)

    def _load(self, name: str) -> object:
        module, _, qualname = name.partition(":")
        if module not in sys.modules:
            if name not in FUNCTIONS:
                _check_defined(module, qualname)
            import_module(module)
        value = _find(module, qualname)
        if value is None:
            raise LookupError(f"{module} has no {qualname}")
        if name in _TYPES or name in FUNCTIONS or self._is_own(value, name):
            return value
        raise TrustError(name)

    def _is_own(self, value: object, name: str) -> bool:
        """Whether a trusted package defines the object, and it is of a kind that may be named."""
        if not isinstance(value, type):  # a function is trusted by its own name only
            return may_be_value(value) and _dotted(name) in self._packages
        if f"{value.__module__}:{value.__qualname__}" in ENUMS or is_module_class(value):
            trusted = (*_PACKAGES, *self._packages)
        elif is_data_class(value):
            trusted = (_DATA_PACKAGE, *self._packages)
        else:
            return False
        homes = {value.__module__, *(base.__module__ for base in value.__mro__ if not _is_plain_base(base))}
        return _dotted(name) in self._packages or all(_holds(home, trusted) for home in homes)


def _is_plain_base(base: type) -> bool:
    return base in _PLAIN_BASES or base.__module__ == "enum"


def _check_defined(module: str, qualname: str) -> None:
    """Check that the source of a module defines this class, so that a file can't have any module imported.

    Nothing is imported to find out, not even the packages that it is in.

    Raises:
        ModuleNotFoundError: There is no such module.
        LookupError: It has no such class.
    """
    spec, path = None, ""
    for part in module.split("."):
        inside = None if spec is None else spec.submodule_search_locations
        path = f"{path}.{part}".strip(".")
        spec = PathFinder.find_spec(path, inside)
        if spec is None and path == part:  # installed in place
            with suppress(ValueError):
                spec = find_spec(part)
        if spec is None or (path != module and not spec.submodule_search_locations):
            raise ModuleNotFoundError(f"No module named {path!r}", name=path)
    name = re.escape(qualname.partition(".")[0])
    origin = (spec and spec.origin) or ""
    source = Path(origin).read_text(encoding="utf-8") if origin.endswith(".py") else ""
    if not re.search(rf"^\s*class {name}\b|^{name} = (collections\.)?namedtuple\(", source, re.MULTILINE):
        raise LookupError(f"{module} has no {qualname}")


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
    foreign = [name for name in names if _RUNS.match(name)]
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


def _lost(lost: Mapping[str, Exception]) -> str:
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
