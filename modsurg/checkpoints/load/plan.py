"""The plan of a load: what goes where, or all the reasons why it can't. Nothing is changed here."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, get_args

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from modsurg.checkpoints.formats.derived import count_overflows, is_general
from modsurg.checkpoints.formats.source import Entry, Source
from modsurg.checkpoints.load.key_mapping import Only, Rename, chooser, pair, renamer
from modsurg.checkpoints.load.model_tensors import ModelTensor, ModelTensors
from modsurg.checkpoints.load.report import LoadReport, Problems, as_code
from modsurg.checkpoints.load.sharing import check_sharing
from modsurg.checkpoints.rules import Interpolate, rule_as_code
from modsurg.errors import LoadError, counted
from modsurg.tree.positions import find_grid, guess_grids, holds_positions, plan_resampling

OnMismatch = Literal["error", "skip", "slice", "interpolate"]


@dataclass(frozen=True)
class Options:
    """How a state may be bent to fit; the arguments of `load_state`."""

    strict: bool = True
    rename: Rename = None
    only: Only = None
    on_mismatch: OnMismatch = "error"


@dataclass(frozen=True, slots=True)
class Fill:
    """One tensor to be filled.

    Attributes:
        target: Where.
        key: The source's key.
        adapt: Gives the values the target's shape; None where they have it.
    """

    target: ModelTensor
    key: str
    adapt: Callable[[torch.Tensor], torch.Tensor] | None = None

    def read(self, source: Source) -> torch.Tensor:
        """Read the values, in the target's shape."""
        values = source.read(self.key)
        return values if self.adapt is None else self.adapt(values)


@dataclass
class Plan:
    """What a load will do.

    Attributes:
        fills: Tensors to be filled.
        extra: Module and the source's key of the extra state that it is given.
        leftover: Name -> the source's key, for what the model has no place for.
        missing: Names of the model that nothing fills.
        covered: Names that need no key, because another one fills their memory.
        skipped: Name -> why it is left alone.
        sliced: Name -> the two shapes.
        resampled: Name -> the two shapes.
        reshaped: Name -> the source's key, for shapes that do not match: loading code of the model's own may mend them.
        translated: Names that loading code of the model's own filled from keys that are not names of the model.
        dispensable: Names that the file lacks, which does not matter.
    """

    fills: list[Fill] = field(default_factory=list)
    extra: list[tuple[str, nn.Module, str]] = field(default_factory=list)
    leftover: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    sliced: dict[str, str] = field(default_factory=dict)
    resampled: dict[str, str] = field(default_factory=dict)
    covered: frozenset[str] = frozenset()
    reshaped: dict[str, str] = field(default_factory=dict)
    translated: list[str] = field(default_factory=list)
    dispensable: list[str] = field(default_factory=list)

    def keys(self, source: Source) -> list[str]:
        """The source's keys of the tensors that will be read."""
        extra = [key for _, _, key in self.extra if key in source]
        return [*(fill.key for fill in self.fills), *extra, *self.reshaped.values()]

    def places(self, targets: ModelTensors) -> list[ModelTensor]:
        """All targets that get their values."""
        filled = {fill.target.name for fill in self.fills} | self.covered | self.reshaped.keys()
        return [target for name, target in targets.tensors.items() if name in filled]

    def report(self, advice: str = "") -> LoadReport:
        """The plan, carried out."""
        filled = [*(fill.target.name for fill in self.fills), *self.reshaped, *self.translated]
        loaded = [*filled, *(name for name, _, _ in self.extra)]
        return LoadReport(
            loaded,
            self.missing,
            list(self.leftover.values()),
            self.skipped,
            self.sliced,
            self.resampled,
            advice=advice,
        )


