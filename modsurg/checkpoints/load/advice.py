"""What would mend a load: `rename=`, `rules=` or another argument, each tried against the whole plan."""

import re
from dataclasses import replace
from typing import Any

from modsurg.checkpoints.formats.safetensors.sharded import index_of
from modsurg.checkpoints.formats.source import Source
from modsurg.checkpoints.load.key_mapping import pair
from modsurg.checkpoints.load.model_tensors import ModelTensors
from modsurg.checkpoints.load.plan import Options, Plan, make_plan, rename_keys
from modsurg.checkpoints.load.report import SHOWN, Problems, as_code
from modsurg.checkpoints.load.suggestions import nearest_key, suggest_rules, suggest_tensor_rules
from modsurg.checkpoints.rules import Concat, Split, Transpose, apply_rules, rule_as_code
from modsurg.errors import LoadError, counted


def check_missing_and_unexpected(
    source: Source, targets: ModelTensors, plan: Plan, problems: Problems, options: Options
) -> None:
    """Add what is missing and what is unexpected to the problems, with the argument that would mend it."""
    attempt = _Attempt(source, targets, plan, options)
    rules, served = attempt.find_renames()
    for place, name in enumerate(plan.missing):
        near = nearest_key(name, list(attempt.unexpected)) if place < SHOWN and not rules else None
        problems.missing[name] = f'; nearest: "{near}"' if near else ""
    for name, key in plan.leftover.items():
        problems.unexpected[key] = f', as "{name}"' if name != key else ""
    problems.part = _whole_children(plan)
    whole = index_of(source.path) if source.path and plan.missing else None
    if whole is not None:
        problems.advice = f"{source.path} is one of several files: load_state(model, {as_code(str(whole))})"
    elif rules and attempt.matches_all(rename=rules):
        problems.mended = not any(map(_renumbers, rules.items()))
        problems.advice = f"They match with load_state(..., rename={as_code(rules)})"
    elif advice := attempt.advise_tensor_rules(served):
        problems.advice, problems.mended = advice, advice.startswith("They")
    elif rules:
        share = counted(served, "of them matches", "of them match")
        problems.advice = f"{share} with load_state(..., rename={as_code(rules)}{attempt.leave_rest(rename=rules)})"
    elif problems.misfits and attempt.matches_all(on_mismatch="interpolate"):
        problems.advice = 'They match with load_state(..., on_mismatch="interpolate")'


class _Attempt:
    """A load that did not match, and what other arguments would make of it.

    Attributes:
        unexpected: Keys that only the file has, and their shapes.
        missing: Names that only the model has, and their shapes.
    """

    def __init__(self, source: Source, targets: ModelTensors, plan: Plan, options: Options) -> None:
        self._source, self._targets, self._plan, self._options = source, targets, plan, options
        self.unexpected = {key: source[key].shape if key in source else None for key in plan.leftover.values()}
        self.missing = {name: targets.shape(name) for name in (*plan.missing, *plan.dispensable)}

    def matches_all(self, **changes: Any) -> bool:
        """Whether these options give a plan without a problem: every key has a name, and every name a key."""
        plan, problems = make_plan(self._source, self._targets, replace(self._options, **changes))
        return not (problems or plan.missing or plan.leftover)

    def leave_rest(self, **changes: Any) -> str:
        """The arguments that leave alone what does not match under these options; empty where none would."""
        plan, problems = make_plan(self._source, self._targets, replace(self._options, **changes))
        if not problems.skippable >= problems.misfits.keys():
            return ""
        strict = ", strict=False" if plan.missing or plan.leftover else ""
        return strict + (', on_mismatch="skip"' if problems.misfits else "")

    def find_renames(self) -> tuple[dict[str, str | None], int]:
        """A `rename=` that was tried, and how many keys it brings to a name; none if it takes others from theirs."""
        rename, fills = self._options.rename, self._plan.fills
        if callable(rename) or not self.unexpected or not self.missing:
            return {}, 0
        rules = {**(rename or {}), **suggest_rules(self.unexpected, self.missing, [fill.key for fill in fills])}
        try:
            renamed = rename_keys(self._source, replace(self._options, rename=rules))
            names = pair(renamed, [*self._targets.tensors, *self._targets.extra])
        except LoadError:
            return {}, 0
        homes = {renamed[new]: name for new, name in names.items()}
        served = sum(
            homes[key] in self.missing and self.missing[homes[key]] == shape
            for key, shape in self.unexpected.items()
            if key in homes
        )
        spoilt = any(homes.get(fill.key) != fill.target.name for fill in fills)
        return ({}, 0) if spoilt or not served else (rules, served)

    def advise_tensor_rules(self, served: int) -> str:
        """The `rules=`, and the `rename=` after them, under which more keys match; empty if none are found.

        Args:
            served: How many match with a `rename=` alone.
        """
        misfits = {
            key: (self._source[key].shape, self._targets.shape(name)) for name, key in self._plan.reshaped.items()
        }
        rules = suggest_tensor_rules(self.unexpected, self.missing, misfits)
        if not rules or self._options.rename is not None:
            return ""
        try:
            ruled = apply_rules(self._source, rules)
            plan, _ = make_plan(ruled, self._targets, self._options)
            attempt = _Attempt(ruled, self._targets, plan, self._options)
            renames, _ = attempt.find_renames()
            matched, _ = make_plan(ruled, self._targets, replace(self._options, rename=renames or None))
            if len(matched.fills) <= len(self._plan.fills) + served:
                return ""
            whole = attempt.matches_all(rename=renames or None)
            rest = "" if whole else attempt.leave_rest(rename=renames or None)
        except LoadError:
            return ""
        share = "They match" if whole else counted(len(matched.fills), "key matches", "keys match")
        arguments = f"rules=[{', '.join(map(rule_as_code, rules))}]"
        arguments += (f", rename={as_code(renames)}" if renames else "") + rest
        advice = f"{share} with load_state(..., {arguments}) (from modsurg.rules)"
        if any(isinstance(rule, Transpose) for rule in rules) and self._fills_square():
            advice += ". A square matrix does not show whether it is transposed: add those that are"
        if renames:
            advice += ". Shapes do not tell layers or parts of one shape apart: check them"
        elif any(isinstance(rule, Concat | Split) for rule in rules):
            advice += ". Shapes do not show the order of the parts: check it"
        return advice

    def _fills_square(self) -> bool:
        shapes = [tuple(fill.target.tensor.shape) for fill in self._plan.fills]
        return any(len(shape) == 2 and shape[0] == shape[1] for shape in shapes)


def _whole_children(plan: Plan) -> list[str]:
    """What `only=` would have to be, if the source has some children of the model whole, and nothing of the others."""
    whole = dict.fromkeys(fill.target.name.split(".")[0] for fill in plan.fills)
    return [] if plan.leftover or any(name.split(".")[0] in whole for name in plan.missing) else list(whole)


def _renumbers(rule: tuple[str, str | None]) -> bool:
    """Whether a layer gets another number, as after an edit, where more of them may have moved than keys tell."""
    old, new = (re.findall(r"(?<![^.])\d+(?![^.])", name or "") for name in rule)
    return bool(old and new and old != new)
