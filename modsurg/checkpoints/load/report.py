"""What a load did, or why it did nothing."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from modsurg.errors import LoadError, counted, listed, visible

SHOWN = 10


@dataclass(frozen=True)
class LoadReport:
    """What `load_state` did. Prints as a short list; true when file and model match key by key.

    Attributes:
        loaded: Names of the model that were filled.
        missing: Names of the model that the file does not have; they keep their values.
        unexpected: Keys of the file that the model does not have.
        skipped: Names left alone because they did not match, and why.
        sliced: Names filled where file and model overlap, and both shapes.
        resampled: Names of position embeddings that were interpolated, and both shapes.
        taken: Where in a larger checkpoint the state was, as in `"model.state_dict"`; `""` for the top.
        left: What else in that checkpoint holds tensors, which were not loaded.
        advice: The argument with which more keys would match; empty if none is known.
    """

    loaded: Sequence[str] = ()
    missing: Sequence[str] = ()
    unexpected: Sequence[str] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    sliced: Mapping[str, str] = field(default_factory=dict)
    resampled: Mapping[str, str] = field(default_factory=dict)
    taken: str = ""
    left: Sequence[str] = ()
    advice: str = ""

    def __bool__(self) -> bool:
        return not (self.missing or self.unexpected or self.skipped or self.sliced or self.resampled)

    def __str__(self) -> str:
        count = len(self.loaded) + len(self.missing) + len(self.skipped)
        taken = f" from its {self.taken!r}" if self.taken else ""
        left = f"; left out: {visible(listed(self.left, 5))}" if self.left else ""
        lines = [f"loaded {len(self.loaded)} of {counted(count, 'key', 'keys')}{taken}{left}"]
        lines += table({**self.skipped}, "skipped  ")
        lines += table({**self.sliced}, "sliced  ")
        lines += table({**self.resampled}, "resampled  ")
        lines += table(dict.fromkeys(self.missing, "not in the file; the model's value is kept"), "missing  ")
        lines += table(dict.fromkeys(self.unexpected, "not in the model"), "unexpected  ")
        return "\n".join([*lines, self.advice] if self.advice else lines)


@dataclass
class Problems:
    """What keeps a state from being loaded.

    Attributes:
        total: How many keys of the model were looked at.
        misfits: Name -> what is wrong with it: a shape, a dtype, a tie.
        missing: Name -> a hint.
        unexpected: Key -> a hint.
        advice: The argument that mends it, if one is known.
        mended: Whether it finds a place for every key of the file, and layers keep their numbers.
        part: The children of the model that are whole in the file, if nothing of the others is there.
        skippable: The misfits that `on_mismatch="skip"` would leave alone.
        held_back: Misfits that count only if loading code of the model's own can't mend them.
    """

    total: int = 0
    misfits: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    unexpected: dict[str, str] = field(default_factory=dict)
    advice: str = ""
    mended: bool = False
    part: Sequence[str] = ()
    held_back: dict[str, str] = field(default_factory=dict)
    skippable: set[str] = field(default_factory=set)

    def __bool__(self) -> bool:
        return bool(self.misfits or self.missing or self.unexpected)

    def hold_back(self, names: Iterable[str]) -> None:
        """Set the misfits of these names aside."""
        self.held_back = {name: self.misfits.pop(name) for name in names if name in self.misfits}

    def error(self) -> LoadError:
        """The error that lists them."""
        self.misfits |= self.held_back
        lines = [f"{self._counts()}; nothing was loaded."]
        lines += table(self.misfits, "")
        lines += table({name: f"not in the file{hint}" for name, hint in self.missing.items()}, "")
        lines += table({key: f"not in the model{hint}" for key, hint in self.unexpected.items()}, "")
        return LoadError("\n".join([*lines, *self._remedies()]))

    def _counts(self) -> str:
        count, more = len(self.misfits) + len(self.missing), len(self.unexpected)
        of = f"{count} of {counted(self.total, 'key', 'keys')} {'does' if count == 1 else 'do'} not match"
        if not more:
            return of
        over = f"{counted(more, 'key', 'keys')} of the file {'is' if more == 1 else 'are'} not in the model"
        return f"{of}, and {over}" if count else over

    def _remedies(self) -> Iterator[str]:
        incomplete = bool(self.missing or self.unexpected)
        if self.advice:
            yield self.advice
        elif incomplete and (not self.misfits or self.skippable >= self.misfits.keys()):
            part = as_code(self.part[0] if len(self.part) == 1 else self.part)
            only = f", or load_state(..., only={part})" if self.part and not self.misfits else ""
            skip = ', on_mismatch="skip"' if self.misfits else ""
            yield f"Try: load_state(..., strict=False{skip}) to load what matches and report the rest{only}"
        elif self.misfits and self.skippable >= self.misfits.keys():
            yield 'Try: load_state(..., on_mismatch="skip") to keep the model\'s own values for these keys'
        if self.missing and self.unexpected and not self.mended:
            yield "Made before an edit? load_state(model, report.remap(state)), with the report of the edit"


def table(rows: Mapping[str, str], start: str) -> list[str]:
    """Names and texts under each other, the first few of them."""
    shown = [(visible(name), visible(text)) for name, text in list(rows.items())[:SHOWN]]
    width = max((len(name) for name, _ in shown), default=0)
    lines = [f"  {start}{name:{width}}  {text}" for name, text in shown]
    if len(rows) > SHOWN:
        lines.append(f"  {start}... and {len(rows) - SHOWN} more")
    return lines


def as_code(value: str | Sequence[str] | Mapping[str, str | None]) -> str:
    """Strings or rename rules as Python would read them, in double quotes."""
    if isinstance(value, Mapping):
        rules = (f"{as_code(old)}: {None if new is None else as_code(new)}" for old, new in value.items())
        return f"{{{', '.join(rules)}}}"
    return visible(json.dumps(value, ensure_ascii=False))
