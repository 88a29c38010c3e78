"""The N-body task: where will the particles be?"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from weightshare.equivariant.nbody import NBody
from weightshare.training import Losses, Task, Term

VECTORS = ("start", "velocity", "target")
"""What turns when a trajectory is rotated."""


class DynamicsTask(Task):
    """Mean squared error of ``start + vectors(network)`` over all coordinates, as published.

    The network takes the charge as scalar and the velocity as vector of every particle; all
    particles of a trajectory are connected.

    Args:
        network: a ``Ponita`` or another module with its arguments and results.
        horizon: time to the target. Where it is given, momentum is conserved exactly: the network
            sees velocities about their mean and moves particles about their common centre, which
            drifts with that mean (equal masses). As published without.
    """

    def __init__(self, network: nn.Module, horizon: float | None = None) -> None:
        super().__init__()
        self.network, self.horizon = network, horizon

    def predict(self, batch: dict[str, Tensor]) -> Tensor:
        """Final positions, (B, n, 3)."""
        start, charges, velocity = batch["start"], batch["charges"], batch["velocity"]
        drift = velocity.mean(-2, keepdim=True)
        if self.horizon is not None:
            velocity = velocity - drift
        said = self.network(start, charges.unsqueeze(-1), velocity.unsqueeze(-2))
        move: Tensor = said.vectors.squeeze(-2)
        if self.horizon is not None:
            move = move - move.mean(-2, keepdim=True) + self.horizon * drift
        return start + move

    def forward(self, batch: Any) -> Losses:
        error = (self.predict(batch) - batch["target"]).square()
        return {"mse": Term(error.sum(), error.numel())}


def columns(data: NBody) -> dict[str, Tensor]:
    """The trajectories as float32 tensors by name."""
    names = ("charges", *VECTORS)
    return {name: torch.from_numpy(np.asarray(getattr(data, name), np.float32)) for name in names}


@torch.no_grad()
def sample_errors(task: DynamicsTask, data: NBody, size: int = 500) -> np.ndarray:
    """Mean squared error of every trajectory, (M,): compare methods by paired differences, since
    one percent of the trajectories carry a quarter of the error."""
    device = next(task.parameters()).device
    found = []
    for low in range(0, len(data), size):
        batch = {k: v.to(device) for k, v in columns(data.take(slice(low, low + size))).items()}
        found.append((task.predict(batch) - batch["target"]).square().mean((-1, -2)).cpu())
    return torch.cat(found).double().numpy()
