"""Rules for tensors that another project stores otherwise: packed or apart, transposed, for another image size.

A rule is applied to keys before anything is read, and to values when they are read. Each has an inverse.
"""

import ast
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import TypeAlias

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from modsurg.checkpoints.formats.ruled import Output, RuledSource
from modsurg.checkpoints.formats.source import Entry, Source
from modsurg.checkpoints.load.key_mapping import chooser, unwrapped
from modsurg.errors import LoadError, visible
from modsurg.tree.positions import Grid, Resampling, find_grid, plan_resampling

Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Concat:
    """Join tensors of the source into one, such as q, k and v into a packed qkv.

    Attributes:
        sources: Keys, or what holds them (`"blocks.*.q"` for weight and bias), each with at most one `*` (for one
            segment) or `**` (for several).
        target: The key of the joined tensor, in which `*` is the same text.
        dim: Along which dimension.
        sizes: The sizes along `dim`, for the inverse; needed where they differ and no model tells them.

    Example:
        >>> from modsurg import load_state
        >>> packed = torch.nn.ModuleDict({"qkv": torch.nn.Linear(4, 12)})
        >>> apart = torch.nn.ModuleDict({name: torch.nn.Linear(4, 4) for name in ("q", "k", "v")})
        >>> rule = Concat(["q", "k", "v"], "qkv")
        >>> print(load_state(packed, apart.state_dict(), rules=[rule]))
        loaded 2 of 2 keys
        >>> print(load_state(apart, packed.state_dict(), rules=[rule.inverse()]))
        loaded 6 of 6 keys
    """

    sources: Sequence[str]
    target: str
    dim: int = 0
    sizes: Sequence[int] | None = None

    def __post_init__(self) -> None:
        """Check the arguments."""
        _check_join(self, "sources", "target")

    def inverse(self) -> "Split":
        """Give the rule for the other direction."""
        return Split(self.target, self.sources, self.dim, self.sizes)

    def outputs(self, source: Source, model: nn.Module | None) -> Iterator[Output]:
        """Plan the tensors that this rule makes; see `apply_rules`."""
        for match in _matches(self.sources[0], source, self):
            keys = [match.fill(pattern, self) for pattern in self.sources]
            if absent := [key for key in keys if key not in source]:
                raise LoadError(f"{self}: there is no {absent[0]}; nothing was loaded")
            entries = [source[key] for key in keys]
            others = {tuple(_without(entry.shape, self.dim, self)) for entry in entries}
            if len(others) > 1 or len({entry.dtype for entry in entries}) > 1:
                found = ", ".join(f"{entry.name} {entry.shape}" for entry in entries)
                raise LoadError(
                    f"{self}: these can't be joined along dimension {self.dim}: {found}; nothing was loaded"
                )
            shape, sizes = list(entries[0].shape), [entry.shape[self.dim] for entry in entries]
            if self.sizes is not None and sizes != list(self.sizes):
                raise LoadError(f"{self}: the sizes along dimension {self.dim} are {sizes}; nothing was loaded")
            shape[self.dim] = sum(sizes)
            yield _output(
                match.fill(self.target, self), keys, entries[0], shape, lambda parts: torch.cat(parts, self.dim)
            )


