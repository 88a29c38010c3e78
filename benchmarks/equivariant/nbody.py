"""N-body: test MSE of PONITA and EGNN, trained equally long on the published data.

    python benchmarks/equivariant/nbody.py [--quick] [--seconds 180] [--seeds 0,1,2] [--device cuda]

Data: nbody_small_7000.npz (WEIGHTSHARE_DATA or --data), else simulated. Per row: one network, one
seed, a fixed budget of seconds; weights are averaged, the best by validation is tested. Networks of
one seed are compared by the paired differences of their errors over the test trajectories.
"""

import argparse
import functools
import sys
import time
from pathlib import Path

import numpy as np
import torch
from _egnn import Egnn

sys.path.insert(0, str(Path(__file__).parents[1]))
from _table import Table

from weightshare.data import locate
from weightshare.equivariant import DynamicsTask, NBody, Ponita, RotatedUpdate, make_nbody
from weightshare.equivariant.dynamics import VECTORS, columns, sample_errors
from weightshare.equivariant.nbody import constant_velocity
from weightshare.training import Captured, EpochBatches, LoopConfig
from weightshare.training import Loop as TrainingLoop

SIZES = {
    "published": {"orientations": 16, "hidden": 128, "basis": 256, "layers": 5},
    "small": {"orientations": 8, "hidden": 32, "basis": 32, "layers": 3},
}


def load(path: str | None, quick: bool) -> dict[str, NBody]:
    if quick:
        data = make_nbody(300)
        return {"train": data.take(slice(100)), "valid": data.take(slice(100, 200)),
                "test": data.take(slice(200, 300))}  # fmt: skip
    with np.load(path or locate("nbody_small_7000"), allow_pickle=False) as file:
        found = {k: file[k] for k in file.files}
    whole = NBody(found["charges"], found["loc30"], found["vel30"], found["loc40"])
    return {part: whole.take(found[f"{part}_idx"]) for part in ("train", "valid", "test")}


def network(name: str) -> torch.nn.Module:
    if name.startswith("egnn"):  # as many weights as the PONITA of that size
        return Egnn(hidden=180 if name == "egnn" else 32, layers=4)
    size = SIZES[name.removeprefix("ponita-")]
    return Ponita(1, 1, vectors_out=1, layer_scale=1e-6, level="node", **size)


def train(
    name: str, seed: int, budget: float, epochs: int, sets: dict[str, NBody], device: str
) -> dict:
    torch.manual_seed(seed)
    task = DynamicsTask(network(name)).to(device)
    batches = EpochBatches(columns(sets["train"]), 100, seed)
    if not name.startswith("egnn"):
        first = {k: v.to(device) for k, v in batches[0].items()}
        task.network.calibrate_(
            first["start"], first["charges"].unsqueeze(-1), first["velocity"].unsqueeze(-2)
        )
    epoch = max(len(sets["train"]) // 100, 1)
    rate = 3e-3 if name in ("ponita-small", "egnn-small") else 1e-3
    average = 0.99 if name.endswith("small") else 0.999

    def build(steps: int) -> tuple[Captured, LoopConfig]:
        config = LoopConfig(
            steps=steps, learning_rate=rate, weight_decay=1e-10, clip=0.5, ema_decay=average,
            warmup_fraction=min(10 * epoch / max(steps, 1), 0.1), seed=seed,
            log_every=10 * epoch, evaluate_every=max(steps // 40, 1), watch="mse",
            keep_best=True, checkpoint_every=0,
        )  # fmt: skip
        return Captured(RotatedUpdate.from_config(task, config, vectors=VECTORS)), config

    steps = epochs * epoch
    if not epochs:
        # How long a step takes decides how many there will be; what the trial changes is undone.
        begun = time.monotonic()
        kept = {k: v.clone() for k, v in task.state_dict().items()}
        each = step_seconds(build(1000)[0], batches)
        task.load_state_dict(kept)
        steps = max(int((budget - (time.monotonic() - begun)) * 0.93 / each), 20)
    update, config = build(steps)

    def evaluate() -> dict[str, float]:
        return {"mse": float(sample_errors(task, sets["valid"]).mean())}

    begun, processor = time.monotonic(), time.process_time()
    TrainingLoop(update, batches, config, evaluate=evaluate, progress=False).fit()
    seconds, processor = time.monotonic() - begun, time.process_time() - processor
    errors = {part: sample_errors(task, sets[part]) for part in ("train", "valid", "test")}
    return {
        "parameters": sum(p.numel() for p in task.parameters()),
        "steps": steps,
        "epochs": steps / epoch,
        "seconds": seconds,
        "processor_seconds": processor,
        "ms_per_step": 1000 * seconds / steps,
        **{f"{part}_mse": float(e.mean()) for part, e in errors.items()},
        "test_standard_error": float(errors["test"].std() / len(errors["test"]) ** 0.5),
        "errors": errors["test"],
    }


FIRST: dict[int, np.ndarray] = {}
"""Errors of the first network of each seed in this run."""


def paired(row: dict, seed: int) -> dict:
    """The row with its mean difference to the seed's first network over the same trajectories."""
    errors = row.pop("errors")
    off = errors - FIRST.setdefault(seed, errors)
    if off.any():
        row["against_first"] = float(off.mean())
        row["against_first_standard_error"] = float(off.std(ddof=1) / len(off) ** 0.5)
    return row


def step_seconds(update: Captured, batches: EpochBatches) -> float:
    """Median time of a step once it is captured."""
    times = []
    for step in range(50 if update.device.type == "cuda" else 6):
        begun = time.perf_counter()
        metrics = update.apply(update.prepare(batches[step], step))
        float(metrics["loss"])
        times.append(time.perf_counter() - begun)
    times = times[len(times) // 2 :]
    return sorted(times)[len(times) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="nbody_small_7000.npz, default from WEIGHTSHARE_DATA")
    parser.add_argument("--networks", default="ponita-published,egnn")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--seconds", type=float, default=180, help="training time of a row")
    parser.add_argument("--epochs", type=int, default=0, help="instead of a time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    table = Table("equivariant_nbody", __doc__, parser)
    options = table.options
    torch.set_float32_matmul_precision("high")
    sets = load(options.data, table.quick)
    fitted = constant_velocity(sets["train"], sets["test"])
    table.row("constant velocity", lambda: {"test_mse": fitted})
    seconds = 8 if table.quick else options.seconds
    names = "ponita-small,egnn" if table.quick else options.networks
    for seed in map(int, options.seeds.split(",")):
        for name in names.split(","):
            budget = min(seconds, table.end - time.monotonic())
            row = functools.partial(train, name, seed, budget, options.epochs, sets, options.device)
            table.row(f"{name}, seed {seed}", lambda row=row, seed=seed: paired(row(), seed))
    table.show(
        [
            "parameters",
            "epochs",
            "processor_seconds",
            "valid_mse",
            "test_mse",
            "test_standard_error",
        ]
    )


if __name__ == "__main__":
    main()
