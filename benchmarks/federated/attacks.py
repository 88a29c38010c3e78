"""Who survives which attack: every rule, every attack, one fixed setting of each.

    python benchmarks/federated/attacks.py [--quick] [--minutes 60] [--data digits] [--seeds 3]

``--data`` is digits, inside the library, or mnist, fashion_mnist or movie_reviews in
WEIGHTSHARE_DATA. 10 honest participants; each adversary has half an honest share and samples of its
own. Rows: the clean federation by partition, then A of 10 + A adversaries by attack. All rules and
seeds of a row run in lockstep, their messages by reference; a row is written when it is done.

Of each run: accuracy of the honest participants, the best adversary's, adversaries and honest
removed (expelled, or suspended for invalid replies). ``passes`` counts the seeds in which no honest
participant is removed, the honest mean is at least 0.05 above training alone, and no adversary ends
above the mean of training alone. ``cells`` counts attacked rows by rule: passed on every seed, and
what would be with any gain above 0.

The setting ``robust`` was chosen on digits with the seeds 0 and 1; ``--first-seed 2`` are seeds it
has not met. The learning rates were chosen by federated averaging, seed 0.
"""

import argparse
import json
import sys
from math import isfinite
from pathlib import Path

import flwr
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from _table import Table, spread

from weightshare.federated import fairness
from weightshare.federated.config import FederateConfig
from weightshare.federated.loading import load_samples
from weightshare.federated.lockstep import Lockstep
from weightshare.federated.samples import Samples
from weightshare.federated.simulation import Simulation, simulate

RULES = (
    "robust", "robust+root", "examined", "reputation", "reference", "cgsv", "fedavg", "median",
    "krum", "multi_krum", "geometric_median", "foolsgold", "fltrust",
)  # fmt: skip
PARTITIONS = ("uniform", "power", "classes", "dirichlet")
INDEPENDENT = ("free_rider", "sign_randomise", "rescale", "value_invert", "sign_flip")
ATTACKS = ("label_flip", *INDEPENDENT, "inner_product", "alie", "identical")
CELLS = [
    *((partition, "none", 0) for partition in PARTITIONS),
    *(("uniform", attack, count) for attack in ATTACKS for count in (2, 11)),
    ("uniform", "alie", 4),
    ("uniform", "identical", 7),
    ("uniform", "count_lie", 2),
]
SIZES = {"digits": (0, 64), "movie_reviews": (6000, 16)}
"""Training samples and width by data set."""
OTHERWISE = (6000, 64)
IMAGES = (6060, 1500)
"""Training and test images of MNIST's files that take part, drawn once for all rows."""


def name_of(cell: tuple[str, str, int]) -> str:
    """A row's name."""
    partition, attack, count = cell
    return f"clean, {partition}" if attack == "none" else f"{attack.replace('_', '-')}, {count}"


Known = dict[tuple[str, int, str], list[dict[str, float]]]
"""Accuracies alone by partition, adversaries and first rule, seed by seed: no attack moves them."""


def row(
    cell: tuple[str, str, int], options: argparse.Namespace, rounds: int, known: Known | None = None
) -> dict:
    """All rules and seeds of one cell; what is ``known`` of training alone is not done again."""
    partition, attack, count = cell
    samples, hidden = SIZES.get(options.data, OTHERWISE)
    lockstep = Lockstep(options.device, not options.eager)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    data = some_of(load_samples(options.data))
    federations: dict[tuple[str, int], Simulation] = {}
    for seed in seeds:
        for rule in options.rules.split(","):
            config = FederateConfig(
                options.data,
                partition=partition,
                attack=attack,
                adversaries=count,
                strategy=rule.split("+")[0],
                rounds=rounds,
                samples=samples,
                hidden=hidden,
                root_samples=options.root if rule in ("robust+root", "examined", "fltrust") else 0,
                seed=seed,
                device=options.device,
            )
            federations[rule, seed] = simulate(
                config, training=lockstep.training, samples=data, as_bytes=False
            )
    first = options.rules.split(",")[0]
    known = {} if known is None else known
    key = (partition, count, first)
    jobs = [] if key in known else [federations[first, seed].alone for seed in seeds]
    found = lockstep.run([*jobs, *(federation.run for federation in federations.values())])
    known.setdefault(key, found[: len(jobs)])
    alone = dict(zip(map(str, seeds), known[key], strict=True))
    return {
        "alone": {seed: float(np.mean(list(found.values()))) for seed, found in alone.items()},
        "rules": {
            rule: {str(s): outcome(federations[rule, s], alone[str(s)]) for s in seeds}
            for rule in options.rules.split(",")
        },
    }