@dataclass(frozen=True)
class Split:
    """Cut a tensor of the source into several, such as a packed qkv into q, k and v; the inverse of `Concat`.

    Attributes:
        source: A key, or what holds it, with at most one `*` or `**`.
        targets: The keys of the pieces.
        dim: Along which dimension.
        sizes: The sizes of the pieces along `dim`; by default those of the model, in `load_state`, or equal ones.
    """

    source: str
    targets: Sequence[str]
    dim: int = 0
    sizes: Sequence[int] | None = None

    def __post_init__(self) -> None:
        """Check the arguments."""
        _check_join(self, "targets", "source")

    def inverse(self) -> Concat:
        """Give the rule for the other direction."""
        return Concat(self.targets, self.source, self.dim, self.sizes)

    def outputs(self, source: Source, model: nn.Module | None) -> Iterator[Output]:
        """Plan the tensors that this rule makes; see `apply_rules`."""
        for match in _matches(self.source, source, self):
            entry = source[match.key]
            _without(entry.shape, self.dim, self)
            names = [match.fill(pattern, self) for pattern in self.targets]
            whole, start, shape = entry.shape[self.dim], 0, list(entry.shape)
            sizes = list(self.sizes or self._sizes_in(model, names, whole) or [whole // len(names)] * len(names))
            if sum(sizes) != whole or len(sizes) != len(names):
                raise LoadError(f"{self}: {match.key} {entry.shape} can't be cut into {sizes}; nothing was loaded")
            for name, size in zip(names, sizes, strict=True):
                shape[self.dim] = size
                yield _output(name, [match.key], entry, shape, self._cut(start, size))
                start += size

    def _sizes_in(self, model: nn.Module | None, names: Sequence[str], whole: int) -> list[int] | None:
        """The sizes of the pieces in the model, if it has them all and they add up."""
        shapes = [_shape_in(model, name) for name in names]
        sizes = [shape[self.dim] for shape in shapes if shape and -len(shape) <= self.dim < len(shape)]
        return sizes if len(sizes) == len(names) and sum(sizes) == whole else None

    def _cut(self, start: int, size: int) -> Callable[[list[torch.Tensor]], torch.Tensor]:
        return lambda parts: parts[0].narrow(self.dim, start, size).clone()


@dataclass(frozen=True)
class Transpose:
    """Transpose matrices, such as those of GPT-2's Conv1D, which `nn.Linear` stores the other way round.

    Attributes:
        where: Keys: a name, glob or `re:`, of keys or of what holds them, or several. Only matrices are transposed.
    """

    where: str | Sequence[str]

    def __post_init__(self) -> None:
        """Check the arguments."""
        _check_where(self)

    def inverse(self) -> "Transpose":
        """Give the rule for the other direction, which is the same."""
        return self

    def outputs(self, source: Source, model: nn.Module | None) -> Iterator[Output]:
        """Plan the tensors that this rule makes; see `apply_rules`."""
        found = [key for key in _chosen(self.where, source) if len(source[key].shape) == 2]
        if not found:
            raise LoadError(f"{self}: no matrix matches; nothing was loaded")
        for key in found:
            entry = source[key]
            yield _output(key, [key], entry, entry.shape[::-1], lambda parts: parts[0].t().contiguous())


@dataclass(frozen=True)
class Interpolate:
    """Resample position embeddings for another image size: bicubic, antialiased, prefix tokens kept.

    Attributes:
        where: Keys: a name, glob or `re:`, of keys or of what holds them, or several.
        grid: Rows and columns of patches wanted. In `load_state` they are by default those of the model, if the key is
            one of the model's names.
        old_grid: Rows and columns of the source; a square by default.
    """

    where: str | Sequence[str]
    grid: Grid | None = None
    old_grid: Grid | None = None

    def __post_init__(self) -> None:
        """Check the arguments."""
        _check_where(self)
        for name in ("grid", "old_grid"):
            given = getattr(self, name)
            if given is not None and not (isinstance(given, Sequence) and len(given) == 2 and _is_sizes(given)):
                raise LoadError(f"{name}={given!r} must be rows and columns, such as (14, 14)")
            object.__setattr__(self, name, given and tuple(given))

    def inverse(self) -> "Interpolate":
        """Give the rule for the other direction, which brings back the size, not the values."""
        return Interpolate(self.where, self.old_grid, self.grid)

    def outputs(self, source: Source, model: nn.Module | None) -> Iterator[Output]:
        """Plan the tensors that this rule makes; see `apply_rules`."""
        found = _chosen(self.where, source)
        if not found:
            raise LoadError(f"{self}: matches no key; nothing was loaded")
        for key in found:
            entry = source[key]
            shape = _shape_in(model, key)
            grid = find_grid(model, unwrapped(key)) if model is not None and shape and self.grid is None else self.grid
            made = plan_resampling(key, entry.shape, None if self.grid else shape, grid, self.old_grid)
            if made is None:
                raise LoadError(
                    f"{self}: can't tell how {key} {entry.shape} is laid out; nothing was loaded. "
                    f'Try: Interpolate("{key}", grid=(14, 14), old_grid=(16, 16)) with the numbers of patches'
                )
            yield _output(key, [key], entry, made.shape, _resample(made))


TensorRule: TypeAlias = Concat | Split | Transpose | Interpolate


def rule_as_code(rule: TensorRule) -> str:
    """A rule as Python would read it, without what is the default.

    Example:
        >>> rule_as_code(Concat(("q", "k"), "qk"))
        'Concat(["q", "k"], "qk")'
    """
    given = []
    for each in fields(rule):
        value = getattr(rule, each.name)
        if each.default is MISSING or value != each.default:
            text = json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
            given.append(text if each.default is MISSING else f"{each.name}={text}")
    return visible(f"{type(rule).__name__}({', '.join(given)})")


def parse_rule(text: str) -> TensorRule:
    """Read a rule as Python would, without running anything: a class of this module, with literal arguments.

    Raises:
        LoadError: Anything else.

    Example:
        >>> parse_rule('Transpose("h.*.attn.c_attn")')
        Transpose(where=('h.*.attn.c_attn',))
    """
    kinds = {kind.__name__: kind for kind in (Concat, Split, Transpose, Interpolate)}
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in kinds:
            options = {str(each.arg): ast.literal_eval(each.value) for each in call.keywords}
            return kinds[call.func.id](*map(ast.literal_eval, call.args), **options)
    except (SyntaxError, TypeError, ValueError, MemoryError, RecursionError) as error:
        if isinstance(error, LoadError):
            raise
    known = ", ".join(f"{name}(...)" for name in kinds)
    raise LoadError(f'{visible(text)} is not a rule; rules are {known}. Try: Transpose("h.*.attn.c_attn")')


def apply_rules(source: Source, rules: Sequence[TensorRule], model: nn.Module | None = None) -> Source:
    """See a source as the rules change it, one after the other.

    Args:
        source: Closed with what is returned.
        rules: Each sees the keys that the ones before it left.
        model: Where the tensors go, which tells sizes that a rule leaves open.

    Raises:
        LoadError: A rule that matches no key, or shapes that it can't be used with.
    """
    if not isinstance(rules, Sequence) or not all(isinstance(rule, TensorRule) for rule in rules):
        raise LoadError(f"rules={rules!r:.80} must be a list of rules, such as [modsurg.rules.Transpose('h.*.c_attn')]")
    for rule in rules:
        source = RuledSource(source, list(rule.outputs(source, model)))
    return source


@dataclass(frozen=True)
class _Match:
    """A key that a pattern matches: what a wrapper put before it, the text of its `*`, and what follows the pattern."""

    key: str
    wrapper: str
    star: str
    tail: str

    def fill(self, pattern: str, rule: TensorRule) -> str:
        before, star, after = _parted(pattern, rule)
        return f"{self.wrapper}{before}{self.star if star else ''}{after}{self.tail}"


def _matches(pattern: str, source: Source, rule: TensorRule) -> list[_Match]:
    before, star, after = _parted(pattern, rule)
    middle = {"": "", "*": r"[^.]+", "**": ".+"}[star]
    expression = re.compile(rf"{re.escape(before)}(?P<star>{middle}){re.escape(after)}(?P<tail>(?:\..+)?)", re.DOTALL)
    names = {key: key for key in source}, {key: unwrapped(key) for key in source if key.endswith(unwrapped(key))}
    for bare in names:
        found = [(key, expression.fullmatch(name)) for key, name in bare.items()]
        if matches := [
            _Match(key, key.removesuffix(bare[key]), match["star"], match["tail"]) for key, match in found if match
        ]:
            return matches
    shown = ", ".join(list(source)[:3])
    raise LoadError(f"{rule}: {pattern!r} matches no key; nothing was loaded. The keys are like {shown}")


def _chosen(where: str | Sequence[str], source: Source) -> list[str]:
    """The keys that match, or that do without what wrappers put in."""
    chosen = chooser(where)
    return list(filter(chosen, source)) or [key for key in source if chosen(unwrapped(key))]


def _parted(pattern: str, rule: TensorRule) -> tuple[str, str, str]:
    """The text before the `*` or `**`, itself, and the text after it."""
    star = "**" if "**" in pattern else "*" if "*" in pattern else ""
    before, _, after = pattern.partition(star) if star else (pattern, "", "")
    if "*" in before + after:
        raise LoadError(f"{rule}: {pattern!r} must have at most one * or **; nothing was loaded")
    return before, star, after


def _shape_in(model: nn.Module | None, name: str) -> Shape | None:
    """The shape of the parameter or buffer of this name, if the model has it."""
    path, _, attribute = unwrapped(name).rpartition(".")
    try:
        tensor = getattr(model.get_submodule(path), attribute, None) if model is not None else None
    except AttributeError:
        return None
    return tuple(tensor.shape) if isinstance(tensor, torch.Tensor) and not is_lazy(tensor) else None


def _is_sizes(value: object) -> bool:
    return isinstance(value, Sequence) and all(type(size) is int and size > 0 for size in value)


def _check_join(rule: Concat | Split, several: str, one: str) -> None:
    """Refuse arguments of other types, and keep lists as tuples, so that equal rules are equal."""
    names, name, kind = getattr(rule, several), getattr(rule, one), type(rule).__name__
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(each, str) for each in names):
        raise LoadError(f'{kind}: {several}={names!r:.80} must be a list of keys, such as ["q", "k", "v"]')
    if not names or len(set(names)) < len(names):
        raise LoadError(f"{kind}: {several}={names!r:.80} must be different keys, at least one")
    if not isinstance(name, str) or type(rule.dim) is not int:
        raise LoadError(f"{kind}: {one}={name!r:.80} must be a key, and dim={rule.dim!r:.80} a number")
    if rule.sizes is not None and not (_is_sizes(rule.sizes) and len(rule.sizes) == len(names)):
        raise LoadError(f"{kind}: sizes={rule.sizes!r:.80} must be {len(names)} positive integers")
    object.__setattr__(rule, several, tuple(names))
    object.__setattr__(rule, "sizes", rule.sizes and tuple(rule.sizes))


def _check_where(rule: Transpose | Interpolate) -> None:
    where = [rule.where] if isinstance(rule.where, str) else rule.where
    if not isinstance(where, Sequence) or not where or not all(isinstance(each, str) for each in where):
        raise LoadError(f"{type(rule).__name__}: where={rule.where!r:.80} must be a key, glob or re:, or several")
    object.__setattr__(rule, "where", tuple(where))


def _without(shape: Shape, dim: int, rule: TensorRule) -> Shape:
    if not -len(shape) <= dim < len(shape):
        raise LoadError(f"{rule}: a tensor of shape {shape} has no dimension {dim}; nothing was loaded")
    dim %= len(shape)
    return shape[:dim] + shape[dim + 1 :]


def _output(
    name: str,
    keys: Sequence[str],
    like: Entry,
    shape: Sequence[int],
    make: Callable[[list[torch.Tensor]], torch.Tensor],
) -> Output:
    nbytes = torch.Size(shape).numel() * like.dtype.itemsize
    return Output(Entry(name, like.dtype, tuple(shape), nbytes), tuple(keys), make)


def _resample(resampling: Resampling) -> Callable[[list[torch.Tensor]], torch.Tensor]:
    return lambda parts: resampling.apply(parts[0])
