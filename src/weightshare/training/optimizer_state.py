"""The state of a torch optimizer as named tensors and plain values, without pickle."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from weightshare.training.state import State

HOW = {"foreach", "fused", "capturable", "params"}
"""Entries that say how a step is computed, not what: they stay as the program has set them."""


def pack(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> State:
    """``tensors["layer.weight/exp_avg"]``; numbers and group entries in ``values``."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for parameter, entries in optimizer.state.items():
        name = names[parameter]
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{name}/{key}"] = value
            else:
                numbers.setdefault(name, {})[key] = value
    groups = [
        {key: _plain(value) for key, value in group.items() if key not in HOW}
        for group in optimizer.param_groups
    ]
    return State(tensors, {"numbers": numbers, "groups": groups})


def unpack(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], state: State) -> None:
    """Load what ``pack`` has made, through the optimizer's own ``load_state_dict``."""
    entries: dict[str, dict[str, Any]] = {
        name: dict(numbers) for name, numbers in state.values["numbers"].items()
    }
    for path, tensor in state.tensors.items():
        name, key = path.rsplit("/", 1)
        entries.setdefault(name, {})[key] = tensor
    packed = optimizer.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    places = [place for group in packed["param_groups"] for place in group["params"]]
    packed["state"] = {
        place: entries[names[parameter]]
        for place, parameter in zip(places, parameters, strict=True)
        if names[parameter] in entries
    }
    for group, saved in zip(packed["param_groups"], state.values["groups"], strict=True):
        for key, value in saved.items():
            group[key] = _like(group.get(key), value)
    optimizer.load_state_dict(packed)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


def _like(current: Any, value: Any) -> Any:
    if isinstance(current, Tensor):
        return torch.full_like(current, value)
    return tuple(value) if isinstance(current, tuple) else value
