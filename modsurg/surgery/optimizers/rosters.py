"""The lists of an optimizer's groups, rewritten in place: schedulers and LBFGS hold on to the same lists."""

from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from operator import itemgetter
from typing import Any

from torch import nn

from modsurg.surgery.journal import Journal

Entry = tuple[int, str, nn.Parameter]
"""Position in the model, first name, parameter."""


def rewrite(
    group: dict[str, Any],
    entering: Sequence[Entry],
    gone: Collection[int],
    names: tuple[Mapping[int, Entry], Mapping[int, Entry]],
    journal: Journal,
) -> None:
    """Let parameters leave and enter one group, and rename those that stay, where the group has names.

    Args:
        group: One of `optimizer.param_groups`.
        entering: What enters.
        gone: `id` of what leaves.
        names: The model's parameters by `id`, before and after.
        journal: Takes note of the lists before they change.
    """
    before, after = names
    params: list[nn.Parameter] = group["params"]
    merged = _merged(params, entering, gone, after)
    if "param_names" in group:
        known: list[str] = group["param_names"]
        table = dict(zip(map(id, params), known, strict=True))
        owned = ((name, before[key][1]) for key, name in table.items() if key in before)
        prefix = next((name.removesuffix(own) for name, own in owned if name.endswith(own)), "")
        journal.keep_list(known)
        known[:] = [prefix + after[id(p)][1] if id(p) in after else table[id(p)] for p in merged]
    if entering or len(merged) != len(params):
        journal.keep_list(params)
        params[:] = merged


def _merged(
    params: list[nn.Parameter], entering: Sequence[Entry], gone: Collection[int], after: Mapping[int, Entry]
) -> list[nn.Parameter]:
    """In the model's order, if the group was in it; parameters of other models stay behind what they stood behind."""
    staying = [parameter for parameter in params if id(parameter) not in gone]
    last = next((after[id(parameter)][0] for parameter in staying if id(parameter) in after), -1)
    placed: list[tuple[int, nn.Parameter]] = []
    for parameter in staying:
        last = after[id(parameter)][0] if id(parameter) in after else last
        placed.append((last, parameter))
    new = [(position, parameter) for position, _, parameter in entering]
    if all(one[0] <= two[0] for one, two in pairwise(placed)):
        placed = sorted(placed + new, key=itemgetter(0))
    else:
        placed += new
    return [parameter for _, parameter in placed]
