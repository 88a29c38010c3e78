"""Energy drift in molecular dynamics: smooth against published invariants, two time steps.

    python benchmarks/equivariant/nve.py --potentials FOLDER [--quick] [--device cuda]

FOLDER holds ethanol-NAME-SEED.safetensors from ``ethanol.py --keep``. Five starts at 300 K (twice
the kinetic energy at the first test structures, so that half goes into vibration), velocity Verlet
in float64, all starts in one batch, 10 ps. Drift is the slope of the total energy, with the 95 %
interval over starts; fluctuation is the standard deviation about that line.
"""

import argparse
import functools
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from _table import Table, spread

from weightshare.data import locate
from weightshare.equivariant import PonitaPotential, read_structures

KB = 8.617333262e-5
"""eV/K"""
FS = 0.09822694788
"""Femtosecond in Å (u/eV)^(1/2), the unit of time where masses are in u and energies in eV."""
MASSES = {1: 1.008, 6: 12.011, 8: 15.999}
STARTS = 5


class Forces:
    """Energies and forces of a fixed batch of molecules; one CUDA graph where there is a GPU."""

    def __init__(self, potential: PonitaPotential, numbers: torch.Tensor, x: torch.Tensor) -> None:
        self.potential, self.numbers, self.x = potential, numbers, x.clone()
        self.graph = None
        if x.is_cuda:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    potential(numbers, self.x)
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.said = potential(numbers, self.x)

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.x.copy_(x)
        if self.graph is None:
            self.said = self.potential(self.numbers, self.x)
        else:
            self.graph.replay()
        return self.said.energy.clone(), self.said.forces.clone()


def drift(file: Path, step_fs: float, picoseconds: float, data: str, device: str) -> dict:
    potential = PonitaPotential.load(file).double().to(device).requires_grad_(False).eval()
    frames = read_structures(data)[:STARTS]
    numbers = torch.tensor(np.stack([f.numbers for f in frames]), device=device)
    x = torch.tensor(np.stack([f.positions for f in frames]), device=device)
    mass = torch.tensor([[MASSES[int(z)] for z in row] for row in numbers], device=device)
    mass = mass.double().unsqueeze(-1)
    draw = torch.Generator().manual_seed(0)
    v = torch.randn(x.shape, generator=draw, dtype=torch.float64).to(device)
    v = v * (2 * 300 * KB / mass).sqrt()
    v = v - (mass * v).sum(1, keepdim=True) / mass.sum(1, keepdim=True)
    forces = Forces(potential, numbers, x)
    energy, pull = forces(x)
    h, every = step_fs * FS, max(round(2 / step_fs), 1)
    times, totals = [], []
    for step in range(round(1000 * picoseconds / step_fs) + 1):
        if step % every == 0:
            times.append(step * step_fs / 1000)
            totals.append((energy + (mass * v.square()).sum((1, 2)) / 2).cpu())
        v = v + h / 2 * pull / mass
        x = x + h * v
        energy, pull = forces(x)
        v = v + h / 2 * pull / mass
    t, e = np.array(times), torch.stack(totals).numpy() * 1000 / x.shape[1]
    slopes, offsets = np.polyfit(t, e, 1)
    about = e - (t[:, None] * slopes + offsets)
    found = spread(slopes.tolist())
    return {
        "drift_mev_atom_ps": found["mean"],
        "half_width": found["half_width"],
        "fluctuation_mev_atom": float(about.std()),
        "picoseconds": picoseconds,
        "finite": bool(np.isfinite(e).all()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--potentials", type=Path, required=True)
    parser.add_argument("--picoseconds", type=float, default=10)
    parser.add_argument("--data", help="ethanol_ccsdt_1000.npz, default from WEIGHTSHARE_DATA")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    table = Table("equivariant_nve", __doc__, parser)
    options = table.options
    data = options.data or str(locate("ethanol_ccsdt_1000"))
    length = 0.02 if table.quick else options.picoseconds
    for file in sorted(options.potentials.glob("ethanol-*.safetensors")):
        for step in (0.25, 0.5):
            table.row(
                f"{file.stem}, {step} fs",
                functools.partial(drift, file, step, length, data, options.device),
            )
    table.show(["drift_mev_atom_ps", "half_width", "fluctuation_mev_atom", "picoseconds"])


if __name__ == "__main__":
    main()
