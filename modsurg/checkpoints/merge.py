"""Checkpoint arithmetic, tensor by tensor: `merge`."""

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from modsurg.checkpoints.formats.derived import DerivedSource, count_overflows
from modsurg.checkpoints.formats.memory import MemorySource
from modsurg.checkpoints.formats.parts import run_part
from modsurg.checkpoints.formats.registry import open_source, write_source
from modsurg.checkpoints.formats.source import Source
from modsurg.checkpoints.load.key_mapping import Only, Rename, chooser, renamer
from modsurg.checkpoints.load.suggestions import suggest_rules
from modsurg.checkpoints.lora import LoraAdapter
from modsurg.checkpoints.state import State
from modsurg.errors import LoadError, MergeError, counted, listed, warn

Method = Literal["linear", "slerp", "task", "ties", "dare"]
Weights: TypeAlias = "Mapping[str | os.PathLike[str] | nn.Module, float] | Sequence[tuple[object, float]]"
Progress = Callable[[int, int], None]

_DENSITY = {"ties": 0.2, "dare": 0.1}
_NEEDS_BASE = ("task", "ties", "dare")
_PARALLEL = 0.9995
_PIECE = 1 << 15  # elements; more would be shared out among threads, which wait for each other on a busy machine


@dataclass(frozen=True)
class Merge:
    """What `merge` wrote. Prints as one line, and one for each weight that an adapter changed.

    Attributes:
        target: What to load: the file, or the index of the shards.
        method: How the tensors were combined.
        tensors: How many tensors there are in it, tied ones included.
        nbytes: Their size in bytes, tied ones once.
        lora: The keys that an adapter changed.
    """

    target: Path
    method: str
    tensors: int
    nbytes: int
    lora: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = f"{self.method} -> {self.target}: {counted(self.tensors, 'tensor', 'tensors')}, {self.nbytes:,} bytes"
        return "\n".join([text, *(f"  lora  {key}" for key in self.lora)])


def merge(
    sources: Weights,
    target: str | os.PathLike[str],
    *,
    method: Method = "linear",
    base: "str | os.PathLike[str] | nn.Module | Mapping[str, Any] | None" = None,
    density: float | None = None,
    seed: int = 0,
    only: Only = None,
    rename: Rename = None,
    lora: str | os.PathLike[str] | None = None,
    shard_size: int | str | None = None,
    progress: Progress | None = None,
) -> Merge:
    r"""Combine checkpoints into one: an average, a model soup, task arithmetic, a LoRA adapter folded in.

    Tensor by tensor: memory for two of the largest tensors for each source is enough. Sums are made in float32 (float64
    for float64); the result has the dtype of the base, or of the first source. Integer and boolean tensors are those of
    the first source. What is tied in every source stays tied.

    Args:
        sources: Weight of each source: a path of any format, or a model. States, which can't be keys of a dictionary,
            go into a list of pairs: `[(state, 0.5), ("b.safetensors", 0.5)]`. Weights are used as they are.
        target: The suffix chooses the format, as in `save_state`.
        method: How floating tensors x of the sources, with weights w, become one:

            - `"linear"`: sum of w x (Wortsman et al., "Model soups", 2022).
            - `"slerp"`: two sources, on the arc between them (Shoemake, 1985); the weights must sum to 1.
            - `"task"`: base + sum of w (x - base) (Ilharco et al., "Editing Models with Task Arithmetic", 2023).
            - `"ties"`: of each x - base the largest `density` stay; where they disagree in sign, the heavier sign wins;
              base + the weighted mean of those that agree (Yadav et al., "TIES-Merging", 2023).
            - `"dare"`: of each x - base a random `density` stays, divided by `density`; then as `"task"` (Yu et al.,
              "Language Models are Super Mario", 2024).
        base: What `"task"`, `"ties"` and `"dare"` compare with. For other methods it only gives the dtype.
        density: Share of the differences that stays: by default 0.2 for `"ties"`, 0.1 for `"dare"`.
        seed: Chooses the differences that `"dare"` keeps; the same seed gives the same file.
        only: Only these keys are combined; the others are those of the base, or of the first source.
        rename: From keys of the sources to keys of the target, as in `load_state`; a rule counts where it matches.
        lora: A PEFT adapter folder, folded into the result.
        shard_size: As in `save_state`.
        progress: Called with the bytes done and all the bytes, after each tensor.

    Raises:
        MergeError: The sources have other keys or shapes than each other, or the method can't be used with them; an
            adapter that is not plain LoRA, or changes nothing. Nothing was written.
        FileNotFoundError: A source that is not there.
        FormatError: A source that is not what its name says.

    Example:
        >>> import tempfile
        >>> from modsurg import read_state, save_state
        >>> folder = tempfile.mkdtemp()
        >>> a = save_state({"w": torch.tensor([1.0, 2.0])}, f"{folder}/a.safetensors")
        >>> b = save_state({"w": torch.tensor([3.0, 6.0])}, f"{folder}/b.safetensors")
        >>> done = merge({a: 0.5, b: 0.5}, f"{folder}/soup.safetensors")
        >>> read_state(done.target)["w"]
        tensor([2., 4.])
    """
    with ExitStack() as opened:
        pairs = [(_open(each, rename, opened), weight) for each, weight in _items(sources)]
        found = _open(base, rename, opened) if base is not None else None
        _check_method(method, [weight for _, weight in pairs], found)
        merged = MergedSource(pairs, found, _combiner(method, _checked_density(method, density), seed), only)
        if lora is not None:
            merged.adapter = LoraAdapter(lora)
            opened.callback(merged.adapter.close)
            merged.adapter.check(merged)
        _warn_of(merged, len(pairs))
        merged.progress = progress
        written = write_source(target, merged, shard_size=shard_size)
        nbytes = sum(merged[key].nbytes for key in merged.stored)
        return Merge(written, method, len(merged), nbytes, tuple(merged.adapter.targets) if merged.adapter else ())


