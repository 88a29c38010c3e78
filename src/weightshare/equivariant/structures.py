"""Structures with energies and forces from files: extended XYZ and npz without pickle."""

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weightshare.errors import UserError

KCAL_PER_MOL = 0.04336411531
"""eV; CODATA 2014 as in ASE."""
UNITS = {"eV": 1.0, "kcal/mol": KCAL_PER_MOL, "Hartree": 27.211386246, "meV": 1e-3}
"""Energy units by name -> eV."""


@dataclass
class Structure:
    """One frame: eV, Å, eV/Å, eV/Å^3; what the file does not say is None."""

    numbers: np.ndarray
    positions: np.ndarray
    energy: float | None = None
    forces: np.ndarray | None = None
    stress: np.ndarray | None = None
    """(3, 3), positive under tension."""
    cell: np.ndarray | None = None
    pbc: tuple[bool, bool, bool] = (False, False, False)
    info: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.numbers)


def read_structures(path: str | Path, unit: str = "auto") -> list[Structure]:
    """All frames of an extended XYZ file (.xyz, .extxyz, also .gz) or of an npz file.

    npz: rMD17's names (nuclear_charges, coords, energies, forces; kcal/mol) or MD17's and sGDML's
    (z, R, E, F, with the unit in ``units`` or ``e_unit``), optionally ``cell``. XYZ: where there is
    no ``stress`` but a ``virial``, the stress is minus the virial over the volume.

    Args:
        unit: of the energies: eV, kcal/mol, Hartree or meV; auto takes what the file or its format
            says (extended XYZ: eV).

    Raises:
        UserError: the format is unknown, the unit is not said, coordinates are not finite, atoms
            coincide.
    """
    path = Path(path)
    if unit != "auto" and unit not in UNITS:
        raise UserError(f"The unit {unit!r} is not known; use auto, {', '.join(UNITS)}.")
    if not path.exists():
        raise UserError(f"There is no file {path}.")
    if path.suffix == ".npz":
        frames = _read_npz(path, unit)
    elif path.name.removesuffix(".gz").endswith((".xyz", ".extxyz")):
        frames = _read_xyz(path, unit)
    else:
        raise UserError(f"{path} is neither .xyz, .extxyz (also .gz) nor .npz.")
    if not frames:
        raise UserError(f"{path} holds no structure.")
    for number, frame in enumerate(frames):
        check_structure(frame, f"frame {number} of {path}")
    return frames


def check_structure(frame: Structure, name: str = "the structure") -> None:
    """Refuse shapes that do not fit, species that do not exist, numbers that are not finite and
    atoms that coincide, images of them too."""
    if frame.positions.shape != (len(frame), 3):
        raise UserError(
            f"The positions of {name} have shape {frame.positions.shape} for {len(frame)} atoms; "
            f"give {(len(frame), 3)}."
        )
    if len(frame) and not (frame.numbers.min() > 0 and frame.numbers.max() <= 118):
        wrong = frame.numbers[(frame.numbers < 1) | (frame.numbers > 118)][0]
        raise UserError(f"{name} holds the atomic number {wrong}; there are 1 to 118.")
    if not np.isfinite(frame.positions).all():
        raise UserError(f"A coordinate of {name} is not finite; repair or leave out the frame.")
    if frame.cell is not None and (frame.cell.shape != (3, 3) or not np.isfinite(frame.cell).all()):
        raise UserError(f"The cell of {name} is {frame.cell.tolist()}; give (3, 3) finite numbers.")
    if 1 < len(frame) <= 512:
        gaps = frame.positions[:, None] - frame.positions[None]
        if frame.cell is not None:
            turns = (gaps @ np.linalg.pinv(frame.cell)).round() * np.array(frame.pbc)
            gaps = gaps - turns @ frame.cell
        squared = (gaps**2).sum(-1) + np.eye(len(frame))
        if squared.min() < 1e-8:
            a, b = np.unravel_index(squared.argmin(), squared.shape)
            raise UserError(f"Atoms {a} and {b} of {name} stand in one place; move one of them.")


def _read_xyz(path: Path, unit: str) -> list[Structure]:
    from ase.io import read

    factor = UNITS["eV" if unit == "auto" else unit]
    try:
        return [_of_ase(atoms, factor) for atoms in read(str(path), ":", format="extxyz")]
    except (OSError, ValueError, KeyError, IndexError) as error:  # XYZError is an OSError
        raise UserError(f"{path} is no extended XYZ file: {error}") from error


