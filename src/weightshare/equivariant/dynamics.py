"""The N-body task: where will the particles be?"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from weightshare.equivariant.fields import Readout
from weightshare.equivariant.nbody import NBody
from weightshare.training import EpochBatches, Losses, Task, Term, streams

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


class Even(nn.Module):
    """The mean of a network over both signs of its scalars: of charges only products act, so that
    flipping all of them must change nothing. For testing, like ``symmetrise`` and together with it:
    ``symmetrise(Even(network))``."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(
        self,
        positions: Tensor,
        scalars: Tensor,
        vectors: Tensor,
        tensors: None = None,
        **options: Any,
    ) -> Readout:
        ahead, behind = (
            self.network(positions, sign * scalars, vectors, tensors, **options) for sign in (1, -1)
        )
        return Readout(*((a + b) / 2 for a, b in zip(ahead, behind, strict=True)))


class Rescaled:
    r"""Batches of trajectories, each example in another unit of length.

    With :math:`x \to \lambda x` in the same time, :math:`q \to \lambda^{3/2} q` obeys the same law
    of motion: accelerations grow by :math:`\lambda`, forces by :math:`q^2 / x^2`. What a large
    network would learn by heart of 3,000 trajectories it then has to see in all of these.

    Args:
        batches: of ``columns``.
        spread: standard deviation of :math:`\ln\lambda`.
    """

    def __init__(self, batches: EpochBatches, spread: float = 0.15) -> None:
        self.batches, self.spread = batches, spread
        self.size, self.batch_size = batches.size, batches.batch_size

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        batch: dict[str, Tensor] = self.batches[step]
        draw = streams(self.batches.seed, step).local
        unit = (self.spread * torch.randn(len(batch["charges"]), 1, 1, generator=draw)).exp()
        moved = {name: batch[name] * unit for name in VECTORS}
        return {**batch, **moved, "charges": batch["charges"] * unit[..., 0] ** 1.5}


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