def some_of(samples: Samples) -> Samples:
    """Of images as many as ``IMAGES`` says, in their order; texts and digits whole."""
    if samples.train.ndim == 2 or len(samples.train) <= IMAGES[0]:
        return samples
    train, test = (
        np.sort(np.random.default_rng(0).permutation(len(labels))[:count])
        for labels, count in zip((samples.train_labels, samples.test_labels), IMAGES, strict=True)
    )
    return Samples(
        samples.train[train], samples.train_labels[train],
        samples.test[test], samples.test_labels[test],
    )  # fmt: skip


def merged(one: dict, other: dict) -> dict:
    """A row of which two files have some rules or seeds each; ``one`` decides on what both have."""
    rules = [rule for rule in RULES if rule in one["rules"] or rule in other["rules"]]
    return {
        "alone": other["alone"] | one["alone"],
        "rules": {r: other["rules"].get(r, {}) | one["rules"].get(r, {}) for r in rules},
        "seconds": max(one.get("seconds", 0), other.get("seconds", 0)),
    }


def outcome(here: Simulation, alone: dict[str, float]) -> dict:
    """One federation."""
    found = here.accuracies()
    good = [found[name]["accuracy"] for name in here.honest]
    bad = [found[name]["accuracy"] for name in here.adversaries]
    base = [alone[name] for name in here.honest]
    rules = here.reputation
    removed = rules.removed if rules else set()
    best = max(here.honest, key=lambda name: found[name]["accuracy"])
    fair = fairness(base, good).value
    result = {
        "mean": float(np.mean(good)),
        "best": max(good),
        "min": min(good),
        "gain": float(np.mean(good) - np.mean(base)),
        "least_gain": min(g - b for g, b in zip(good, base, strict=True)),
        "fairness": fair if isfinite(fair) else None,
        "adversary": max(bad, default=None),
        "removed_adversaries": sum(name in here.adversaries for name in removed),
        "removed_honest": sum(name in here.honest for name in removed),
        "flip_success": found[best]["success"],
    }
    result["passes"] = bool(
        result["removed_honest"] == 0
        and result["gain"] >= 0.05
        and (result["adversary"] is None or result["adversary"] <= np.mean(base))
    )
    return result


