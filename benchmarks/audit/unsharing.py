"""Does the audit name what is worth unsharing? On folded language models, at equal budget.

For each model, fold, moment and seed: fold, audit, spend one parameter budget (a share of what the
fold saved) in different ways, train all weights for the same steps on the same batches. Held-out
loss decides. At the moment *folded* the audit comes right after folding; at *cured* the shared
weights have been trained before until they settled.

    audit (adam)        most predicted gain within the budget, in Adam's metric
    audit (plain)       the same in the plain metric
    lowest cosine       low-rank deltas where uses agree least
    random              tensors, kinds and groups at random
    first / last        low-rank deltas from the first (last) tensors on, of a rank with which all
                        of them would cost three budgets
    everywhere          low-rank deltas of one rank on every tensor
    nothing             the shared weights alone

The honesty clause follows: suggested and random unsharings one at a time, predicted against
realised gain, with the rank correlation, and beside it that of the number of added parameters.

    python benchmarks/audit/unsharing.py [--quick] [--device cuda --capture] [--only tiny]

Rows take 1 to 5 minutes each; ``--part i/n --out FILE`` and ``--join`` split them over processes.
Models and texts are found through WEIGHTSHARE_MODELS and WEIGHTSHARE_DATA (``--only tiny`` needs
neither); ``--quick`` takes the model and the text that ship.
"""

import argparse
import copy
import math
import random
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from _table import Table, spread

from weightshare.audit import ProbeConfig, Suggestion, Unsharing, apply, audit, probe, spend
from weightshare.audit.honesty import _Cycle, _MeanLoss, rank_correlation
from weightshare.audit.language import language_loss, text_batches
from weightshare.audit.suggest import found_groups, predict
from weightshare.cli.console import show_table
from weightshare.folding import FoldPlan, fold
from weightshare.language import load_model, read_documents, windows
from weightshare.sharing import size
from weightshare.training import Captured, GradientUpdate, Loop, LoopConfig

STORIES = "tinystories/v2_train.jsonl.gz"
CASES = [
    # model, text, groups of blocks: what the fold saves of the blocks is in the row
    ("tiny", "pystdlib", ((2, 3, 4, 5), (6, 7, 8, 9))),
    ("tiny", "pystdlib", ((2, 3), (5, 6), (8, 9))),
    ("tiny", "pystdlib", ((2, 3, 4, 5, 6, 7, 8, 9, 10),)),
    ("stories260K", STORIES, ((1, 2), (3, 4))),
    ("stories260K", STORIES, ((1, 2, 3),)),
    ("babyllama105", STORIES, ((1, 2), (3, 4))),
]
MOMENTS = ("folded", "cured")
SEEDS = (0, 1, 2)
STEPS = {"cure": 400, "spend": 150, "probe": 30}
QUICK = {"cure": 10, "spend": 5, "probe": 3}
RANKS = (2, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="", help="models whose name begins so")
    parser.add_argument("--moment", choices=(*MOMENTS, "both"), default="both")
    parser.add_argument("--budget", type=float, default=0.1, help="share of the saved parameters")
    parser.add_argument("--ways", default="", help="only these ways to spend, comma separated")
    parser.add_argument("--capture", action="store_true", help="training steps as CUDA graphs")
    table = Table("audit_unsharing", __doc__, parser)
    options = table.options
    torch.set_num_threads(1)
    steps = QUICK if table.quick else STEPS
    table.facts["settings"] = {"steps": steps, "budget": options.budget, "ranks": RANKS}
    cases = [case for case in CASES if case[0].startswith(options.only)]
    if table.quick:
        cases = [("tiny", "pystdlib", ((3, 4),))]
    moments = MOMENTS if options.moment == "both" else (options.moment,)
    for name, text, groups in cases:
        for moment in moments:
            for seed in SEEDS[:1] if table.quick else SEEDS:
                ways = f", {options.ways} on {options.device}" if options.ways else ""
                table.row(
                    f"{name}, {[list(group) for group in groups]}, {moment}, seed {seed}{ways}",
                    lambda c=(name, text, groups, moment, seed): one(*c, steps, options),
                )
                if table.rows:
                    table.facts |= summary(table.rows)
                    table.write()
    for part, title in (("spent", "bought at one budget"), ("clause", "predicted and realised")):
        if rows := table.facts.get(part):
            show_table(title, [{k: _short(v) for k, v in row.items()} for row in rows])
    if table.left_out:
        print("not run for lack of time:", "; ".join(table.left_out))


