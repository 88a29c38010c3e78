"""An interatomic potential on PONITA: energy, forces, stress."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from weightshare.equivariant.convolution import calibrating
from weightshare.equivariant.neighbours import neighbour_list
from weightshare.equivariant.ponita import Ponita
from weightshare.errors import UserError


class Prediction(NamedTuple):
    """What a potential says of structures; units eV and Å."""

    energy: Tensor
    """(graphs,) eV"""
    forces: Tensor | None
    """(..., 3) eV/Å, minus the gradient of the summed energy"""
    stress: Tensor | None
    """(graphs, 3, 3) eV/Å^3, :math:`V^{-1}\\,dE/d\\varepsilon`, positive under tension"""
    atom_energies: Tensor
    """(graphs, atoms) or (atoms,) eV"""


class PonitaPotential(nn.Module):
    r""":math:`E = \sum_i (s\,\varepsilon_i + E_{Z_i})` with :math:`\varepsilon_i` read from PONITA.

    Forces are exact derivatives of the energy, the stress of the energy under a symmetric strain
    of positions and cell. They sum to zero; the net torque does not on a fixed grid (``symmetrise``
    the network where that matters).

    Args:
        species: atomic numbers that may occur; any other is refused.
        cutoff: radius of the neighbour list and of the smooth window in Å; None connects all atoms
            of a molecule and cannot be used in periodic cells.
        scale: unit of the network's energies in eV; set it to the RMS force component (eV/Å).
        references: energy of each species in eV, 0 by default (see ``fit_references``).
        options: of ``Ponita``; its defaults are the published sizes. Invariants are ``smooth``:
            the published ones make forces jump.
    """

    species: Tensor
    scale: Tensor
    references: Tensor

    def __init__(
        self,
        species: Sequence[int],
        *,
        cutoff: float | None = None,
        scale: float = 1.0,
        references: Sequence[float] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        chosen = sorted(set(map(int, species)))
        if not chosen or chosen[0] < 1 or chosen[-1] > 118:
            raise UserError(f"species are {chosen}; give atomic numbers from 1 to 118.")
        if not scale > 0:
            raise UserError(f"scale is {scale}; give an energy in eV above 0.")
        if references is not None and len(references) != len(chosen):
            raise UserError(
                f"references has {len(references)} energies for the species {chosen}; give one "
                "each, in this order."
            )
        self.cutoff = cutoff
        self.options = {"species": chosen, "cutoff": cutoff, **options}
        self.network: nn.Module = Ponita(
            len(chosen), scalars_out=1, level="node", cutoff=cutoff, **options
        )
        self.register_buffer("species", torch.tensor(chosen))
        # Total energies of molecules need float64: 1 meV of 30 keV is lost in float32.
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float64))
        energies = [0.0] * len(chosen) if references is None else list(map(float, references))
        self.register_buffer("references", torch.tensor(energies, dtype=torch.float64))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move with the rest, but keep the two energies in float64."""
        kept = {name: getattr(self, name) for name in ("scale", "references")}
        super()._apply(fn, recurse)
        for name, tensor in kept.items():
            setattr(self, name, tensor.to(getattr(self, name).device))
        return self

    def forward(
        self,
        numbers: Tensor,
        positions: Tensor,
        *,
        edges: Tensor | None = None,
        shifts: Tensor | None = None,
        cell: Tensor | None = None,
        pbc: Tensor | None = None,
        batch: Tensor | None = None,
        graphs: int | None = None,
        mask: Tensor | None = None,
        forces: bool = True,
        stress: bool = False,
        create_graph: bool = False,
        mutual: bool = False,
    ) -> Prediction:
        """Energies and their derivatives.

        Args:
            numbers: atomic numbers, (graphs, atoms) for molecules of one size, all pairs connected;
                or (atoms,) with ``batch``.
            positions: (..., 3) Å.
            edges, shifts: neighbours (2, E) and their lattice shifts (E, 3); without, they are
                built from the cutoff.
            cell: (3, 3) or (graphs, 3, 3) Å, lattice vectors in rows.
            pbc: periodic directions (3,) of a single structure.
            mutual: ``edges`` hold with every edge its reverse, as those of ``neighbour_list`` do.
            create_graph: let forces be differentiated again (training, Hessians).

        Raises:
            UserError: a species was not seen in training, coordinates are not finite, a cell is
                periodic without a cutoff, a stress is asked for without a volume, derivatives in
                ``torch.inference_mode``.
        """
        self.check(numbers, positions, mask)
        if (forces or stress) and torch.is_inference_mode_enabled():
            raise UserError(
                "Forces and stress are derivatives, which torch.inference_mode forbids; use "
                "torch.no_grad instead, or ask for energies alone with forces=False."
            )
        flat = positions.ndim == 2
        with torch.enable_grad():
            x = positions if positions.requires_grad else positions.detach().requires_grad_()
            strain = None
            y, lattice = x, cell
            if flat:
                batch = torch.zeros_like(numbers, dtype=torch.int64) if batch is None else batch
                graphs = (int(batch.max()) + 1 if len(batch) else 1) if graphs is None else graphs
                lattice = None if cell is None else cell.reshape(-1, 3, 3)
                if edges is None and lattice is not None:
                    mutual = True
                    edges, shifts = self._periodic(x, lattice, pbc, graphs)
            if stress:
                if not flat or lattice is None or batch is None:
                    raise UserError("A stress needs a cell; give cell, and atoms as (atoms, 3).")
                if not lattice.is_cuda and bool((torch.linalg.det(lattice) == 0).any()):
                    raise UserError("A stress needs a cell with a volume; give three vectors.")
                strain = x.new_zeros(graphs or 1, 3, 3).requires_grad_()
                symmetric = (strain + strain.mT) / 2
                y = x + torch.einsum("ad,ade->ae", x, symmetric[batch])
                lattice = lattice + lattice @ symmetric
            offsets = None
            if (
                shifts is not None
                and lattice is not None
                and batch is not None
                and edges is not None
            ):
                rows = lattice[batch[edges[0]]] if len(lattice) > 1 else lattice
                offsets = (shifts.to(y).unsqueeze(-2) @ rows).squeeze(-2)
            features = (numbers.unsqueeze(-1) == self.species).to(y.dtype)
            said = self.network(
                y,
                features,
                edges=("full" if self.cutoff is None and edges is None else edges)
                if flat
                else None,
                offsets=offsets,
                batch=batch,
                graphs=graphs,
                mask=mask,
                mutual=mutual,
            ).scalars.squeeze(-1)
            shift = features.double() @ self.references
            if mask is not None:
                shift = shift * mask
            atoms = said.double() * self.scale + shift
            if flat:
                assert batch is not None and graphs is not None
                energy = atoms.new_zeros(graphs).index_add(0, batch, atoms)
            else:
                energy = atoms.sum(-1)
            wanted = [one for one, on in ((x, forces), (strain, stress)) if on and one is not None]
            slopes: list[Tensor | None] = []
            if wanted:
                # The references do not depend on positions: differentiating the network alone
                # keeps the backward pass in its own precision.
                total = said.sum() * self.scale.to(said.dtype)
                slopes = list(
                    torch.autograd.grad(total, wanted, create_graph=create_graph, allow_unused=True)
                )
                slopes = [
                    torch.zeros_like(w) if s is None else s
                    for w, s in zip(wanted, slopes, strict=True)
                ]
        pull = -slopes[0] if forces and slopes[0] is not None else None
        tension = None
        if stress and lattice is not None and slopes[-1] is not None:
            volume = torch.linalg.det(lattice).abs().reshape(-1, 1, 1)
            tension = slopes[-1] / volume
        if not create_graph:
            energy, atoms = energy.detach(), atoms.detach()
            tension = None if tension is None else tension.detach()
        return Prediction(energy, pull, tension, atoms)

    def _periodic(
        self, positions: Tensor, lattice: Tensor, pbc: Tensor | None, graphs: int
    ) -> tuple[Tensor, Tensor]:
        if self.cutoff is None:
            raise UserError("Periodic structures need a cutoff; build the potential with one.")
        if graphs != 1:
            raise UserError(
                "Several periodic structures at once need edges and shifts; give those of "
                "neighbour_list for each."
            )
        found = neighbour_list(positions, self.cutoff, lattice[0], pbc)
        return found.edges, found.shifts

    def check(self, numbers: Tensor, positions: Tensor, mask: Tensor | None = None) -> None:
        """Refuse species that were never seen and shapes that do not fit. On a GPU only shapes are
        looked at, so that the step does not wait; check once on the CPU."""
        if tuple(numbers.shape) != tuple(positions.shape[:-1]) or numbers.is_floating_point():
            raise UserError(
                f"numbers have shape {tuple(numbers.shape)} and type {numbers.dtype} for positions "
                f"of shape {tuple(positions.shape)}; give one whole atomic number per atom."
            )
        if numbers.is_cuda:
            return
        present = numbers if mask is None else numbers[mask]
        strangers = set(present.unique().tolist()) - set(self.species.tolist())
        if strangers:
            raise UserError(
                f"The potential was made for the species {self.species.tolist()} and has never "
                f"seen {sorted(strangers)}; train one that has."
            )

    def calibrate_(self, numbers: Tensor, positions: Tensor, **options: Any) -> None:
        """Scale the kernels to this batch once, before training (see ``Ponita.calibrate_``)."""
        with calibrating(self):
            self(numbers, positions, forces=False, **options)

    @torch.no_grad()
    def fit_references(self, compositions: Tensor, energies: Tensor) -> None:
        """Set the species' energies to the least-squares fit of ``energies`` (M,) on the atom
        counts (M, species); of equally good fits the smallest (one composition only, say)."""
        counts = compositions.double().cpu()
        fit = torch.linalg.lstsq(counts, energies.double().cpu()[:, None], driver="gelsd")
        self.references.copy_(fit.solution[:, 0])

    def reference_energy(
        self, numbers: Tensor, batch: Tensor | None = None, graphs: int | None = None
    ) -> Tensor:
        """Sum of the species' energies in eV, (graphs,): the energy of an untrained potential."""
        each = (numbers.unsqueeze(-1) == self.species).double() @ self.references
        if batch is None:
            return each.sum(-1)
        graphs = int(batch.max()) + 1 if graphs is None else graphs
        return each.new_zeros(graphs).index_add(0, batch, each)

    def compositions(self, numbers: Tensor) -> Tensor:
        """Atoms of each species, (..., atoms) -> (..., species)."""
        return (numbers.unsqueeze(-1) == self.species).sum(-2)

    def save(self, path: str | Path) -> None:
        """Write weights, grid and options as safetensors.

        Raises:
            UserError: the network was symmetrised, which no option says.
        """
        from safetensors.torch import save_file

        if not isinstance(self.network, Ponita):
            raise UserError("Save a potential before it is symmetrised; symmetrise what is loaded.")
        tensors = {name: t.contiguous() for name, t in self.state_dict().items()}
        save_file(tensors, str(path), {"potential": json.dumps(self.options)})

    @classmethod
    def load(cls, path: str | Path) -> "PonitaPotential":
        """Read what ``save`` wrote.

        Raises:
            UserError: the file is no potential.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), "pt") as file:
                options = json.loads((file.metadata() or {})["potential"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (KeyError, OSError, SafetensorError) as error:
            raise UserError(
                f"{path} is no saved potential; give a file that save() wrote."
            ) from error
        potential = cls(**options)
        if (dtype := tensors["network.embed.weight"].dtype) != torch.float32:
            potential = potential.to(dtype)
        potential.load_state_dict(tensors)
        return potential


def hessian(
    potential: PonitaPotential, numbers: Tensor, positions: Tensor, **options: Any
) -> Tensor:
    """Second derivatives of the energy in eV/Å^2, (3n, 3n), of one structure (n, 3)."""
    x = positions.detach().clone().requires_grad_()
    pull = potential(numbers, x, create_graph=True, **options).forces
    assert pull is not None
    rows = [torch.autograd.grad(-f, x, retain_graph=True)[0].flatten() for f in pull.flatten()]
    return torch.stack(rows)
