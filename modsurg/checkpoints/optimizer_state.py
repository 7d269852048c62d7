"""An optimizer's state with its parameters called by name: `state_dict` numbers them, which any edit upsets."""

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from modsurg.errors import counted


def parameter_names(stateful: Mapping[str, object]) -> dict[int, str]:
    """Give id(parameter) -> `<stateful name>.<parameter name>` for all modules among `stateful`."""
    names: dict[int, str] = {}
    for prefix, module in stateful.items():
        if isinstance(module, nn.Module):
            for name, parameter in module.named_parameters():
                names.setdefault(id(parameter), f"{prefix}.{name}")
    return names


def named(optimizer: Optimizer, names: Mapping[int, str]) -> dict[str, Any]:
    """Give the optimizer's state with names where `state_dict` has numbers.

    Returns:
        `{"groups": [{..., "params": [name, ...]}], "state": {name: {...}}}`. A parameter that no module has is called
        `#<group>.<position>`.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> named(optimizer, parameter_names({"model": layer}))["groups"][0]["params"]
        ['model.weight', 'model.bias']
    """
    state = optimizer.state_dict()
    called = _called(optimizer, names)
    by_number = {
        number: name
        for numbered_group, group in zip(state["param_groups"], called, strict=True)
        for number, name in zip(numbered_group["params"], group, strict=True)
    }
    groups = zip(state["param_groups"], called, strict=True)
    return {
        "groups": [{**group, "params": group_names} for group, group_names in groups],
        "state": {by_number.get(number, number): value for number, value in state["state"].items()},
    }


def problems(name: str, saved: Mapping[str, Any], optimizer: Optimizer, names: Mapping[int, str]) -> list[str]:
    """Say in lines why `saved` does not fit this optimizer; none if it fits."""
    called = _called(optimizer, names)
    groups = saved["groups"]
    if len(groups) != len(called):
        return [
            f"{name}  file {counted(len(groups), 'parameter group', 'parameter groups')}, here {len(called)}: "
            "make the groups that it was saved with"
        ]
    theirs = [key for group in groups for key in group["params"]]
    if all(key.startswith("#") for key in chain(*called)) and not all(key.startswith("#") for key in theirs):
        return [f"{name}  file has its parameters by the names of their model: pass that model too"]
    lines = []
    for i, (group, mine) in enumerate(zip(groups, called, strict=True)):
        theirs = group["params"]
        lines += [f"{name}  group {i} of the file has {key}, here it has not" for key in theirs if key not in set(mine)]
        lines += [f"{name}  group {i} has {key}, in the file it has not" for key in mine if key not in set(theirs)]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    shapes = {key: p.shape for key, p in zip(chain(*called), parameters, strict=True)}
    for key, state in saved["state"].items():
        moment = state.get("exp_avg", state.get("momentum_buffer")) if isinstance(state, dict) else None
        if key in shapes and isinstance(moment, torch.Tensor) and moment.shape != shapes[key]:
            lines.append(f"{name}.state.{key}  file {tuple(moment.shape)}, here {tuple(shapes[key])}")
    return lines


def numbered(saved: Mapping[str, Any], optimizer: Optimizer, names: Mapping[int, str]) -> dict[str, Any]:
    """Turn what `named` gave into a `state_dict` in this optimizer's order, with its parameters' memory layout."""
    state: dict[Any, Any] = {key: value for key, value in saved["state"].items() if not isinstance(key, str)}
    groups, number = [], 0
    for group, mine, kept in zip(optimizer.param_groups, _called(optimizer, names), saved["groups"], strict=True):
        groups.append({**kept, "params": list(range(number, number + len(mine)))})
        for name, parameter in zip(mine, group["params"], strict=True):
            if name in saved["state"]:
                state[number] = {key: _laid_out(value, parameter) for key, value in saved["state"][name].items()}
            number += 1
    return {"state": state, "param_groups": groups}


def set_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Give an optimizer a `state_dict`, each tensor in the dtype that it has there: torch casts it to its parameter's.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
        >>> optimizer = torch.optim.SGD(layer.parameters(), momentum=0.9)
        >>> set_state(optimizer, {**optimizer.state_dict(), "state": {0: {"momentum_buffer": torch.ones(1, 1)}}})
        >>> optimizer.state[layer.weight]["momentum_buffer"].dtype
        torch.float32
    """
    optimizer.load_state_dict(state)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in enumerate(parameters):
        mine = optimizer.state.get(parameter, {})
        for key, value in state["state"].get(number, {}).items():
            cast = mine.get(key)
            if isinstance(value, torch.Tensor) and isinstance(cast, torch.Tensor) and cast.dtype is not value.dtype:
                mine[key] = value.to(cast.device, copy=True)


def carried(
    saved: Mapping[str, Any], optimizer: Optimizer, names: Mapping[int, str], old: Mapping[str, str]
) -> dict[str, Any]:
    """Bring what `named` gave of an optimizer before an edit under the names after it.

    Args:
        saved: From before the edit.
        optimizer: As it is after the edit.
        names: Of `parameter_names`, after the edit.
        old: New name -> old name of what the edit kept. The rest begins without a state.
    """
    groups = [
        {**group, "params": mine} for group, mine in zip(saved["groups"], _called(optimizer, names), strict=False)
    ]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {}
    for name, parameter in zip(chain(*_called(optimizer, names)), parameters, strict=True):
        before = saved["state"].get(old.get(name, ""), {})
        sizes = {value.shape for value in before.values() if isinstance(value, torch.Tensor) and value.ndim}
        if before and sizes <= {parameter.shape}:
            state[name] = before
    return {"groups": groups, "state": state}


def _called(optimizer: Optimizer, names: Mapping[int, str]) -> list[list[str]]:
    return [
        [names.get(id(parameter), f"#{i}.{j}") for j, parameter in enumerate(group["params"])]
        for i, group in enumerate(optimizer.param_groups)
    ]


def _laid_out(value: Any, parameter: torch.Tensor) -> Any:
    """The same values with the parameter's strides, so that the next step computes in the same order as the last."""
    if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
        return torch.empty_like(parameter, dtype=value.dtype, device="cpu", requires_grad=False).copy_(value)
    return value