def summaries(rows: dict[str, dict]) -> dict[str, dict]:
    """What pages show: text by row and rule."""
    tables: dict[str, dict] = {"accuracy": {}, "adversaries": {}, "fairness": {}, "passes": {}}
    cells: dict[str, list[tuple[float, bool]]] = {}
    for name, figures in rows.items():
        alone = spread(list(figures["alone"].values()))
        tables["accuracy"][name] = {"alone": interval(alone)}
        for rule, runs in figures["rules"].items():
            each = [run for _, run in sorted(runs.items())]
            out = " ".join(f"{r['removed_adversaries']}/{r['removed_honest']}" for r in each)
            keeps_score = any(r["removed_adversaries"] + r["removed_honest"] for r in each)
            text = interval(spread([run["mean"] for run in each]))
            tables["accuracy"].setdefault(name, {})[rule] = text
            if name.startswith("clean"):
                fair = [r["fairness"] for r in each if r["fairness"] is not None]
                text = f"{np.mean(fair):.0f}" if fair else "undefined"
                gain, least = (np.mean([r[k] for r in each]) for k in ("gain", "least_gain"))
                lost = f"; removed {out}" if keeps_score else ""
                tables["fairness"].setdefault(name, {})[rule] = (
                    f"{text} ({gain:+.3f}, {least:+.3f}{lost})"
                )
                continue
            text = f"{max(r['adversary'] for r in each):.2f}"
            tables["adversaries"].setdefault(name, {})[rule] = (
                f"{text} ({out})" if keeps_score else text
            )
            won = sum(run["passes"] for run in each)
            tables["passes"].setdefault(name, {})[rule] = f"{won}/{len(each)}"
            cells.setdefault(rule, []).append((won / len(each), all(map(held, each))))
    counts = {
        "passed on every seed": lambda won, _: won == 1,
        "passed on some seeds": lambda won, _: 0 < won < 1,
        "passed but for the gain": lambda _, kept: kept,
        "run": lambda *_: True,
    }
    tables["cells"] = {
        rule: {what: sum(test(*cell) for cell in found) for what, test in counts.items()}
        for rule, found in cells.items()
    }
    return tables


def held(run: dict) -> bool:
    """Nobody honest removed, a gain whatever its size, no adversary above training alone."""
    alone = run["mean"] - run["gain"]
    return not run["removed_honest"] and run["gain"] > 0 and run["adversary"] <= alone + 1e-9


def interval(found: dict[str, float]) -> str:
    """``.957 ± .004``: mean and half width of the 95 % interval."""
    half = found["half_width"]
    width = f" ± {half:.3f}".replace("0.", ".") if isfinite(half) else ""
    return f"{found['mean']:.3f}".replace("0.", ".") + width


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--rules", default=",".join(RULES), help="only these, with commas")
    parser.add_argument("--device", default="cpu", help="where participants are trained")
    parser.add_argument("--root", type=int, default=50, help="trusted samples at the server")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    table = Table(lambda o: f"federated_attacks_{o.data}", __doc__, parser)
    options = table.options
    parts = [json.loads(file.read_text(encoding="utf-8")) for file in options.join]
    for part in parts:
        for name, found in part["rows"].items():
            table.rows[name] = merged(table.rows[name], found)
    torch.set_num_threads(1)
    rounds, cells = 25, CELLS
    if table.quick:
        rounds, cells, options.seeds = 4, [CELLS[0], ("uniform", "sign_flip", 2)], 1
    samples, hidden = SIZES.get(options.data, OTHERWISE)
    setting = {"data": options.data, "rounds": rounds, "honest": 10, "root_samples": options.root,
               "samples": samples, "hidden": hidden}  # fmt: skip
    table.facts = {"flwr": flwr.__version__, "setting": setting, "trained_on": options.device}
    known: Known = {}
    for cell in cells:
        table.row(name_of(cell), lambda cell=cell: row(cell, options, rounds, known))
    order = [name_of(cell) for cell in CELLS]
    table.rows = {name: table.rows[name] for name in order if name in table.rows}
    table.facts |= summaries(table.rows)
    if options.join:
        # Rows that were computed elsewhere keep the places where they were.
        for key in ("device", "torch", "python", "trained_on"):
            table.facts[key] = " and ".join(
                sorted({p for part in parts for p in part[key].split(" and ")})
            )
        start = f" --first-seed {options.first_seed}" if options.first_seed else ""
        command = f"python benchmarks/federated/attacks.py --data {options.data}{start}"
        table.facts |= {"command": command}
    table.write()
    for title in ("accuracy", "adversaries", "fairness", "passes", "cells"):
        print(f"\n{title}")
        for name, texts in table.facts[title].items():
            print(f"{name:20s}", texts)


if __name__ == "__main__":
    main()