def make_plan(source: Source, targets: ModelTensors, options: Options) -> tuple[Plan, Problems]:
    """Match a source with a model.

    Raises:
        LoadError: Arguments that fit nothing: a rename rule, `only`, two keys for one name.
    """
    if options.on_mismatch not in get_args(OnMismatch):
        raise LoadError(f'on_mismatch={options.on_mismatch!r} must be "error", "skip", "slice" or "interpolate"')
    chosen = chooser(options.only)
    everything = [*targets.tensors, *targets.extra]
    names = [name for name in everything if chosen(name)]
    if not names and options.only is not None:
        raise LoadError(f"only={options.only!r} matches no key of the model; nothing was loaded")
    renamed = rename_keys(source, options)
    homes = {name: renamed[key] for key, name in pair(renamed, everything).items()}
    planner = _Planner(source, targets, options)
    for name in names:
        if name in homes:
            planner.place(name, homes[name])
    plan, problems = planner.plan, planner.problems
    used = set(homes.values())
    plan.leftover = {new: key for new, key in renamed.items() if key not in used and chosen(new)}
    planner.check_sharing()
    absent = [name for name in names if name not in homes and name not in plan.covered]
    for name in absent:
        (plan.dispensable if planner.is_dispensable(name) else plan.missing).append(name)
    problems.total = len(names) - len(plan.covered) - len(plan.dispensable)
    return plan, problems


class _Planner:
    """Decides about one name after the other."""

    def __init__(self, source: Source, targets: ModelTensors, options: Options) -> None:
        self.source = source
        self.targets = targets
        self.options = options
        self.plan = Plan()
        self.problems = Problems()

    def place(self, name: str, key: str) -> None:
        """Decide about a name for which the source has a key."""
        if name in self.targets.tensors and key in self.source:
            self._place_tensor(self.targets.tensors[name], self.source[key])
        elif name in self.targets.tensors:
            self._misfit(name, "file extra state, model a tensor", skippable=False)
        else:
            self.plan.extra.append((name, self.targets.extra[name], key))

    def _place_tensor(self, target: ModelTensor, entry: Entry) -> None:
        name = target.name
        if is_lazy(target.tensor):
            self.plan.reshaped[name] = entry.name
            return
        shape = tuple(target.tensor.shape)
        lossy = _lossy(self.source, entry, target.tensor)
        problem = lossy or f"file {entry.shape}, model {shape}"
        if entry.shape == shape and not lossy:
            self.plan.fills.append(Fill(target, entry.name))
        elif self.options.on_mismatch == "skip":
            self.plan.skipped[name] = problem
        elif self._sliceable(target, entry) and not lossy:
            self.plan.fills.append(Fill(target, entry.name, partial(_put_into_copy, target)))
            self.plan.sliced[name] = problem
        elif self.options.on_mismatch == "interpolate" and not lossy and holds_positions(name):
            self._resample(target, entry, problem)
        elif self.options.on_mismatch == "interpolate" and target.attribute == "relative_position_index":
            self.plan.skipped[name] = f"{problem}: it follows from the model's window"
        else:
            self._misfit(name, problem, skippable=True)
            if not lossy:
                self.plan.reshaped[name] = entry.name

    def _sliceable(self, target: ModelTensor, entry: Entry) -> bool:
        """A part can be filled, and the rest has values already."""
        fits = len(entry.shape) == target.tensor.dim() and not target.tensor.is_meta
        return self.options.on_mismatch == "slice" and fits

    def _resample(self, target: ModelTensor, entry: Entry, problem: str) -> None:
        """Plan the resampling of position embeddings, or give the rule that tells how the file's are laid out."""
        name, shape = target.name, tuple(target.tensor.shape)
        grid = find_grid(self.targets.model, name)
        if grid is None and isinstance(target.module, nn.Embedding):  # positions in a text
            self._misfit(name, problem, skippable=True)
            return
        if resampling := plan_resampling(name, entry.shape, shape, grid):
            self.plan.fills.append(Fill(target, entry.name, resampling.apply))
            self.plan.resampled[name] = problem
            return
        rules = []
        if grid is not None and len(entry.shape) > 1:
            old_grids = guess_grids(entry.shape[-2], shape[-2] - grid[0] * grid[1])
            rules = [
                Interpolate(entry.name, grid, old)
                for old in old_grids
                if plan_resampling(name, entry.shape, shape, grid, old)
            ]
        fix = f"; not a square of patches: load_state(..., rules=[{rule_as_code(rules[0])}])" if rules else ""
        self._misfit(name, problem + fix, skippable=True)

    def _misfit(self, name: str, problem: str, *, skippable: bool) -> None:
        self.problems.misfits[name] = problem
        if skippable:
            self.problems.skippable.add(name)

    def is_dispensable(self, name: str) -> bool:
        """A batch counter, which files from before it existed lack."""
        target = self.targets.tensors.get(name)
        return (
            target is not None
            and target.attribute == "num_batches_tracked"
            and isinstance(target.module, nn.modules.batchnorm._NormBase)
            and not target.tensor.is_meta
            and not self.source.notes.versions
        )

    def check_sharing(self) -> None:
        """Find names that need no key of their own, and those whose values would overwrite each other."""
        keys = {fill.target.name: fill.key for fill in self.plan.fills}
        sharing = check_sharing(self.source, list(self.targets.tensors.values()), keys)
        for name, other in sharing.conflicts.items():
            what = f"shares memory with {other} in the model, and the file has differing values"
            if name == other:
                what = "has one element at several indices in the model (expand): clone() it before loading"
            fix = f"; load_state(..., rename={{{as_code(keys[name])}: None}}) leaves it out"
            self.problems.misfits[name] = what + fix
        self.plan.covered = sharing.covered


