"""Who survives which attack: every rule, every attack, one fixed setting of each.

    python benchmarks/federated/attacks.py [--quick] [--minutes 20] [--data digits] [--seeds 3]

Digits (8 x 8, inside the library) or mnist / fashion_mnist in WEIGHTSHARE_DATA; a perceptron of one
hidden layer, 10 honest participants, uniform shares, each adversary with half an honest share and
samples of its own. A row is written as soon as it is done and is not computed again.

Columns: accuracy of the honest (mean, in brackets the best), the best adversary's, adversaries and
honest participants removed. A cell of a rule of reputation passes if no honest participant is
removed, the honest mean is at least 0.05 above training alone, and no adversary ends above the mean
of training alone.

The setting ``robust`` was chosen on digits with seeds 0 and 1, by these very cells: for it seed 2
is the first that it had not met. The learning rate was chosen by federated averaging, seed 0.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from pathlib import Path

import flwr
import numpy as np
import torch

import weightshare
from weightshare.federated.config import FederateConfig
from weightshare.federated.simulation import simulate
from weightshare.report import read_json, write_json

RESULTS = Path(__file__).parents[1] / "results"
RULES = (
    "robust", "robust+root", "reputation", "reference", "cgsv", "fedavg", "median", "krum",
    "multi_krum", "geometric_median", "foolsgold", "fltrust",
)  # fmt: skip
INDEPENDENT = ("free_rider", "sign_randomise", "rescale", "value_invert", "sign_flip")
CELLS = [
    ("none", 0),
    *((a, n) for n in (2, 11) for a in ("label_flip", *INDEPENDENT, "inner_product", "alie",
                                        "identical")),
    ("alie", 4),
    ("identical", 7),
    ("count_lie", 2),
]  # fmt: skip
ROOT = 50


def cell(data: str, rule: str, attack: str, adversaries: int, seed: int, rounds: int) -> dict:
    """One federation."""
    needs_root = rule in ("robust+root", "fltrust")
    config = FederateConfig(
        data,
        attack=attack,
        adversaries=adversaries,
        strategy=rule.split("+")[0],
        rounds=rounds,
        samples=0 if data == "digits" else 6000,
        root_samples=ROOT if needs_root else 0,
        seed=seed,
    )
    here = simulate(config)
    begun = time.perf_counter()
    here.run()
    seconds = time.perf_counter() - begun
    found = here.accuracies()
    good = [found[name]["accuracy"] for name in here.honest]
    bad = [found[name]["accuracy"] for name in here.adversaries]
    removed = here.reputation.standing.expelled if here.reputation else {}
    best = max(here.honest, key=lambda name: found[name]["accuracy"])
    return {
        "seed": seed,
        "mean": float(np.mean(good)),
        "best": max(good),
        "min": min(good),
        "adversary": max(bad, default=None),
        "removed_adversaries": sum(name in here.adversaries for name in removed),
        "removed_honest": sum(name in here.honest for name in removed),
        "flip_success": found[best]["1>7"],
        "seconds": seconds,
    }


def alone(data: str, adversaries: int, seed: int, rounds: int) -> float:
    """Mean accuracy of the honest participants trained on their own samples."""
    attack = "sign_flip" if adversaries else "none"
    samples = 0 if data == "digits" else 6000
    config = FederateConfig(
        data, attack=attack, adversaries=adversaries, rounds=rounds, samples=samples, seed=seed
    )
    return float(np.mean(list(simulate(config).alone().values())))


def passes(row: dict, alone: float) -> bool:
    """Whether one run meets all that is demanded."""
    return (
        row["removed_honest"] == 0
        and row["mean"] >= alone + 0.05
        and (row["adversary"] is None or row["adversary"] <= alone)
    )


def show(results: dict) -> None:
    """Print a line for each cell: mean over seeds, least and most in brackets."""
    print(f"{'attack':16s}{'A':>3s}  {'rule':18s}{'honest mean':>12s} {'range':>13s}"
          f"{'best adv.':>10s}{'removed a/h':>13s}{'passes':>8s}")  # fmt: skip
    for key, runs in results["cells"].items():
        attack, count, rule = key.split("/")
        base = results["alone"].get(count, {})
        means = [run["mean"] for run in runs]
        worst = [run["adversary"] for run in runs if run["adversary"] is not None]
        out = [f"{run['removed_adversaries']}/{run['removed_honest']}" for run in runs]
        won = sum(passes(run, base[str(run["seed"])]) for run in runs if str(run["seed"]) in base)
        print(
            f"{attack:16s}{count:>3s}  {rule:18s}{np.mean(means):12.3f} "
            f"{min(means):.3f} - {max(means):.3f}{max(worst) if worst else float('nan'):10.3f}"
            f"{' '.join(out):>13s}{won:>5d}/{len(runs)}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few cells, in a temporary place")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rules", default=",".join(RULES), help="only these, with commas")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rounds = 4 if options.quick else 25
    cells = [("none", 0), ("sign_flip", 2)] if options.quick else CELLS
    seeds = 1 if options.quick else options.seeds
    folder = Path(tempfile.mkdtemp()) if options.quick else RESULTS
    path = folder / f"federated_attacks_{options.data}.json"
    results = read_json(path) if path.exists() else {"cells": {}, "alone": {}}
    results |= {
        "command": " ".join(sys.argv),
        "versions": {"weightshare": weightshare.__version__, "torch": torch.__version__,
                     "flwr": flwr.__version__, "python": platform.python_version()},
        "device": f"cpu, one thread, {platform.machine()}",
        "setting": {"data": options.data, "rounds": rounds, "honest": 10, "root_samples": ROOT},
    }  # fmt: skip
    until = time.monotonic() + 60 * options.minutes
    rules = [rule for rule in RULES if rule in options.rules.split(",")]
    jobs = [(seed, *c, rule) for seed in range(seeds) for c in cells for rule in rules]
    for seed, attack, count, rule in jobs:
        if time.monotonic() > until:
            print("time is up; the same command goes on where this one stopped")
            break
        runs = results["cells"].setdefault(f"{attack}/{count}/{rule}", [])
        if any(run["seed"] == seed for run in runs):
            continue
        base = results["alone"].setdefault(str(count), {})
        if str(seed) not in base:
            base[str(seed)] = alone(options.data, count, seed, rounds)
        runs.append(cell(options.data, rule, attack, count, seed, rounds))
        write_json(path, results)
        print(json.dumps({"attack": attack, "A": count, "rule": rule, **runs[-1]}), flush=True)
    show(results)


if __name__ == "__main__":
    main()
