"""Energy drift in molecular dynamics: smooth against published invariants, two time steps.

    python benchmarks/equivariant/nve.py --potentials FOLDER [--quick] [--device cuda]

FOLDER holds ethanol-NAME-SEED.safetensors from ``ethanol.py --keep``. Five starts at 300 K (twice
the kinetic energy at the first structures, so that half goes into vibration), velocity Verlet in
float64. All starts run in one batch with both time steps, and on a GPU several steps are one CUDA
graph; where ASE is installed, the first steps of one start are checked against its integrator with
our calculator. Drift is the slope of the total energy, with the 95 % interval over the starts that
stayed intact; fluctuation is the standard deviation about that line. What has been followed so far
is written every half minute; a run that was cut goes on from there.
"""

import argparse
import importlib.util
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from _table import Table, found_or_leave, spread

from weightshare.data import locate
from weightshare.equivariant import PonitaPotential, read_structures
from weightshare.report import replacing

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
BROKEN = 15.0
"""eV/Å: twice the largest force in the data; beyond, a molecule has come where the potential knows
nothing, and mostly flies apart."""
PAUSE = 30
"""Seconds between two writings."""


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
        self.hardest = self.strongest()
        self.stream = torch.cuda.Stream() if x.is_cuda else None

    def state(self) -> list[Tensor]:
        return [self.x, self.v, self.energy, self.pull, self.hardest]

    def put(self, state: Sequence[Tensor]) -> None:
        for tensor, other in zip(self.state(), state, strict=True):
            tensor.copy_(other)

    def step(self) -> None:
        self.v.add_(self.h / 2 * self.pull / self.mass)
        self.x.add_(self.h * self.v)
        said = self.potential(self.numbers, self.x)
        self.energy.copy_(said.energy)
        self.pull.copy_(said.forces)
        self.hardest.copy_(torch.maximum(self.hardest, self.strongest()))
        self.v.add_(self.h / 2 * self.pull / self.mass)

    def strongest(self) -> Tensor:
        """Largest force on an atom of each molecule, eV/Å: far above what such a molecule feels
        where it has come to a place that the potential does not know."""
        return self.pull.norm(dim=-1).amax(-1)

    def total(self) -> Tensor:
        """Energy of each molecule in eV."""
        return self.energy + (self.mass * self.v.square()).sum((1, 2)) / 2

    def run(self, steps: int) -> Callable[[], Any]:
        """A function that makes so many steps: on a GPU one CUDA graph, recorded now, in a stream
        of its own (cuBLAS has one workspace per stream, and graphs run side by side)."""
        if self.stream is None:
            return lambda: [self.step() for _ in range(steps)]
        before = [t.clone() for t in self.state()]
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            for _ in range(steps):
                self.step()
        self.put(before)
        torch.cuda.synchronize()
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


def simulate(
    motions: list[Motion], totals: list[list[Tensor]], rounds: int, end: float
) -> Iterator[float]:
    """Follow all motions side by side and add their total energies in eV to ``totals``; gives way
    every now and then, with the milliseconds of a step, the last time when the time is up."""
    advance = [motion.run(EVERY) for motion in motions]
    paused, done = time.monotonic(), 0
    while len(totals[0]) < rounds:
        for motion, go, kept in zip(motions, advance, totals, strict=True):
            with torch.cuda.stream(motion.stream):
                go()
                kept.append(motion.total())
        done += 1
        last = len(totals[0]) == rounds
        if last or done % 25 == 0 or motions[0].stream is None:
            if motions[0].stream is not None:
                torch.cuda.synchronize()
            now = time.monotonic()
            if last or now > min(paused + PAUSE, end):
                yield 1000 * (now - paused) / (done * EVERY)
                paused, done = time.monotonic(), 0
            if now > end:
                return


def drift(energies: np.ndarray, hardest: list[float], picoseconds: float) -> dict:
    found: dict = {"finite": bool(np.isfinite(energies).all())}
    for row, fs in enumerate(STEPS):
        t = np.arange(len(energies)) * EVERY * fs / 1000
        part = t <= picoseconds
        e = energies[part, row * STARTS : (row + 1) * STARTS]
        slopes, offsets = np.polyfit(t[part], e, 1)
        about = e - (t[part, None] * slopes + offsets)
        forces = hardest[row * STARTS : (row + 1) * STARTS]
        intact = np.array(forces) < BROKEN
        over = spread(slopes[intact].tolist() or [math.nan])
        found[f"intact_{fs}"], found[f"largest_force_{fs}"] = int(intact.sum()), forces
        found[f"drifts_{fs}"], found[f"fluctuations_{fs}"] = slopes.tolist(), about.std(0).tolist()
        found |= {
            f"drift_{fs}_mev_atom_ps": over["mean"], f"half_width_{fs}": over["half_width"],
            f"fluctuation_{fs}_mev_atom": float(about[:, intact].std()),
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
    before = [t.clone() for t in motion.state()]
    for _ in range(steps):
        motion.step()
    off = np.abs(motion.x[0].cpu().numpy() - atoms.positions).max()
    motion.put(before)
    return float(off)


def keep(file: Path, motions: list[Motion], totals: list[list[Tensor]]) -> None:
    """Where all motions are, and the energies so far."""
    tensors = {f"{k},{i}": t for k, m in enumerate(motions) for i, t in enumerate(m.state())}
    tensors |= {f"{k},totals": torch.stack(kept) for k, kept in enumerate(totals)}
    with replacing(file) as path:
        save_file({name: t.contiguous() for name, t in tensors.items()}, path)


def go_on(file: Path, motions: list[Motion]) -> list[list[Tensor]]:
    """Put the motions where ``keep`` left them; the energies so far."""
    if not file.is_file():
        return [[motion.total()] for motion in motions]
    tensors = load_file(file)
    for k, motion in enumerate(motions):
        motion.put([tensors[f"{k},{i}"] for i in range(len(motion.state()))])
    return [[*tensors[f"{k},totals"].to(m.x.device)] for k, m in enumerate(motions)]


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
    rounds = round(1000 * length / min(STEPS) / EVERY) + 1
    state = table.file.with_suffix(".safetensors")
    if table.rows and not state.is_file():  # finished
        return
    motions = [start(file, data, options.device) for file in files]
    about: list[dict] = [{"starts": STARTS} for _ in files]
    if importlib.util.find_spec("ase"):
        for figures, file, motion in zip(about, files, motions, strict=True):
            figures["ase_difference"] = against_ase(file, motion)
    totals = go_on(state, motions)
    for each in simulate(motions, totals, rounds, table.end):
        keep(state, motions, totals)
        for name, motion, kept, figures in zip(names, motions, totals, about, strict=True):
            energies = 1000 * torch.stack(kept).cpu().numpy() / motion.x.shape[1]
            figures["ms_per_step_of_all"] = each
            table.rows[name] = {**drift(energies, motion.hardest.tolist(), length), **figures}
        table.write()
        print(f"{len(totals[0])} of {rounds} energies", file=sys.stderr, flush=True)
    if len(totals[0]) == rounds:
        state.unlink(missing_ok=True)
    table.show(
        [f"{name}_{fs}{unit}" for fs in STEPS for name, unit in
         (("intact", ""), ("drift", "_mev_atom_ps"), ("half_width", ""),
          ("fluctuation", "_mev_atom"))]
    )  # fmt: skip


if __name__ == "__main__":
    main()
