"""Test-time symmetrisation: the mean over rotated copies of the input, turned back."""

from typing import Any

import torch
from torch import Tensor, nn

from weightshare.equivariant.fields import Readout
from weightshare.equivariant.grids import spread_rotations
from weightshare.errors import UserError


class Symmetrised(nn.Module):
    r"""``network`` averaged over a fixed set of rotations: :math:`\frac1K\sum_k R_k^{-1} f(R_k x)`.

    Over rotations that permute the grid nothing changes; over others the equivariance error falls.
    The mean of energies is again an energy: put it in the place of a potential's network, and
    forces remain its exact derivative.

    Args:
        network: a ``Ponita`` or another module with its arguments and results.
        rotations: (K, d, d), or K for K well spread ones in space; the first is the identity.

    Raises:
        UserError: there is no rotation, or the input has another dimension than they.
    """

    rotations: Tensor

    def __init__(self, network: nn.Module, rotations: Tensor | int) -> None:
        super().__init__()
        self.network = network
        chosen = spread_rotations(rotations) if isinstance(rotations, int) else rotations
        if chosen.ndim != 3 or not len(chosen) or chosen.shape[1] != chosen.shape[2]:
            raise UserError(f"rotations have shape {tuple(chosen.shape)}; give (K, d, d).")
        self.register_buffer("rotations", chosen.to(next(network.parameters())))

    def forward(
        self,
        positions: Tensor,
        scalars: Tensor | None = None,
        vectors: Tensor | None = None,
        tensors: Tensor | None = None,
        *,
        offsets: Tensor | None = None,
        **options: Any,
    ) -> Readout:
        if positions.shape[-1] != self.rotations.shape[-1]:
            raise UserError(
                f"positions have shape {tuple(positions.shape)} and the rotations "
                f"{tuple(self.rotations.shape)}; give rotations of as many dimensions."
            )
        found: list[Readout] = []
        for turn in self.rotations:
            said = self.network(
                positions @ turn.T,
                scalars,
                None if vectors is None else vectors @ turn.T,
                None if tensors is None else turn @ tensors @ turn.T,
                offsets=None if offsets is None else offsets @ turn.T,
                **options,
            )
            found.append(Readout(said.scalars, said.vectors @ turn, turn.T @ said.tensors @ turn))
        return Readout(*(torch.stack(kind).mean(0) for kind in zip(*found, strict=True)))


def symmetrise(network: nn.Module, rotations: Tensor | int = 5) -> Symmetrised:
    """The network averaged over ``rotations``, see ``Symmetrised``."""
    return Symmetrised(network, rotations)
