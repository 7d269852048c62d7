"""Optimizer groups by path: `param_groups`."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from modsurg.errors import EditError, OptimizerError
from modsurg.tree.selection import Where, select_parameters
from modsurg.tree.walk import named_parameters, walk
from modsurg.tree.wrappers import unwrap

_NUMBER = re.compile(r"(?:^|\.)[A-Za-z_]*(\d+)\.")


def param_groups(
    model: nn.Module,
    where: "Mapping[Any, Mapping[str, Any]] | None" = None,
    *,
    layer_decay: float | None = None,
    **rest: Any,
) -> list[dict[str, Any]]:
    """Divide the trainable parameters into groups for an optimizer.

    Each trainable parameter is in one group: that of the first entry of `where` that matches it, otherwise the rest.
    Groups without a parameter are left out.

    Args:
        model: Only read. A frozen parameter is in no group.
        where: What `select_parameters` takes -> the options of the group: `{"**.bias": {"weight_decay": 0.0}}`. A list
            of patterns, which can't be a key, is written as a tuple.
        layer_decay: Multiplies the learning rate once more for each block further from the output, as in BEiT (Bao et
            al., 2021). Of n numbered blocks (`blocks.0`, `layer1`), block i (from 0) has lr * layer_decay ** (n - i),
            what comes before the blocks lr * layer_decay ** (n + 1), what comes after them lr. Needs `lr`.
        **rest: Options of the parameters that no entry matches; an entry has them too, where it says nothing else.

    Returns:
        Groups in the order of `where`, the rest last: `torch.optim.AdamW(param_groups(...))`.

    Raises:
        NoMatchError: An entry that matches no parameter.
        OptimizerError: `layer_decay` without `lr`, or a model without numbered blocks.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
        >>> where = {"**.bias": {"weight_decay": 0.0}, "2": {"lr": 1e-2}}
        >>> groups = param_groups(model, where, lr=1e-3, weight_decay=0.1)
        >>> [(len(group["params"]), group["lr"], group["weight_decay"]) for group in groups]
        [(3, 0.001, 0.0), (1, 0.01, 0.1), (2, 0.001, 0.1)]
    """
    root = unwrap(model)
    names = {id(parameter): name for name, parameter in reversed(list(named_parameters(walk(root))))}
    trainable = {names[id(parameter)]: parameter for parameter in root.parameters() if parameter.requires_grad}
    if not trainable:
        raise OptimizerError("no parameter of the model requires a gradient. Try: unfreeze(model, ...)")
    options = [({**rest, **own}, _matched(root, form)) for form, own in (where or {}).items()]
    for own, _ in options:
        if "params" in own:
            raise EditError('the options of a group can\'t have "params": the pattern says which they are.')
    scales = {} if layer_decay is None else _scales([names[id(each)] for each in root.parameters()], layer_decay)
    groups: dict[tuple[int, float], dict[str, Any]] = {}
    for name, parameter in trainable.items():
        at = next((at for at, (_, inside) in enumerate(options) if id(parameter) in inside), len(options))
        own = options[at][0] if at < len(options) else dict(rest)
        scale = scales.get(name, 1.0)
        if scales and "lr" not in own:
            raise OptimizerError(
                "layer_decay needs a learning rate. Try: param_groups(model, ..., lr=1e-3, layer_decay=0.75)"
            )
        scaled = {**own, "lr": own["lr"] * scale} if scales else own
        groups.setdefault((at, scale), {"params": [], **scaled})["params"].append(parameter)
    return [groups[key] for key in sorted(groups, key=lambda key: (key[0], -key[1]))]


def _matched(root: nn.Module, form: Any) -> set[int]:
    where: Where = list(form) if isinstance(form, tuple) and not all(isinstance(each, type) for each in form) else form
    return {id(parameter) for parameter in select_parameters(root, where).values()}


def _scales(names: Sequence[str], decay: float) -> dict[str, float]:
    """By how much the rate of each parameter is multiplied.

    The blocks are the numbered modules, alike but for the number, in which most parameters are. What is named before
    the first of them comes before the blocks.
    """
    if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 < decay <= 1:
        raise OptimizerError(f"layer_decay={decay!r} must be a number above 0, and 1 at most.")
    containers: dict[str, dict[int, int]] = {}
    for name in names:
        for match in _NUMBER.finditer(name):
            blocks = containers.setdefault(name[: match.start(1)], {})
            blocks[int(match[1])] = blocks.get(int(match[1]), 0) + 1
    several = {prefix: blocks for prefix, blocks in containers.items() if len(blocks) > 1}
    if not several:
        raise OptimizerError("layer_decay needs numbered blocks, in a Sequential or ModuleList; the model has none.")
    prefix = max(several, key=lambda prefix: (sum(several[prefix].values()), -len(prefix)))
    numbers = sorted(several[prefix])
    scales: dict[str, float] = {}
    before = True
    for name in names:
        if name.startswith(prefix):
            before = False
            number = int(name[len(prefix) :].partition(".")[0])
            scales[name] = decay ** (len(numbers) - numbers.index(number))
        else:
            scales[name] = decay ** (len(numbers) + 1) if before else 1.0
    return scales