def _of_ase(atoms: Any, factor: float) -> Structure:
    known = {} if atoms.calc is None else atoms.calc.results
    energy = known.get("energy", atoms.info.get("energy"))
    pull = known.get("forces", atoms.arrays.get("forces"))
    stress = known.get("stress", atoms.info.get("stress"))
    virial = atoms.info.get("virial", atoms.info.get("virials"))
    if stress is None and virial is not None and atoms.cell.volume > 0:
        stress = -np.asarray(virial, float) / atoms.cell.volume
    if stress is not None:
        stress = np.asarray(stress, float)
        if stress.size == 6:
            stress = stress[[0, 5, 4, 5, 1, 3, 4, 3, 2]]
        stress = factor * stress.reshape(3, 3)
    return Structure(
        atoms.numbers.astype(np.int64),
        np.asarray(atoms.positions, float),
        None if energy is None else factor * float(energy),
        None if pull is None else factor * np.asarray(pull, float),
        stress,
        np.asarray(atoms.cell.array, float) if atoms.pbc.any() else None,
        tuple(map(bool, atoms.pbc)),  # type: ignore[arg-type]
        dict(atoms.info),
    )


def _read_npz(path: Path, unit: str) -> list[Structure]:
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is no npz file; write one with numpy.savez.")
    try:
        with np.load(path, allow_pickle=False) as file:
            kept = {name: file[name] for name in file.files}
    except ValueError as error:
        raise UserError(
            f"{path} holds pickled objects, which can run code when read; save plain arrays."
        ) from error
    revised = {"nuclear_charges", "coords", "energies", "forces"} <= set(kept)
    names = ("nuclear_charges", "coords", "energies", "forces") if revised else ("z", "R", "E", "F")
    if missing := [name for name in names if name not in kept]:
        raise UserError(
            f"{path} lacks {', '.join(missing)}; give arrays z, R, E, F or nuclear_charges, "
            "coords, energies, forces."
        )
    numbers, places, energies, pulls = (kept[name] for name in names)
    for name in names:
        if not np.issubdtype(kept[name].dtype, np.number):
            raise UserError(f"{name} in {path} holds {kept[name].dtype}; give numbers.")
    length = str(kept.get("r_unit", "Ang")).lower()
    if not length.startswith("ang") and length not in ("a", "å"):
        raise UserError(f"The positions in {path} are in {length}; give them in angstrom.")
    if numbers.ndim == 1:
        numbers = np.broadcast_to(numbers, (len(places), len(numbers)))
    if (numbers != numbers.round()).any() or len(numbers) != len(places):
        raise UserError(
            f"{path} has the atomic numbers {numbers.shape} for {len(places)} frames; give whole "
            "numbers, (atoms,) or (frames, atoms)."
        )
    if places.ndim != 3 or pulls.shape != places.shape or energies.size != len(places):
        raise UserError(
            f"{path} has positions {places.shape}, forces {pulls.shape} and {energies.size} "
            "energies; give (frames, atoms, 3), the same, and one energy for each frame."
        )
    if unit == "auto":
        unit = _unit_of(kept, revised, path)
    factor, cell = UNITS[unit], kept.get("cell")
    energies = energies.reshape(len(places)).astype(float)
    periodic = cell is not None
    if cell is not None and cell.shape not in ((3, 3), (len(places), 3, 3)):
        raise UserError(f"cell in {path} has shape {cell.shape}; give (3, 3) or (frames, 3, 3).")
    return [
        Structure(
            numbers[k].astype(np.int64),
            places[k].astype(float),
            factor * float(energies[k]),
            factor * pulls[k].astype(float),
            None,
            None if cell is None else np.asarray(cell if cell.ndim == 2 else cell[k], float),
            (periodic, periodic, periodic),
        )
        for k in range(len(places))
    ]


def _unit_of(kept: dict[str, np.ndarray], revised: bool, path: Path) -> str:
    if revised:
        return "kcal/mol"
    said = " ".join(str(x) for key in ("units", "e_unit") if key in kept for x in kept[key].flat)
    for name in UNITS:
        if name.lower() in said.lower().split():
            return name
    raise UserError(
        f"{path} does not say in which unit its energies are; give the unit: {', '.join(UNITS)}."
    )