Combine: TypeAlias = Callable[[str, Iterable[Tensor], Sequence[float], Tensor | None], Tensor]


class MergedSource(Source):
    """Several sources as one, each tensor combined when it is read.

    Args:
        pairs: The sources and their weights.
        base: What they are compared with, if anything.
        combine: Makes one tensor of those of the sources.
        only: Which keys are combined.

    Attributes:
        combined: The keys that are combined; the others are those of the base, or of the first source.

    Raises:
        MergeError: The sources do not have the same keys and shapes.
    """

    def __init__(
        self, pairs: Sequence[tuple[Source, float]], base: Source | None, combine: Combine, only: Only
    ) -> None:
        first = base if base is not None else pairs[0][0]
        self._sources = [source for source, _ in pairs]
        self._weights = [weight for _, weight in pairs]
        self._base = base
        self._first = first
        self._combine = combine
        self.combined = set(filter(chooser(only), first))
        self.adapter: LoraAdapter | None = None
        self.progress: Progress | None = None
        if only is not None and not self.combined:
            raise MergeError(f"only={only!r} matches no key; nothing was written. The keys are like {_some(first)}")
        everyone = [first, *(source for source in self._sources if source is not first)]
        for source in everyone[1:]:
            _check_same(first, source)
        ties = _common_ties(everyone)
        super().__init__(None, dict(first), replace(first.notes, ties=ties))
        self._done, self._total = 0, sum(self[key].nbytes for key in self.stored)

    def read(self, key: str) -> Tensor:
        """Read and combine one tensor."""
        value = self._merge(key)
        if self.adapter is not None:
            value = self.adapter.apply(key, value)
        if self.progress is not None:
            self._done += self[key].nbytes
            self.progress(self._done, self._total)
        return value

    def _merge(self, key: str) -> Tensor:
        dtype = self[key].dtype
        if not (dtype.is_floating_point or dtype.is_complex):
            return self._sources[0].read(key)
        if key not in self.combined:
            return self._first.read(key)
        wide = _accumulator(dtype)
        base = None if self._base is None else _as_real(self._base.read(key).to(wide))
        values = (_as_real(source.read(key).to(wide)) for source in self._sources)
        merged = self._combine(key, values, self._weights, base)
        if count := count_overflows(merged, dtype.to_real()):
            raise MergeError(
                f"{key}: {counted(count, 'merged value does', 'merged values do')} not fit in {dtype}; nothing was "
                "written. Try: convert(source, target, dtype=torch.float32) of the first source, or of the base"
            )
        return (torch.view_as_complex(merged) if dtype.is_complex else merged).to(dtype)


def _combiner(method: Method, density: float, seed: int) -> Combine:
    if method == "slerp":
        return lambda key, values, weights, base: _slerp(tuple(values), weights[1])
    if method == "ties":
        return lambda key, values, weights, base: _ties(values, weights, _present(base), density)
    if method == "dare":
        return lambda key, values, weights, base: _dare(values, weights, _present(base), density, f"{seed} {key}")
    if method == "task":
        return lambda key, values, weights, base: _task(values, weights, _present(base))
    return lambda key, values, weights, base: _linear(values, weights)


