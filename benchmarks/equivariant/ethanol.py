"""Ethanol, CCSD(T): energy and force errors of a potential trained for a limited time.

    python benchmarks/equivariant/ethanol.py [--quick] [--seconds 170] [--networks ponita,pnita]

Data: ethanol_ccsdt_1000.npz (WEIGHTSHARE_DATA or --data), 850 training, 50 validation and 99 test
structures. The averaged weights of the last step are tested, plain and symmetrised over several
rotations; standard errors are over test structures.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from _training import Row, add_options, fill

sys.path.insert(0, str(Path(__file__).parents[1]))
from _table import Table, found_or_leave

from weightshare.data import locate
from weightshare.equivariant import (
    PonitaPotential,
    PotentialTask,
    read_structures,
    stack_molecules,
    symmetrise,
)
from weightshare.equivariant.potential_task import VECTORS
from weightshare.training import EpochBatches

ROTATIONS = (5, 20)
"""Test-time rotations that are averaged over."""


def test(task: PotentialTask, data: dict[str, torch.Tensor], device: str) -> dict[str, float]:
    """Mean absolute errors with standard errors, meV and meV/Å."""
    task.eval()
    said = task.predict({k: v.to(device) for k, v in data.items()})
    off = 1000 * (said.energy.cpu() - data["energy"]).abs()
    pull = 1000 * (said.forces.cpu() - data["forces"]).abs().mean((-1, -2))
    task.train()
    root = len(off) ** 0.5
    return {
        "energy_mae_mev": float(off.mean()), "energy_standard_error": float(off.std() / root),
        "force_mae_mev_a": float(pull.mean()), "force_standard_error": float(pull.std() / root),
    }  # fmt: skip


def build(name: str, seed: int, sets: dict, options: argparse.Namespace) -> Row:
    torch.manual_seed(seed)
    size: dict = {"hidden": 16, "basis": 16, "layers": 2} if options.quick else {}
    if "small" in name:
        size = {"hidden": 32, "basis": 32, "layers": 3, "orientations": 12}
    if "pnita" in name:
        size["orientations"] = 0
    if "reference" in name:
        size["invariants"] = "reference"
    train = sets["train"]
    scale = float(train["forces"].square().mean().sqrt())
    potential = PonitaPotential(train["numbers"].unique().tolist(), scale=scale, **size)
    potential.fit_references(potential.compositions(train["numbers"]), train["energy"])
    task = PotentialTask(potential).to(options.device)
    batches = EpochBatches(train, 10, seed)
    first = {k: v.to(options.device) for k, v in batches[0].items()}
    potential.calibrate_(first["numbers"], first["positions"])
    config = {
        "learning_rate": 3e-3 if "small" in name else options.rate, "weight_decay": 1e-16,
        "clip": 0.5, "ema_decay": options.average, "warmup_fraction": 0.02, "seed": seed,
    }  # fmt: skip
    return Row(task, batches, {"vectors": VECTORS}, config)


def evaluate(name: str, seed: int, row: Row, sets: dict, options: argparse.Namespace) -> dict:
    potential = row.task.potential
    if options.keep is not None:
        options.keep.mkdir(parents=True, exist_ok=True)
        potential.save(options.keep / f"ethanol-{name}-{seed}.safetensors")
    found = test(row.task, sets["test"], options.device)
    plain = potential.network
    for rotations in ROTATIONS if "pnita" not in name else ():
        potential.network = symmetrise(plain, rotations)
        averaged = test(row.task, sets["test"], options.device)
        found |= {f"rotated_{rotations}_{key}": value for key, value in averaged.items()}
    potential.network = plain
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="ethanol_ccsdt_1000.npz, default from WEIGHTSHARE_DATA")
    parser.add_argument("--networks", default="ponita", help="ponita, pnita; -small, -reference")
    parser.add_argument("--keep", type=Path, help="folder for the trained potentials")
    add_options(parser, 170)
    parser.add_argument("--rate", type=float, default=5e-4, help="peak learning rate")
    parser.add_argument("--average", type=float, default=0.99, help="decay of averaged weights")
    table = Table("equivariant_ethanol", __doc__, parser)
    options = table.options
    torch.set_float32_matmul_precision("high")
    options.data = options.data or str(found_or_leave(lambda: locate("ethanol_ccsdt_1000")))
    if table.quick:
        options.seconds = 15
    data = stack_molecules(read_structures(options.data))
    with np.load(options.data, allow_pickle=False) as file:
        parts = {part: torch.from_numpy(file[f"{part}_idx"]) for part in ("train", "test")}
    sets = {part: {k: v[index] for k, v in data.items()} for part, index in parts.items()}
    names = options.networks.split(",")
    fill(table, names, lambda *pair: build(*pair, sets, options),
         lambda *row: evaluate(*row, sets, options))  # fmt: skip
    table.show(
        ["epochs", "seconds", "energy_mae_mev", "force_mae_mev_a", "rotated_5_energy_mae_mev",
         "rotated_5_force_mae_mev_a"]
    )  # fmt: skip


if __name__ == "__main__":
    main()
