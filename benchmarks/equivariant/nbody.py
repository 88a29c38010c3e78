"""N-body: test MSE of PONITA and EGNN on the published data.

    python benchmarks/equivariant/nbody.py [--quick] [--seconds 180] [--seeds 0,1,2] [--device cuda]

Data: nbody_small_7000.npz (WEIGHTSHARE_DATA or --data), else simulated. Per row: one network, one
seed, a budget of epochs or seconds; weights are averaged, the best by validation is tested.

Networks are named SIZE+CHANGE+CHANGE: see ``CHANGES``. ``--errors FOLDER`` keeps the error of every
test trajectory there; ``--compare`` then adds for every network the difference to the first one,
paired over trajectories and averaged over the seeds that both have.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from _egnn import Egnn
from _training import Row, add_options, fill

sys.path.insert(0, str(Path(__file__).parents[1]))
from _table import Table

from weightshare.data import locate
from weightshare.equivariant import DynamicsTask, NBody, Ponita, make_nbody, symmetrise
from weightshare.equivariant.dynamics import VECTORS, Even, Rescaled, columns, sample_errors
from weightshare.equivariant.nbody import constant_velocity
from weightshare.training import EpochBatches

SIZES: dict[str, dict] = {
    "published": {"orientations": 16, "hidden": 128, "basis": 256, "layers": 5},
    "medium": {"orientations": 20, "hidden": 64, "basis": 64, "layers": 5},
    "small": {"orientations": 8, "hidden": 32, "basis": 32, "layers": 3},
}
CHANGES: dict[str, dict] = {
    "dodecahedron": {"orientations": 20},
    "wide": {"hidden": 192},
    "full": {"orientations": 6, "convolution": "full", "invariants": "complete"},
    "unaveraged": {},
    "momentum": {},
    "signs": {},
    "scales": {},
    "decay": {},
}
"""Sizes; a full convolution with complete invariants; plain weights; momentum conserved exactly;
charges flipped at random, and over both signs at test time; other units of length at random; weight
decay."""
ROTATIONS = 5
"""Test-time rotations that are averaged over."""


def load(path: str | None, quick: bool) -> dict[str, NBody]:
    if quick:
        data = make_nbody(300)
        return {"train": data.take(slice(100)), "valid": data.take(slice(100, 200)),
                "test": data.take(slice(200, 300))}  # fmt: skip
    with np.load(path or locate("nbody_small_7000"), allow_pickle=False) as file:
        found = {k: file[k] for k in file.files}
    whole = NBody(found["charges"], found["loc30"], found["vel30"], found["loc40"])
    return {part: whole.take(found[f"{part}_idx"]) for part in ("train", "valid", "test")}


def network(kind: str, changes: list[str]) -> torch.nn.Module:
    if kind.startswith("egnn"):  # as many weights as the PONITA of that size
        return Egnn(hidden=180 if kind == "egnn" else 32, layers=4)
    size = dict(SIZES[kind.removeprefix("ponita-")])
    for change in changes:
        size |= CHANGES[change]
    return Ponita(1, 1, vectors_out=1, layer_scale=1e-6, level="node", **size)


def build(name: str, seed: int, sets: dict[str, NBody], options: argparse.Namespace) -> Row:
    kind, *changes = name.split("+")
    torch.manual_seed(seed)
    horizon = sets["train"].time if "momentum" in changes else None
    task = DynamicsTask(network(kind, changes), horizon).to(options.device)
    batches = EpochBatches(columns(sets["train"]), 100, seed)
    if not kind.startswith("egnn"):
        first = {k: v.to(options.device) for k, v in batches[0].items()}
        task.network.calibrate_(
            first["start"], first["charges"].unsqueeze(-1), first["velocity"].unsqueeze(-2)
        )
    small = kind.endswith("small")
    return Row(
        task,
        Rescaled(batches) if "scales" in changes else batches,
        {"vectors": VECTORS, "signs": ("charges",) if "signs" in changes else ()},
        {
            "learning_rate": 3e-3 if small else 1e-3, "clip": 0.5, "seed": seed,
            "weight_decay": 0.1 if "decay" in changes else 1e-10,
            "ema_decay": None if "unaveraged" in changes else 0.99 if small else 0.999,
            "warmup_fraction": 0.03 if small else 0.01,
        },
        lambda: float(sample_errors(task, sets["valid"]).mean()),
        10 if small else 40,
    )  # fmt: skip


def test(
    name: str, seed: int, row: Row, sets: dict[str, NBody], options: argparse.Namespace
) -> dict[str, float]:
    task = row.task
    errors = {part: sample_errors(task, sets[part]) for part in ("train", "valid", "test")}
    found = {f"{part}_mse": float(e.mean()) for part, e in errors.items()}
    found["test_standard_error"] = float(errors["test"].std() / len(errors["test"]) ** 0.5)
    kept = {"": errors["test"]}
    if name.startswith("ponita"):
        even = Even(task.network) if "+signs" in name else task.network
        turned = DynamicsTask(symmetrise(even, ROTATIONS), task.horizon)
        kept["+rotated"] = sample_errors(turned, sets["test"])
        found[f"rotated_{ROTATIONS}_test_mse"] = float(kept["+rotated"].mean())
    if options.errors is not None:
        options.errors.mkdir(parents=True, exist_ok=True)
        for suffix, values in kept.items():
            file = options.errors / f"{name}{suffix},{seed}.npy"
            np.save(file, values.astype(np.float32))
    return found


def compare(folder: Path, first: str) -> dict[str, dict]:
    """Differences to the first network: mean over seeds and trajectories, standard error over the
    trajectories of the seeds' mean."""
    errors: dict[str, dict[str, np.ndarray]] = {}
    for file in sorted(folder.glob("*.npy")):
        name, seed = file.stem.rsplit(",", 1)
        errors.setdefault(name, {})[seed] = np.load(file, allow_pickle=False).astype(float)
    found = {}
    for name, mine in errors.items():
        seeds = sorted(set(mine) & set(errors[first]))
        means = [float(mine[seed].mean()) for seed in sorted(mine)]
        row: dict = {"seeds": len(means), "test_mse": float(np.mean(means))}
        row["spread_over_seeds"] = float(np.std(means, ddof=1)) if len(means) > 1 else None
        if name != first and seeds:
            off = np.mean([mine[seed] - errors[first][seed] for seed in seeds], axis=0)
            row["seeds_compared"], row["against_first"] = len(seeds), float(off.mean())
            row["against_first_standard_error"] = float(off.std(ddof=1) / len(off) ** 0.5)
        found[name] = row
    return dict(sorted(found.items(), key=lambda item: (item[0] != first, item[1]["test_mse"])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="nbody_small_7000.npz, default from WEIGHTSHARE_DATA")
    parser.add_argument("--networks", help="default ponita-published,egnn")
    add_options(parser, 180)
    parser.add_argument("--errors", type=Path, help="folder for the error of every trajectory")
    parser.add_argument("--compare", action="store_true", help="networks by what --errors holds")
    table = Table("equivariant_nbody", __doc__, parser)
    options = table.options
    torch.set_float32_matmul_precision("high")
    if table.quick:
        options.seconds = 8
    names = options.networks or f"ponita-{'small' if table.quick else 'published'},egnn"
    names = names.split(",")
    if options.compare:
        table.facts["compared"] = compare(options.errors, names[0])
        table.write()
        for name, row in table.facts["compared"].items():
            print(name, row)
        return
    sets = load(options.data, table.quick)
    fitted = constant_velocity(sets["train"], sets["test"])
    table.row("constant velocity", lambda: {"test_mse": fitted})
    fill(table, names, lambda *pair: build(*pair, sets, options),
         lambda *row: test(*row, sets, options))  # fmt: skip
    table.show(["epochs", "processor_seconds", "valid_mse", "test_mse", "test_standard_error"])


if __name__ == "__main__":
    main()
