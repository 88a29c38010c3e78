"""Learning a potential: energies, forces and stress of structures."""

from typing import Any

import torch
from torch import Tensor

from weightshare.equivariant.potential import PonitaPotential, Prediction
from weightshare.errors import UserError
from weightshare.training import Losses, Task, Term

VECTORS = ("positions", "forces")
"""What turns when a molecule is rotated."""


class PotentialTask(Task):
    r"""The published loss in units of the potential's ``scale`` s (the RMS force):

    .. math::
        w_E\,\mathrm{mean}\Big(\frac{E-E^*}{s}\Big)^2
        + w_F\,\mathrm{mean}\Big(\frac{F-F^*}{s}\Big)^2
        + w_\sigma\,\mathrm{mean}\Big(\frac{V(\sigma-\sigma^*)}{s\,n}\Big)^2

    means over structures, force components and stress components. Labels that are NaN are left out.

    Args:
        energy_weight: :math:`w_E`; 1/500 is published for rMD17.
        force_weight, stress_weight: the others.
        per_atom: divide energies by the number of atoms, for sets of mixed sizes.
    """

    def __init__(
        self,
        potential: PonitaPotential,
        energy_weight: float = 1 / 500,
        force_weight: float = 1.0,
        stress_weight: float = 0.0,
        per_atom: bool = False,
    ) -> None:
        super().__init__()
        self.potential = potential
        self.energy_weight, self.force_weight = energy_weight, force_weight
        self.stress_weight, self.per_atom = stress_weight, per_atom

    def predict(self, batch: dict[str, Tensor], create_graph: bool = False) -> Prediction:
        """The potential on a batch of ``stack_molecules``, ``pad_molecules`` or ``collate``.

        Raises:
            UserError: a batch with edges is to be captured; their number differs from batch to
                batch, and a recorded step would go on with those of the first.
        """
        options: dict[str, Any] = {"create_graph": create_graph, "mask": batch.get("mask")}
        if "edges" in batch:
            if batch["edges"].is_cuda and torch.cuda.is_current_stream_capturing():
                raise UserError(
                    "Structures with a neighbour list cannot be trained as a CUDA graph, because "
                    "the number of edges changes; train without Captured."
                )
            options |= {name: batch[name] for name in ("edges", "shifts", "cell", "batch")}
            options |= {"graphs": len(batch["energy"]), "mutual": True}
            options["stress"] = self.stress_weight > 0
        found: Prediction = self.potential(batch["numbers"], batch["positions"], **options)
        return found

    def forward(self, batch: Any) -> Losses:
        said = self.predict(batch, create_graph=self.training)
        assert said.forces is not None
        scale = self.potential.scale
        if "batch" in batch:
            atoms = torch.bincount(batch["batch"], minlength=len(batch["energy"]))
        elif "mask" in batch:
            atoms = batch["mask"].sum(-1)
        else:
            atoms = torch.full_like(batch["energy"], batch["numbers"].shape[-1])
        off = said.energy - batch["energy"]
        per_atom = off / atoms if self.per_atom else off
        pull = said.forces - batch["forces"]
        known, labelled = torch.isfinite(off), torch.isfinite(pull)
        losses = {
            "energy": _mean_square(per_atom / scale, known, self.energy_weight),
            "force": _mean_square(pull / scale.to(pull), labelled, self.force_weight),
            "energy_mae_mev": _mean_size(off, known),
            "force_mae_mev_a": _mean_size(pull, labelled),
        }
        if said.stress is not None:
            tension = said.stress - batch["stress"]
            volume = torch.linalg.det(batch["cell"]).abs() / (atoms * scale)
            known = torch.isfinite(tension)
            tensions = tension * volume[:, None, None]
            losses["stress"] = _mean_square(tensions, known, self.stress_weight)
            losses["stress_mae_mev_a3"] = _mean_size(tension, known)
        return losses


def _mean_square(error: Tensor, known: Tensor, weight: float) -> Term:
    return Term(torch.where(known, error, 0.0).square().sum().float(), known.sum(), weight)


def _mean_size(error: Tensor, known: Tensor) -> Term:
    """A metric in thousandths."""
    size = torch.where(known, error.detach(), 0.0).abs().sum().float()
    return Term(1000 * size, known.sum(), 0.0)
