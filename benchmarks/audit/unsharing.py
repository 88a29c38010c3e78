"""Does the audit name what is worth unsharing? On folded language models, at equal budget.

For each model, fold and seed: fold, audit, spend one parameter budget (a share of what the fold
saved) in different ways, train all weights for the same steps on the same batches. Held-out loss
decides. With ``--moment cured`` the fold is first trained until its shared weights have settled.

    audit (adam)        most predicted gain within the budget, in Adam's metric
    audit (plain)       the same in the plain metric
    lowest cosine       low-rank deltas where uses agree least
    random              tensors, kinds and groups at random
    first / last        low-rank deltas from the first (last) tensors on
    everywhere          low-rank deltas of one rank on every tensor
    nothing             the shared weights alone

The honesty clause follows: suggested and random unsharings one at a time, predicted against
realised gain, with the rank correlation over all of them.

    python benchmarks/audit/unsharing.py [--quick] [--moment folded|cured] [--device cuda --jobs 9]

Models and texts are found through WEIGHTSHARE_MODELS and WEIGHTSHARE_DATA; without them ``--quick``
takes the model and the text that ship.
"""

import argparse
import copy
import json
import os
import random
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from _table import spread

from weightshare.audit import ProbeConfig, Unsharing, apply, audit, probe, spend
from weightshare.audit.honesty import Trial, _Cycle, _MeanLoss, summarise
from weightshare.audit.language import language_loss, text_batches
from weightshare.audit.suggest import found_groups, predict
from weightshare.cli.console import show_table
from weightshare.folding import FoldPlan, fold
from weightshare.language import load_model, read_documents, windows
from weightshare.report.environment import environment
from weightshare.sharing import size
from weightshare.training import GradientUpdate, Loop, LoopConfig

RESULTS = Path(__file__).parents[1] / "results"
CASES = [
    # model, text, plan: two pairs; one group of three
    ("stories260K", "tinystories/v2_train.jsonl.gz", ((1, 2), (3, 4))),
    ("babyllama105", "tinystories/v2_train.jsonl.gz", ((1, 2), (3, 4))),
    ("stories260K", "tinystories/v2_train.jsonl.gz", ((1, 2, 3),)),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one case, one seed, few steps")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--moment", choices=("folded", "cured"), default="folded")
    parser.add_argument("--cases", type=int, default=len(CASES), help="only the first so many")
    parser.add_argument("--jobs", type=int, default=1, help="rows computed side by side")
    parser.add_argument("--seconds", type=float, default=1500, help="start no new row after this")
    parser.add_argument("--budget", type=float, default=0.1, help="share of the saved parameters")
    options = parser.parse_args()
    steps = QUICK if options.quick else STEPS
    seeds = [0] if options.quick else [0, 1, 2]
    settings = {"steps": steps, "seeds": seeds, "budget": options.budget, "moment": options.moment}
    cases = CASES[: options.cases]
    if options.quick:
        known = {"WEIGHTSHARE_MODELS", "WEIGHTSHARE_DATA"} <= os.environ.keys()
        cases = CASES[:1] if known else [("tiny", "pystdlib", ((3, 4),))]
    jobs = [(*case, seed, steps, options) for seed in seeds for case in cases]
    results, began = [], time.monotonic()
    folder = Path(tempfile.mkdtemp()) if options.quick else RESULTS
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        waiting = [pool.submit(one, *job) for job in jobs]
        for done in as_completed(waiting):
            results.append(done.result())
            results.sort(key=lambda r: (r[0]["model"], str(r[0]["groups"]), r[0]["seed"]))
            content = write(
                results, settings | {"seconds": round(time.monotonic() - began)}, folder
            )
            print(json.dumps(results[-1][0]["loss"]), flush=True)
            if time.monotonic() - began > options.seconds:
                pool.shutdown(cancel_futures=True)
                break
    report(content)


STEPS = {"cure": 400, "spend": 250, "probe": 40}
QUICK = {"cure": 20, "spend": 10, "probe": 5}
RANKS = (1, 2, 4, 8, 16)