def stack_molecules(frames: Sequence[Structure]) -> dict[str, Tensor]:
    """Molecules of one size as tensors (frames, atoms, ...): numbers, positions, forces in float32,
    energies in float64.

    Raises:
        UserError: sizes differ, a frame is periodic, or energies or forces are missing.
    """
    if len({len(frame) for frame in frames}) != 1 or any(f.cell is not None for f in frames):
        raise UserError("Only molecules of one size without a cell can be stacked.")
    if any(frame.energy is None or frame.forces is None for frame in frames):
        raise UserError("A frame has no energy or no forces; give frames with both.")
    return {
        "numbers": torch.from_numpy(np.stack([f.numbers for f in frames])),
        "positions": torch.from_numpy(np.stack([f.positions for f in frames])).float(),
        "energy": torch.tensor([f.energy for f in frames], dtype=torch.float64),
        "forces": torch.from_numpy(np.stack([f.forces for f in frames])).float(),  # type: ignore[misc]
    }


def pad_molecules(frames: Sequence[Structure], atoms: int | None = None) -> dict[str, Tensor]:
    """Molecules of several sizes as tensors (frames, atoms, ...): ``stack_molecules`` with number 0
    and forces of NaN at padding, and ``mask``, False there.

    Args:
        atoms: places for each; default those of the largest.

    Raises:
        UserError: a frame is periodic, or energies or forces are missing.
    """
    most = max(len(frame) for frame in frames) if atoms is None else atoms

    def padded(values: np.ndarray, with_: float) -> np.ndarray:
        filling = [(0, most - len(values)), *[(0, 0)] * (values.ndim - 1)]
        return np.pad(values, filling, constant_values=with_)

    same = [
        replace(
            f, numbers=padded(f.numbers, 0), positions=padded(f.positions, 0.0),
            forces=None if f.forces is None else padded(f.forces, np.nan),
        )
        for f in frames
    ]  # fmt: skip
    sizes = torch.tensor([len(frame) for frame in frames])
    return {**stack_molecules(same), "mask": torch.arange(most) < sizes[:, None]}


def collate(frames: Sequence[Structure], cutoff: float | None) -> dict[str, Tensor]:
    """Structures of any size and periodicity one after another, with their neighbours.

    Keys: numbers, positions, batch, edges, shifts, cell, energy, forces, and stress with NaN where
    a frame has none. A cell without a volume is completed where it is not periodic; it has no
    stress.
    """
    from weightshare.equivariant.neighbours import completed, neighbour_list
    from weightshare.equivariant.pairs import full_edges

    edges, shifts, cells, stresses, start = [], [], [], [], 0
    for frame in frames:
        cell = None if frame.cell is None else torch.from_numpy(frame.cell)
        pbc = torch.tensor(frame.pbc)
        volume = cell is not None and bool(torch.linalg.det(cell) != 0)
        stress = frame.stress if volume else None
        stresses.append(np.full((3, 3), np.nan) if stress is None else stress)
        full = torch.eye(3, dtype=torch.float64) if cell is None else cell
        cells.append(full if volume or cell is None else completed(cell, pbc))
        x = torch.from_numpy(frame.positions)
        if cutoff is None:
            if frame.cell is not None:
                raise UserError("Periodic structures need a cutoff; give one.")
            pairs = full_edges(torch.zeros(len(frame), dtype=torch.int64))
            shift = torch.zeros(pairs.shape[1], 3, dtype=torch.int64)
        else:
            pairs, shift = neighbour_list(x, cutoff, cell, pbc)
        edges.append(pairs + start)
        shifts.append(shift)
        start += len(frame)
    return {
        "numbers": torch.from_numpy(np.concatenate([f.numbers for f in frames])),
        "positions": torch.from_numpy(np.concatenate([f.positions for f in frames])).float(),
        "batch": torch.arange(len(frames)).repeat_interleave(
            torch.tensor([len(f) for f in frames])
        ),
        "edges": torch.cat(edges, 1),
        "shifts": torch.cat(shifts).float(),
        "cell": torch.stack(cells).float(),
        "energy": torch.tensor(
            [np.nan if f.energy is None else f.energy for f in frames], dtype=torch.float64
        ),
        "forces": torch.from_numpy(
            np.concatenate(
                [np.full((len(f), 3), np.nan) if f.forces is None else f.forces for f in frames]
            )
        ).float(),
        "stress": torch.from_numpy(np.stack(stresses)).float(),
    }
