"""What survives a killed run: named tensors and a JSON-able dictionary, nested by prefixes."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from weightshare.errors import UserError


class State(NamedTuple):
    """Tensors by name, and plain values that JSON holds exactly."""

    tensors: dict[str, Tensor]
    values: dict[str, Any] = {}


def join(states: Mapping[str, State]) -> State:
    """One state of several: tensor names get the prefix ``name/``, values one level."""
    tensors = {
        f"{name}/{key}": tensor
        for name, state in states.items()
        for key, tensor in state.tensors.items()
    }
    return State(tensors, {name: state.values for name, state in states.items()})


def part(state: State, name: str) -> State:
    """The inverse of ``join`` for one name; empty where the name is not in it."""
    prefix = f"{name}/"
    tensors = {k.removeprefix(prefix): t for k, t in state.tensors.items() if k.startswith(prefix)}
    return State(tensors, state.values.get(name, {}))


@torch.no_grad()
def copy_into(live: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Overwrite ``live`` tensors by the saved ones of the same name."""
    for name, tensor in live.items():
        if name not in saved or saved[name].shape != tensor.shape:
            found = f"has shape {tuple(saved[name].shape)}" if name in saved else "is missing"
            raise UserError(
                f"The checkpoint is not of this model: {name!r} of shape {tuple(tensor.shape)} "
                f"{found} there; resume with the options the run was started with."
            )
        tensor.copy_(saved[name])