def one(name, text, groups, seed, steps, options):
    """One model, fold and seed."""
    torch.set_num_threads(1)
    device = torch.device(options.device)
    source = load_model(name, device=device)
    documents = read_documents(text)
    cut = len(documents) * 4 // 5
    few, length, size_of = (30, 64, 4) if options.quick else (cut, 128, 16)
    ranks = (8,) if options.quick else RANKS
    train = windows(source.tokenizer, documents[:few], length)
    train = text_batches(train, len(train) // size_of, size_of, device)
    heldout = windows(source.tokenizer, documents[cut:][:few], length)
    heldout = text_batches(heldout, 12, size_of, device)
    random.Random(seed).shuffle(train)
    audited = train[: 8 if options.quick else 32]

    model = fold(source.model, FoldPlan(source.model.config.num_hidden_layers, groups=groups))
    row = {"model": name, "groups": groups, "seed": seed, "dense": held(source.model, heldout)}
    row["folded"] = held(model, heldout)
    if options.moment == "cured":
        fit(model, train, steps["cure"], seed)
        row["cured"] = held(model, heldout)

    found = audit(model, audited, language_loss, per="tensor", seed=seed, suggestions=False)
    row["agreement"] = {f.layer.name: round(f.agreement, 3) for f in found.findings}
    row["advised"] = [f.layer.name for f in found.findings if f.split.advised]
    offers = [
        Unsharing(kind, f.layer, groups_of, rank)
        for f in found.findings
        if (groups_of := found_groups(f)) is not None
        for kind, rank in [("scale", 0), ("unshare", 0), *(("low_rank", r) for r in ranks)]
    ]
    adam, plain = (
        predict(model, audited, language_loss, offers, metric=metric) for metric in METRICS
    )
    saved = size(model).saved - model.get_input_embeddings().weight.numel()
    budget = int(options.budget * saved)
    row |= {"saved": saved, "budget": budget, "loss": {}, "added": {}}
    for strategy, chosen in strategies(model, found, adam, plain, budget, seed).items():
        student = copy.deepcopy(model)
        for unsharing in chosen:
            apply(student, unsharing, seed=seed)
        row["added"][strategy] = size(student).unique - size(model).unique
        fit(student, train, steps["spend"], seed)
        row["loss"][strategy] = held(student, heldout)

    config = ProbeConfig(
        suggested=4 if options.quick else 6,
        random=4 if options.quick else 10,
        steps=steps["probe"],
        seed=seed,
    )
    best = sorted(adam, key=lambda s: -s.gain_per_parameter)
    best = [s for s in best if s.unsharing.rank in (0, ranks[len(ranks) // 2])]
    tried = probe(
        model, audited, heldout, language_loss, replace(found, suggestions=best), config
    ).trials
    flat = predict(
        model, audited, language_loss, [t.suggestion.unsharing for t in tried], metric="plain"
    )
    row["correlation"] = {
        "adam": correlation(tried),
        "plain": correlation(
            [Trial(s, t.origin, t.realised) for s, t in zip(flat, tried, strict=True)]
        ),
    }
    return row, tried


METRICS = ("adam", "plain")


def strategies(model, found, adam, plain, budget, seed):
    """Ways to spend the budget: lists of unsharings of distinct tensors of the blocks."""
    adam = [s for s in adam if "layers" in s.unsharing.layer.name]
    plain = [s for s in plain if "layers" in s.unsharing.layer.name]
    offers = [s.unsharing for s in adam]

    def deltas(layers, rank):
        return [
            u
            for x in layers
            for u in offers
            if u.layer == x and (u.kind, u.rank) == ("low_rank", rank)
        ]

    disagreeing = [f.layer for f in found.findings if "layers" in f.layer.name]
    by_depth = sorted(disagreeing, key=lambda layer: layer.name)
    shuffled = random.Random(seed).sample(offers, len(offers))
    everywhere = [
        deltas(by_depth, rank)
        for rank in RANKS
        if sum(u.added(model) for u in deltas(by_depth, rank)) <= budget
    ]
    return {
        "nothing": [],
        "audit (adam)": spend(adam, budget),
        "audit (plain)": spend(plain, budget),
        "lowest cosine": fill(model, deltas(disagreeing, 8), budget),
        "random": fill(model, shuffled, budget),
        "first": fill(model, deltas(by_depth, 8), budget),
        "last": fill(model, deltas(by_depth[::-1], 8), budget),
        "everywhere": everywhere[-1] if everywhere else [],
    }


def fill(model, unsharings, budget):
    """Take unsharings in order while they fit, each tensor once."""
    chosen, left, taken = [], budget, set()
    for unsharing in unsharings:
        cost = unsharing.added(model)
        if unsharing.layer not in taken and "layers" in unsharing.layer.name and cost <= left:
            chosen.append(unsharing)
            taken.add(unsharing.layer)
            left -= cost
    return chosen


def fit(model, batches, steps, seed):
    config = LoopConfig(steps=steps, learning_rate=1e-3, weight_decay=0.0, seed=seed)
    update = GradientUpdate.from_config(_MeanLoss(model, language_loss), config)
    Loop(update, _Cycle(batches), config, progress=False).fit()
    model.eval()


@torch.no_grad()
def held(model, batches):
    return sum(float(language_loss(model, batch)) for batch in batches) / len(batches)


def correlation(trials):
    found = summarise(trials)
    return {
        "rho": found.correlation,
        "low": found.low,
        "high": found.high,
        "per_parameter": found.per_parameter,
        "suggested_gain": found.mean_gain("suggested"),
        "random_gain": found.mean_gain("random"),
        "suggested_per_million": 1e6 * found.mean_gain("suggested", True),
        "random_per_million": 1e6 * found.mean_gain("random", True),
    }


def spent(rows):
    """Held-out loss that one budget bought, over seeds."""
    table = []
    for case in dict.fromkeys((row["model"], str(row["groups"])) for row in rows):
        mine = [row for row in rows if (row["model"], str(row["groups"])) == case]
        for strategy in mine[0]["loss"]:
            if strategy == "nothing":
                continue
            bought = spread([row["loss"]["nothing"] - row["loss"][strategy] for row in mine])
            added = statistics.mean(row["added"][strategy] for row in mine)
            table.append(
                {
                    "spent on": f"{case[0]}, {case[1]}: {strategy}",
                    "added": int(added),
                    "gain": bought["mean"],
                    "half_width": bought["half_width"],
                    "gain_per_million": 1e6 * bought["mean"] / added if added else None,
                    "seeds": len(mine),
                }
            )
    return table


def clause(rows):
    """Rank correlation of predicted and realised gain, per row and metric."""
    return [
        {
            "trials": f"{row['model']}, {row['groups']}, seed {row['seed']}: {metric}",
            "rho": c["rho"],
            "low": c["low"],
            "high": c["high"],
            "rho_per_parameter": c["per_parameter"],
        }
        for row in rows
        for metric, c in row["correlation"].items()
    ]


def write(results, settings, folder):
    rows = [row for row, _ in results]
    pooled = correlation([t for _, tried in results for t in tried])
    everywhere = {
        "trials": "all together: adam",
        "rho": pooled["rho"],
        "low": pooled["low"],
        "high": pooled["high"],
        "rho_per_parameter": pooled["per_parameter"],
    }
    here = environment()
    content = {
        "command": " ".join(["python", "benchmarks/audit/unsharing.py", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "settings": settings,
        "spent": spent(rows),
        "clause": [*clause(rows), everywhere],
        "rows": rows,
        "trials": [
            {"model": row["model"], "groups": row["groups"], "seed": row["seed"], **t.row()}
            for row, tried in results
            for t in tried
        ],
        "environment": here,
    }
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"audit_unsharing_{settings['moment']}.json"
    file.write_text(json.dumps(content, indent=1) + "\n")
    return content


def report(content):
    for part, title in (
        ("spent", "held-out loss bought at one budget"),
        ("clause", "predicted against realised gain"),
    ):
        rounded = [
            {k: float(f"{v:.3g}") if isinstance(v, float) else v for k, v in row.items()}
            for row in content[part]
        ]
        show_table(title, rounded)


if __name__ == "__main__":
    main()
