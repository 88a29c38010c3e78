"""The potential as an ASE calculator: geometry optimisation, molecular dynamics, stress."""

import copy
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from ase.calculators.calculator import Calculator, all_changes
from ase.stress import full_3x3_to_voigt_6_stress

from weightshare.equivariant.potential import PonitaPotential
from weightshare.equivariant.structures import Structure, check_structure
from weightshare.equivariant.symmetrised import symmetrise
from weightshare.errors import UserError
from weightshare.training import device_of

DTYPES = {"float64": torch.float64, "float32": torch.float32}


class PonitaCalculator(Calculator):
    """``atoms.calc = PonitaCalculator("potential.safetensors")``; energies in eV, forces in eV/Å,
    stress in eV/Å^3 in ASE's Voigt order xx, yy, zz, yz, xz, xy.

    Args:
        potential: a ``PonitaPotential`` or a file that its ``save`` wrote. It is copied, so that
            the original keeps its place and precision.
        device: where to compute.
        dtype: ``float64`` (default; geometry optimisation needs it) or ``float32``.
        rotations: average over so many rotations of the structure; 1 is the plain potential.

    Raises:
        UserError: there is no such file, device or precision; the structure holds a species that
            was never seen, coinciding atoms, coordinates that are not finite, or is periodic while
            the potential has no cutoff.
    """

    implemented_properties: ClassVar[list[str]] = [
        "energy", "free_energy", "energies", "forces", "stress",
    ]  # fmt: skip

    def __init__(
        self,
        potential: PonitaPotential | str | Path,
        device: str = "cpu",
        dtype: str = "float64",
        rotations: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if not isinstance(potential, PonitaPotential):
            potential = PonitaPotential.load(potential)
        if dtype not in DTYPES:
            raise UserError(f"dtype is {dtype!r}; give {' or '.join(DTYPES)}.")
        self.device, self.dtype = device_of(device), DTYPES[dtype]
        self.potential = copy.deepcopy(potential).to(self.device, self.dtype)
        self.potential.requires_grad_(False).eval()
        if rotations != 1:
            self.potential.network = symmetrise(self.potential.network, rotations)

    def calculate(
        self,
        atoms: Any = None,
        properties: Any = ("energy",),
        system_changes: Any = all_changes,
    ) -> None:
        super().calculate(atoms, properties, system_changes)
        atoms = self.atoms
        periodic = bool(atoms.pbc.any())
        cell = atoms.cell.array if periodic else None
        check_structure(Structure(atoms.numbers, atoms.positions, cell=cell, pbc=tuple(atoms.pbc)))
        numbers = torch.as_tensor(atoms.numbers, dtype=torch.int64)
        positions = torch.as_tensor(atoms.positions, dtype=self.dtype)
        self.potential.check(numbers.to(self.potential.species.device), positions)
        options: dict[str, Any] = {"graphs": 1}
        if periodic:
            options["cell"] = torch.as_tensor(
                atoms.cell.array, dtype=self.dtype, device=self.device
            )
            options["pbc"] = torch.as_tensor(np.asarray(atoms.pbc))
            options["stress"] = "stress" in properties
        said = self.potential(
            numbers.to(self.device), positions.to(self.device), forces=True, **options
        )
        energy = float(said.energy)
        self.results = {
            "energy": energy,
            "free_energy": energy,
            "energies": said.atom_energies.cpu().numpy(),
            "forces": said.forces.double().cpu().numpy(),
        }
        if said.stress is not None:
            tension = said.stress[0].double().cpu().numpy()
            self.results["stress"] = full_3x3_to_voigt_6_stress(tension)
