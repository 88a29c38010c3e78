"""How far a network is from commuting with rotations, before and after symmetrisation."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from weightshare.equivariant.augment import turned
from weightshare.equivariant.dynamics import VECTORS, DynamicsTask
from weightshare.equivariant.grids import fibonacci, random_rotations
from weightshare.equivariant.ponita import Ponita
from weightshare.equivariant.potential_task import PotentialTask
from weightshare.equivariant.property_task import PropertyTask

ROTATIONS = 8
"""Random rotations an error is measured over."""


def _turns(seed: int, like: Tensor) -> Tensor:
    return random_rotations(ROTATIONS, 3, torch.Generator().manual_seed(seed)).to(like)


@torch.no_grad()
def dynamics_equivariance(task: DynamicsTask, batch: dict[str, Tensor], seed: int = 0) -> float:
    r"""Relative change of the predicted displacements, :math:`\lVert R^{-1}f(Rx)-f(x)\rVert /
    \lVert f(x)\rVert`, root mean square over random rotations and the batch."""
    plain = task.predict(batch) - batch["start"]
    changes = []
    for turn in _turns(seed, plain):
        moved = turned(batch, turn.expand(len(plain), 3, 3), VECTORS)
        back = (task.predict(moved) - moved["start"]) @ turn
        changes.append((back - plain).square().mean())
    return float((torch.stack(changes).mean() / plain.square().mean()).sqrt())


def potential_spread(
    task: PotentialTask, batch: dict[str, Tensor], seed: int = 0
) -> dict[str, float]:
    """Spread of energies and forces of one structure over random rotations: standard deviations,
    root mean square over the batch, in meV and meV/Å."""
    energies, pulls = [], []
    names, tensors = ("positions", "forces", "cell"), ("stress",)
    for turn in _turns(seed, batch["positions"]):
        rotations = turn.expand(len(batch["energy"]), 3, 3)
        moved = turned(batch, rotations, [n for n in names if n != "cell"], tensors)
        if "cell" in batch:
            moved["cell"] = batch["cell"] @ turn.T
        said = task.predict(moved)
        assert said.forces is not None
        energies.append(said.energy)
        pulls.append(said.forces @ turn)
    energy = torch.stack(energies).var(0).mean().sqrt()
    force = torch.stack(pulls).var(0).mean().sqrt()
    return {"energy_mev": 1000 * float(energy), "force_mev_a": 1000 * float(force)}


def error_by_orientations(
    task: DynamicsTask, batch: dict[str, Tensor], counts: Sequence[int] = (6, 8, 12, 20, 32, 64)
) -> dict[int, float]:
    """The equivariance error of the trained weights on grids of more or fewer orientations."""
    network: Any = task.network
    assert isinstance(network, Ponita)
    return {
        n: dynamics_equivariance(DynamicsTask(network.regridded(fibonacci(n)), task.horizon), batch)
        for n in counts
    }


@torch.no_grad()
def property_spread(task: PropertyTask, batch: dict[str, Tensor], seed: int = 0) -> float:
    """Standard deviation of a predicted property over random rotations, root mean square over the
    batch, in the property's unit."""
    said = [
        task.predict(turned(batch, turn.expand(len(batch["value"]), 3, 3), ["positions"]))
        for turn in _turns(seed, batch["positions"])
    ]
    return float(torch.stack(said).var(0).mean().sqrt())