def _linear(values: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
    total: Tensor | None = None
    for value, weight in zip(values, weights, strict=True):
        total = value * weight if total is None else total.add_(value, alpha=weight)
    return _present(total)


def _task(values: Iterable[Tensor], weights: Sequence[float], base: Tensor) -> Tensor:
    total = base.clone()
    for value, weight in zip(values, weights, strict=True):
        total.add_(value - base, alpha=weight)
    return total


def _slerp(values: Sequence[Tensor], t: float) -> Tensor:
    """Interpolate on the arc between two directions; where they are nearly one, on the line."""
    first, second = values
    a, b = first.flatten(), second.flatten()
    norms = float(a.norm()) * float(b.norm())
    cosine = float(torch.dot(a, b)) / norms if norms else 1.0
    if abs(cosine) > _PARALLEL:
        return torch.lerp(first, second, t)
    angle = math.acos(cosine)
    return (first * math.sin((1 - t) * angle)).add_(second, alpha=math.sin(t * angle)).div_(math.sin(angle))


def _ties(values: Iterable[Tensor], weights: Sequence[float], base: Tensor, density: float) -> Tensor:
    """Trim each difference, elect a sign for each element, and average those of that sign."""
    deltas = [(value - base).flatten() for value in values]
    floors = [_least_kept(delta, density) for delta in deltas]
    for start in range(0, base.numel(), _PIECE):
        pieces = [delta[start : start + _PIECE] for delta in deltas]
        kept = [torch.where(piece.abs() >= floor, piece, 0.0) for piece, floor in zip(pieces, floors, strict=True)]
        signs = sum(piece * weight for piece, weight in zip(kept, weights, strict=True))
        total, mass = torch.zeros_like(kept[0]), torch.zeros_like(kept[0])
        for piece, weight in zip(kept, weights, strict=True):
            agrees = (piece * weight * signs > 0).to(piece.dtype)
            total.add_(piece * agrees, alpha=weight)
            mass.add_(agrees, alpha=weight)
        pieces[0].copy_(torch.where(mass != 0, total / mass, 0.0))  # the first difference is not needed any more
    return deltas[0].view_as(base).add_(base)


def _least_kept(delta: Tensor, density: float) -> float:
    """Return the smallest magnitude among the given share of the elements that are largest in magnitude.

    The bits of floats that are not negative have the order of their values, so that each pass counts 16 of them.
    """
    count = round(density * delta.numel())
    if count == 0:
        return math.inf
    bits, width = (torch.int64, 64) if delta.dtype == torch.float64 else (torch.int32, 32)
    found = 0
    for shift in range(width - 16, -1, -16):
        histogram = torch.zeros(1 << 16, dtype=torch.int64)
        for start in range(0, delta.numel(), _PIECE):
            codes = delta[start : start + _PIECE].abs().view(bits) >> shift
            codes = codes[codes >> 16 == found]
            histogram += torch.bincount(codes & 0xFFFF, minlength=1 << 16)
        from_above = histogram.flip(0).cumsum(0)
        place = int(torch.searchsorted(from_above, count))
        count -= int(from_above[place - 1]) if place else 0
        found = (found << 16) + (1 << 16) - 1 - place
    return float(torch.tensor(found, dtype=bits).view(delta.dtype))


def _dare(values: Iterable[Tensor], weights: Sequence[float], base: Tensor, density: float, seed: str) -> Tensor:
    """Drop differences at random; what stays is divided by the share that stays."""
    total = base.clone()
    for number, (value, weight) in enumerate(zip(values, weights, strict=True)):
        digest = hashlib.sha256(f"{number} {seed}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        mask = torch.rand(base.shape, generator=generator) < density
        total.add_((value - base) * mask, alpha=weight / density)
    return total


def _present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    if dtype.is_complex:
        return torch.complex128 if dtype == torch.complex128 else torch.complex64
    return torch.float64 if dtype == torch.float64 else torch.float32


def _items(sources: Weights) -> list[tuple[object, float]]:
    pairs = list(sources.items()) if isinstance(sources, Mapping) else list(sources)
    if not pairs or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
        raise MergeError(
            'merge needs sources with their weights. Try: merge({"a.safetensors": 0.5, "b.safetensors": 0.5}, target)'
        )
    return [(source, _checked_weight(weight)) for source, weight in pairs]


def _checked_weight(weight: object) -> float:
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise MergeError(f"a weight must be a finite number, not {weight!r}")
    return float(weight)


def _checked_density(method: Method, density: float | None) -> float:
    if density is None:
        return _DENSITY.get(method, 1.0)
    if method not in _DENSITY:
        raise MergeError(f"density={density!r} is for method='ties' and method='dare', not {method!r}")
    if not isinstance(density, int | float) or not 0 < density <= 1:
        raise MergeError(f"density={density!r} must be a share: more than 0, at most 1")
    return float(density)


def _check_method(method: Method, weights: Sequence[float], base: Source | None) -> None:
    if method not in get_args(Method):
        raise MergeError(f"method={method!r} must be one of {', '.join(map(repr, get_args(Method)))}")
    if method in _NEEDS_BASE and base is None:
        raise MergeError(
            f"method={method!r} compares the sources with a base. "
            f'Try: merge(..., method="{method}", base="base.safetensors")'
        )
    if method == "slerp" and (len(weights) != 2 or not math.isclose(sum(weights), 1, abs_tol=1e-6)):
        raise MergeError(
            f"method='slerp' takes two sources whose weights sum to 1, not {len(weights)} with {sum(weights):g}"
        )
    if method == "linear" and not math.isclose(sum(weights), 1, abs_tol=1e-6):
        warn(f"the weights sum to {sum(weights):g}, so the merged tensors are that much larger or smaller")


def _open(thing: object, rename: Rename, opened: ExitStack) -> Source:
    """Open a source of any kind under its new names."""
    source: Source
    if isinstance(thing, nn.Module):
        source = MemorySource(thing.state_dict())
    elif isinstance(thing, State):
        source = DerivedSource(thing.source, names={key: key for key in thing})
    elif isinstance(thing, Mapping):
        source = MemorySource(thing)
    elif isinstance(thing, str | os.PathLike):
        source = run_part(opened.enter_context(open_source(thing)))
    else:
        raise MergeError(f"a source must be a path, a model or a state, not {type(thing).__name__}")
    if rename is None:
        return source
    new_name = _renamer(rename, source.keys_in_order)
    names: dict[str, str] = {}
    for key in source.keys_in_order:
        new = new_name(key)
        if new in names:
            raise MergeError(f"rename gives {names[new]!r} and {key!r} the same name {new!r}; nothing was written")
        if new is not None:
            names[new] = key
    return DerivedSource(source, names=names)


def _renamer(rename: Rename, keys: Sequence[str]) -> Callable[[str], str | None]:
    """A rule that matches no key of one source is for another."""
    if not isinstance(rename, Mapping):
        return renamer(rename, keys)
    matching = {}
    for old, new in rename.items():
        try:
            renamer({old: new}, keys)
        except LoadError:
            continue
        matching[old] = new
    return renamer(matching or None, keys)


def _check_same(first: Source, other: Source) -> None:
    """Check that two sources have the same keys and shapes."""
    missing = {key: first[key].shape for key in first if key not in other}
    unexpected = {key: other[key].shape for key in other if key not in first}
    both = [key for key in first if key in other and first[key].shape != other[key].shape]
    if not missing and not unexpected and not both:
        return
    lines = [f"{_label(first)} and {_label(other)} do not match; nothing was written."]
    for source, keys in ((first, missing), (other, unexpected)):
        lines += [f"  only in {_label(source)}: {listed(list(keys), 3)}"] if keys else []
    lines += [f"  {key}  {first[key].shape}, {other[key].shape}" for key in both[:5]]
    if rules := suggest_rules(unexpected, missing):
        lines.append(f"Try: merge(..., rename={rules!r})")
    elif not both and not (missing and unexpected):
        left_out = dict.fromkeys([*missing, *unexpected][:3])
        lines.append(f"Try: merge(..., rename={left_out!r}) to leave keys out")
    raise MergeError("\n".join(lines))


def _common_ties(sources: Sequence[Source]) -> dict[str, str]:
    """Return the ties that every source has."""
    firsts: dict[tuple[str, ...], str] = {}
    ties = {}
    for key in sources[0]:
        same = firsts.setdefault(tuple(source.notes.ties.get(key, key) for source in sources), key)
        if same != key:
            ties[key] = same
    return ties


def _warn_of(merged: MergedSource, count: int) -> None:
    if count > 1 and any(key.endswith("running_mean") for key in merged.combined):
        warn(
            "the running statistics of BatchNorm are averaged too and no longer describe the merged network. "
            "Try: torch.optim.swa_utils.update_bn(loader, model)"
        )
    if merged.adapter is not None and merged.adapter.changed_base:
        warn(
            f"the adapter was trained on a base changed by {merged.adapter.changed_base}: fold it into that base, "
            "not into the original one"
        )


def _label(source: Source) -> str:
    return str(source.path) if source.path is not None else "the state in memory"


def _some(source: Source) -> str:
    return ", ".join(list(source)[:3])
