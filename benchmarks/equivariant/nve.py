"""Energy drift in molecular dynamics: smooth against published invariants, two time steps.

    python benchmarks/equivariant/nve.py --potentials FOLDER [--quick] [--device cuda]

FOLDER holds ethanol-NAME-SEED.safetensors from ``ethanol.py --keep``. Five starts at 300 K (twice
the kinetic energy at the first structures, so that half goes into vibration), velocity Verlet in
float64. All starts run in one batch with both time steps, and on a GPU several steps are one CUDA
graph; the first steps of one start are checked against ASE's integrator with the ASE calculator.
Drift is the slope of the total energy, with the 95 % interval over starts; fluctuation is the
standard deviation about that line.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from _table import Table, found_or_leave, spread

from weightshare.data import locate
from weightshare.equivariant import PonitaPotential, read_structures

KB = 8.617333262e-5
"""eV/K"""
FS = 0.09822694788
"""Femtosecond in Å (u/eV)^(1/2), the unit of time where masses are in u and energies in eV."""
MASSES = {1: 1.008, 6: 12.011, 8: 15.999}
STARTS = 5
STEPS = (0.25, 0.5)
"""Time steps in fs."""
EVERY = 8
"""Steps between two recorded energies."""


class Motion:
    """Velocity Verlet of a batch of molecules, each with its own time step (B, 1, 1)."""

    def __init__(
        self, potential: PonitaPotential, numbers: Tensor, x: Tensor, v: Tensor, h: Tensor
    ) -> None:
        self.potential, self.numbers = potential, numbers
        self.x, self.v, self.h = x.clone(), v.clone(), h
        mass = torch.tensor([[MASSES[int(z)] for z in row] for row in numbers])
        self.mass = mass.to(x).unsqueeze(-1)
        said = potential(numbers, self.x)
        self.energy, self.pull = said.energy.clone(), said.forces.clone()

    def step(self) -> None:
        self.v.add_(self.h / 2 * self.pull / self.mass)
        self.x.add_(self.h * self.v)
        said = self.potential(self.numbers, self.x)
        self.energy.copy_(said.energy)
        self.pull.copy_(said.forces)
        self.v.add_(self.h / 2 * self.pull / self.mass)

    def total(self) -> Tensor:
        """Energy of each molecule in eV."""
        return self.energy + (self.mass * self.v.square()).sum((1, 2)) / 2

    def run(self, steps: int) -> Any:
        """A function that makes so many steps: on a GPU one CUDA graph, recorded now."""
        if not self.x.is_cuda:
            return lambda: [self.step() for _ in range(steps)]
        kept = [t.clone() for t in (self.x, self.v, self.energy, self.pull)]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(steps):
                self.step()
        for tensor, before in zip((self.x, self.v, self.energy, self.pull), kept, strict=True):
            tensor.copy_(before)
        return graph.replay


def start(file: Path, data: str, device: str) -> Motion:
    """All starts with all time steps in one batch."""
    potential = PonitaPotential.load(file).double().to(device).requires_grad_(False).eval()
    frames = read_structures(data)[:STARTS]
    numbers = torch.tensor(np.stack([f.numbers for f in frames])).repeat(len(STEPS), 1).to(device)
    x = torch.tensor(np.stack([f.positions for f in frames])).repeat(len(STEPS), 1, 1).to(device)
    h = torch.tensor(STEPS, dtype=torch.float64).repeat_interleave(STARTS).to(device) * FS
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(STARTS, *x.shape[1:], generator=draw, dtype=torch.float64)
    motion = Motion(potential, numbers, x, torch.zeros_like(x), h[:, None, None])
    mass = motion.mass
    v = noise.repeat(len(STEPS), 1, 1).to(device) * (2 * 300 * KB / mass).sqrt()
    motion.v.copy_(v - (mass * v).sum(1, keepdim=True) / mass.sum(1, keepdim=True))
    return motion


def simulate(motions: list[Motion], picoseconds: float, end: float) -> tuple[list[Any], float]:
    """Total energies (records, molecules) of each motion in meV per atom, and ms of a step; all
    motions side by side, each on its own stream, until the time is up."""
    cuda = motions[0].x.is_cuda
    streams = [torch.cuda.Stream() if cuda else None for _ in motions]
    totals: list[list[Tensor]] = [[motion.total().clone()] for motion in motions]
    advance = [motion.run(EVERY) for motion in motions]
    rounds, begun = round(1000 * picoseconds / min(STEPS) / EVERY), time.monotonic()
    if cuda:
        torch.cuda.synchronize()
    for done in range(1, rounds + 1):
        for motion, go, stream, kept in zip(motions, advance, streams, totals, strict=True):
            with torch.cuda.stream(stream):
                go()
                kept.append(motion.total().clone())
        if done % 100 == 0:
            if cuda:
                torch.cuda.synchronize()
            if time.monotonic() > end:
                break
    if cuda:
        torch.cuda.synchronize()
    each = 1000 * (time.monotonic() - begun) / (done * EVERY)
    return [1000 * torch.stack(t).cpu().numpy() / motions[0].x.shape[1] for t in totals], each


def drift(energies: np.ndarray, picoseconds: float) -> dict:
    found: dict = {"finite": bool(np.isfinite(energies).all())}
    for row, fs in enumerate(STEPS):
        t = np.arange(len(energies)) * EVERY * fs / 1000
        part = t <= picoseconds
        e = energies[part, row * STARTS : (row + 1) * STARTS]
        slopes, offsets = np.polyfit(t[part], e, 1)
        over = spread(slopes.tolist())
        about = e - (t[part, None] * slopes + offsets)
        found |= {
            f"drift_{fs}_mev_atom_ps": over["mean"], f"half_width_{fs}": over["half_width"],
            f"fluctuation_{fs}_mev_atom": float(about.std()),
            f"picoseconds_{fs}": float(t[part][-1]),
        }  # fmt: skip
    return found


def against_ase(file: Path, motion: Motion, steps: int = 20) -> float:
    """Largest difference in Å after some steps of the first molecule, ASE's integrator and our
    calculator on the CPU against the batch."""
    from ase import Atoms, units
    from ase.md.verlet import VelocityVerlet

    from weightshare.equivariant import PonitaCalculator

    atoms = Atoms(motion.numbers[0].cpu().numpy(), motion.x[0].cpu().numpy())
    atoms.set_masses(motion.mass[0, :, 0].cpu().numpy())
    atoms.set_velocities(motion.v[0].cpu().numpy())
    atoms.calc = PonitaCalculator(file)
    VelocityVerlet(atoms, STEPS[0] * units.fs).run(steps)
    kept = [t.clone() for t in (motion.x, motion.v, motion.energy, motion.pull)]
    for _ in range(steps):
        motion.step()
    off = np.abs(motion.x[0].cpu().numpy() - atoms.positions).max()
    for tensor, before in zip((motion.x, motion.v, motion.energy, motion.pull), kept, strict=True):
        tensor.copy_(before)
    return float(off)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--potentials", type=Path, help="folder of ethanol.py --keep")
    parser.add_argument("--picoseconds", type=float, default=10)
    parser.add_argument("--data", help="ethanol_ccsdt_1000.npz, default from WEIGHTSHARE_DATA")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    table = Table("equivariant_nve", __doc__, parser)
    options = table.options
    data = options.data or str(found_or_leave(lambda: locate("ethanol_ccsdt_1000")))
    if options.potentials is None:
        print("not run: give the folder of ethanol.py --keep as --potentials")
        return
    length = 0.02 if table.quick else options.picoseconds
    files = sorted(options.potentials.glob("ethanol-ponita*.safetensors"))
    names = [file.stem.removeprefix("ethanol-") for file in files]
    if all(name in table.rows for name in names):
        return
    motions = [start(file, data, options.device) for file in files]
    checked = [against_ase(file, motion) for file, motion in zip(files, motions, strict=True)]
    found, each = simulate(motions, length, table.end - 5)
    about = {"starts": STARTS, "ms_per_step_of_all": each}
    for name, energies, off in zip(names, found, checked, strict=True):
        figures = {**drift(energies, length), **about, "ase_difference": off}
        table.row(name, lambda f=figures: f)
    table.show(
        [f"{name}_{fs}{unit}" for fs in STEPS for name, unit in
         (("drift", "_mev_atom_ps"), ("half_width", ""), ("fluctuation", "_mev_atom"))]
    )  # fmt: skip


if __name__ == "__main__":
    main()
