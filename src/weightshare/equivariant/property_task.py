"""Learning a scalar property of molecules, as on QM9."""

from typing import Any

import torch
from torch import Tensor, nn

from weightshare.training import Losses, Task, Term


class PropertyTask(Task):
    r"""Mean absolute error of a standardised property, as published for QM9:
    :math:`\mathrm{mean}\,|f(x) - (y-\mu)/\sigma|`, f the sum of the network over the atoms.

    Args:
        network: a ``Ponita`` with one scalar in per species, one out, at level ``graph``.
        species: atomic numbers in the order of the input channels.
        mean, deviation: :math:`\mu` and :math:`\sigma` of the training set.
    """

    species: Tensor
    mean: Tensor
    deviation: Tensor

    def __init__(
        self, network: nn.Module, species: list[int], mean: float = 0.0, deviation: float = 1.0
    ) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("species", torch.tensor(species))
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float64))
        self.register_buffer("deviation", torch.tensor(deviation, dtype=torch.float64))

    def inputs(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Positions and the species of every atom as channels."""
        positions = batch["positions"]
        return positions, (batch["numbers"].unsqueeze(-1) == self.species).to(positions.dtype)

    def predict(self, batch: dict[str, Tensor]) -> Tensor:
        """The property of each molecule of a padded batch, (B,) in its unit."""
        said = self.network(*self.inputs(batch), mask=batch["mask"]).scalars.squeeze(-1)
        return said.double() * self.deviation + self.mean

    def forward(self, batch: Any) -> Losses:
        off = (self.predict(batch) - batch["value"]).abs()
        count = len(off)
        return {
            "standardised": Term((off / self.deviation).sum().float(), count),
            "mae": Term(off.detach().sum().float(), count, 0.0),
        }