def _put_into_copy(target: ModelTensor, values: torch.Tensor) -> torch.Tensor:
    """The target's own values, with those that the file has for the same places."""
    new = target.tensor.detach().clone()
    common = tuple(slice(0, min(sizes)) for sizes in zip(new.shape, values.shape, strict=True))
    new[common] = values[common].to(new)
    return new


def rename_keys(source: Source, options: Options) -> dict[str, str]:
    """New name -> the source's key."""
    try:
        new_name = renamer(options.rename, source.keys_in_order)
    except LoadError as error:
        raise LoadError(f"{error}, of its {source.taken!r}" if source.taken else str(error)) from None
    renamed: dict[str, str] = {}
    for key in source.keys_in_order:
        name = new_name(key)
        if name is None:
            continue
        if name in renamed:
            raise LoadError(f"rename: {renamed[name]!r} and {key!r} both become {name!r}; nothing was loaded")
        renamed[name] = key
    return renamed


def _rank(dtype: torch.dtype) -> int:
    if dtype.is_complex or dtype.is_floating_point:
        return 3 if dtype.is_complex else 2
    return 0 if dtype is torch.bool else 1


def _lossy(source: Source, entry: Entry, tensor: torch.Tensor) -> str:
    """Why the values would not survive in the model's tensor; empty if they do."""
    dtype = tensor.dtype
    if tensor.layout is not torch.strided:
        return f"file a dense tensor, model a sparse one ({str(tensor.layout).removeprefix('torch.')})"
    if entry.dtype is dtype:
        return ""
    names = [str(each).removeprefix("torch.") for each in (entry.dtype, dtype)]
    text = f"file {names[0]}, model {names[1]}, which loses values"
    ranks = _rank(entry.dtype), _rank(dtype)
    narrows = dtype.is_floating_point and not is_general(dtype)
    if ranks[0] > ranks[1] or narrows or not _convertible(entry.dtype, dtype):
        return text
    if ranks == (2, 2) and torch.finfo(entry.dtype).max > torch.finfo(dtype).max:
        count = count_overflows(source.read(entry.name), dtype)
        return text.replace("loses values", f"overflows at {counted(count, 'value', 'values')}") if count else ""
    if ranks == (1, 1) and not _holds(torch.iinfo(dtype), torch.iinfo(entry.dtype)):
        values = source.read(entry.name)
        return "" if values.to(dtype).double().equal(values.double()) else text
    return ""


def _holds(wide: torch.iinfo, narrow: torch.iinfo) -> bool:
    return wide.min <= narrow.min and narrow.max <= wide.max


def _convertible(old: torch.dtype, new: torch.dtype) -> bool:
    try:
        torch.zeros(1, dtype=torch.uint8, device="cpu").expand(old.itemsize).contiguous().view(old).to(new)
    except (RuntimeError, NotImplementedError, TypeError):
        return False
    return True