def one(name, text, groups, moment, seed, steps, options):
    """One model, fold, moment and seed."""
    device = torch.device(options.device)
    # Stored in bfloat16, steps of training would vanish in the weights.
    source = load_model(name, dtype="fp32", device=device)
    documents = read_documents(text)
    cut = len(documents) * 4 // 5
    few, length, size_of = (30, 64, 4) if options.quick else (cut, 128, 8)
    train = windows(source.tokenizer, documents[:few], length)
    train = text_batches(train, len(train) // size_of, size_of, device)
    heldout = windows(source.tokenizer, documents[cut:][:few], length)
    heldout = text_batches(heldout, 4 if options.quick else 16, size_of, device)
    random.Random(seed).shuffle(train)
    audited = train[: 4 if options.quick else 32]

    model = fold(source.model, FoldPlan(source.model.config.num_hidden_layers, groups=groups))
    row = {"model": name, "groups": groups, "moment": moment, "seed": seed}
    row["device"] = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    row["torch"] = torch.__version__
    row |= {"dense": held(source.model, heldout), "start": held(model, heldout)}
    if moment == "cured":
        fit(model, train, steps["cure"], seed, options.capture)
        row["start"] = held(model, heldout)

    found = audit(
        model, audited, language_loss, per="tensor", seed=seed, suggestions=False, draws=50
    )
    row["agreement"] = {f.layer.name: round(f.agreement, 3) for f in found.findings}
    row["advised"] = [f.layer.name for f in found.findings if f.split.advised]
    saved = size(model).saved - model.get_input_embeddings().weight.numel()
    budget = int(options.budget * saved)
    row |= {"saved": saved, "budget": budget, "loss": {}, "added": {}, "trials": []}
    offers = [
        Unsharing(kind, f.layer, groups_of, rank)
        for f in found.findings
        if (groups_of := found_groups(f)) is not None
        for kind, rank in [("scale", 0), ("unshare", 0), *(("low_rank", r) for r in RANKS)]
    ]
    if options.quick:
        offers = offers[:8]
    ways = options.ways.split(",") if options.ways else []
    adam, plain = (
        predict(model, audited, language_loss, offers, metric=metric, bends=1)
        if not ways or f"audit ({metric})" in ways
        else [Suggestion(offer, added=offer.added(model)) for offer in offers]
        for metric in METRICS
    )
    for strategy, chosen in strategies(model, found, adam, plain, budget, seed).items():
        if ways and strategy not in ways:
            continue
        student = copy.deepcopy(model)
        for unsharing in chosen:
            apply(student, unsharing, seed=seed)
        row["added"][strategy] = size(student).unique - size(model).unique
        fit(student, train, steps["spend"], seed, options.capture)
        row["loss"][strategy] = held(student, heldout)

    if ways:
        return row | {"moment": f"{moment}, on {options.device}"}
    config = ProbeConfig(
        suggested=2 if options.quick else 6,
        random=2 if options.quick else 10,
        steps=steps["probe"],
        seed=seed,
    )
    best = sorted(adam, key=lambda s: -s.gain_per_parameter)
    best = [s for s in best if s.unsharing.rank in (0, RANKS[-1])]
    tried = probe(
        model, audited, heldout, language_loss, replace(found, suggestions=best), config
    ).trials
    flat = predict(
        model, audited, language_loss, [t.suggestion.unsharing for t in tried], metric="plain"
    )
    row["trials"] = [
        t.row() | {"adam": t.suggestion.predicted, "plain": s.predicted, "gain": t.realised}
        for t, s in zip(tried, flat, strict=True)
    ]
    return row


METRICS = ("adam", "plain")


def strategies(model, found, adam, plain, budget, seed):
    """Ways to spend the budget: lists of unsharings of distinct tensors of the blocks."""
    adam = [s for s in adam if "layers" in s.unsharing.layer.name]
    plain = [s for s in plain if "layers" in s.unsharing.layer.name]
    offers = [s.unsharing for s in adam]

    def deltas(layers, rank):
        wanted = {u.layer: u for u in offers if (u.kind, u.rank) == ("low_rank", rank)}
        return [wanted[layer] for layer in layers if layer in wanted]

    disagreeing = [f.layer for f in found.findings if "layers" in f.layer.name]
    by_depth = sorted(disagreeing, key=lambda layer: layer.name)

    def every(rank):
        return [replace(u, rank=rank) for u in deltas(by_depth, RANKS[0])]

    fitting = max((r for r in range(1, 65) if cost_of(model, every(r)) <= budget), default=1)
    large = next((r for r in range(1, 65) if cost_of(model, every(r)) >= 3 * budget), 64)
    in_order = {u.layer: u for u in every(large)}
    return {
        "nothing": [],
        "audit (adam)": spend(adam, budget),
        "audit (plain)": spend(plain, budget),
        "lowest cosine": fill(model, [in_order[x] for x in disagreeing if x in in_order], budget),
        "random": at_random(model, offers, budget, seed),
        "first": fill(model, [in_order[x] for x in by_depth if x in in_order], budget),
        "last": fill(model, [in_order[x] for x in by_depth[::-1] if x in in_order], budget),
        "everywhere": every(fitting),
    }


def at_random(model, unsharings, budget, seed):
    """A random choice that spends nine tenths of the budget; of a thousand, else the dearest."""
    generator, best = random.Random(seed), []
    for _ in range(1000):
        chosen = fill(model, generator.sample(unsharings, len(unsharings)), budget)
        if cost_of(model, chosen) > cost_of(model, best):
            best = chosen
        if cost_of(model, best) >= 0.9 * budget:
            break
    return best


def cost_of(model, unsharings):
    return sum(unsharing.added(model) for unsharing in unsharings)


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


def fit(model, batches, steps, seed, capture=False):
    config = LoopConfig(steps=steps, learning_rate=1e-3, weight_decay=0.0, seed=seed)
    update = GradientUpdate.from_config(_MeanLoss(model, language_loss), config)
    update = Captured(update) if capture else update
    Loop(update, _Cycle(batches), config, progress=False).fit()
    model.eval()


@torch.no_grad()
def held(model, batches):
    return sum(float(language_loss(model, batch)) for batch in batches) / len(batches)


def summary(rows):
    """The tables, and where the rows came from, which may be other machines than the last."""
    facts = {
        name: " and ".join(sorted({str(row[name]) for row in rows.values()}))
        for name in ("device", "torch")
    }
    return facts | {"spent": spent(rows), "clause": clause(rows)}


def by_case(rows):
    """The rows of each (model, fold, moment)."""
    found = {}
    for row in rows.values():
        groups = [list(group) for group in row["groups"]]
        found.setdefault(f"{row['model']}, {groups}, {row['moment']}", []).append(row)
    return found


def spent(rows):
    """Held-out loss that one budget bought, over seeds, and paired with the random choice."""
    table = []
    for case, mine in by_case(rows).items():
        for strategy in mine[0]["loss"]:
            if strategy == "nothing":
                continue
            gains = [row["loss"]["nothing"] - row["loss"][strategy] for row in mine]
            over = [
                r["loss"]["random"] - r["loss"][strategy] for r in mine if "random" in r["loss"]
            ]
            bought, better = spread(gains), spread(over or [math.nan])
            added = statistics.mean(row["added"][strategy] for row in mine)
            table.append(
                {
                    "spent on": f"{case}: {strategy}",
                    "added": int(added),
                    "gain": bought["mean"],
                    "half_width": bought["half_width"],
                    "over_random": better["mean"],
                    "its_half_width": better["half_width"],
                    "gain_per_million": 1e6 * bought["mean"] / added if added else None,
                    "seeds": len(mine),
                }
            )
    return table


def clause(rows):
    """Rank correlation of predicted and realised gain inside each row, averaged over seeds.

    The interval is a bootstrap over trials, resampled inside each row.
    """
    table = []
    tried = {name: row for name, row in rows.items() if row["trials"]}
    cases = by_case(tried)
    for moment in MOMENTS:
        together = [row for row in tried.values() if row["moment"] == moment]
        if together:
            cases[f"all, {moment}"] = together
    for case, mine in cases.items():
        predictors = {
            "predicted (adam)": lambda t: t["adam"],
            "predicted (plain)": lambda t: t["plain"],
            "added parameters": lambda t: t["added"],
        }
        for name, predictor in predictors.items():
            pairs = [[(predictor(t), t["gain"]) for t in row["trials"]] for row in mine]
            each = [
                [
                    (predictor(t) / max(1, t["added"]), t["gain"] / max(1, t["added"]))
                    for t in trials
                ]
                for trials in (row["trials"] for row in mine)
            ]
            rho, low, high = rank_correlation(pairs)
            table.append(
                {
                    "trials": f"{case}: {name}",
                    "count": sum(map(len, pairs)),
                    "rho": rho,
                    "low": low,
                    "high": high,
                    "rho_per_parameter": rank_correlation(each)[0]
                    if name != "added parameters"
                    else None,
                }
            )
    return table


def _short(value):
    return float(f"{value:.3g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
