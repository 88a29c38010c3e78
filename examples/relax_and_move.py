"""Relax a molecule or crystal with a trained potential, then let it move at constant energy.

    weightshare points rmd17_ethanol_train_01.npz --out runs/ethanol
    python examples/relax_and_move.py runs/ethanol/checkpoint.safetensors ethanol.xyz

Prints the energy before and after, and how much the total energy of the motion wanders.
"""

import argparse

import numpy as np
from ase import units
from ase.io import read
from ase.md.velocitydistribution import Stationary, thermalize_momenta
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS

from weightshare.equivariant import PonitaCalculator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("potential", help="checkpoint.safetensors of `weightshare points`")
    parser.add_argument("structure", help="any file that ASE reads; its first frame is taken")
    parser.add_argument("--steps", type=int, default=400, help="of motion")
    parser.add_argument("--fs", type=float, default=0.5, help="length of a step")
    parser.add_argument("--kelvin", type=float, default=300.0)
    options = parser.parse_args()

    atoms = read(options.structure, 0)
    atoms.calc = PonitaCalculator(options.potential)
    print(f"energy {atoms.get_potential_energy():.4f} eV")
    BFGS(atoms, logfile=None).run(fmax=0.01, steps=200)
    force = np.linalg.norm(atoms.get_forces(), axis=1).max()
    print(f"relaxed {atoms.get_potential_energy():.4f} eV, largest force {force:.4f} eV/Å")

    # Twice the kinetic energy: half of it goes into vibration.
    thermalize_momenta(atoms, 2 * options.kelvin, rng=np.random.default_rng(0))
    Stationary(atoms)
    motion, totals = VelocityVerlet(atoms, options.fs * units.fs), []
    motion.attach(lambda: totals.append(1000 * atoms.get_total_energy() / len(atoms)))
    motion.run(options.steps)
    time = np.arange(len(totals)) * options.fs / 1000
    slope, start = np.polyfit(time, totals, 1)
    about = np.std(totals - (slope * time + start))
    print(
        f"{time[-1]:.2f} ps: drift {slope:.3f} meV/atom/ps, fluctuation {about:.3f} meV/atom, "
        f"temperature at the end {atoms.get_temperature():.0f} K"
    )


if __name__ == "__main__":
    main()
