"""What folding costs and what a cure brings back, on the model that ships.

    python benchmarks/folding/curing.py [--quick] [--steps 200]

At equal unique parameters and equal cure: removing against sharing against both, every
representative, each part of the loss, what is trained, and the baseline "drop the last blocks, tune
the head and the last three". Held-out loss in nats per token; seeds change the order of the text.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from _table import Table, spread

from weightshare.folding import CureConfig, FoldPlan, cure, fold, plan, rank
from weightshare.folding.curing import CureTask, depths_of
from weightshare.language import evaluate, load_model, read_documents, split_documents, windows
from weightshare.training import EpochBatches, GradientUpdate, Loop, LoopConfig

LEARNING_RATES = (2e-3, 6e-3)
"""Each plan, each choice of what is trained and the baseline take the best of these on one seed,
judged on the watched text. Representatives and parts of the loss take the rate of their plan."""
BOTH = "remove 2, share 2 pairs"
OWN_RATE = ("remove", "share", "train", "drop")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--text", nargs="+", default=["pystdlib"])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    table = Table("folding_curing", __doc__, parser)
    options = table.options
    steps = 10 if table.quick else options.steps
    seeds = range(1 if table.quick else 3)
    source = load_model(options.model, dtype="fp32", device=options.device)
    model = source.model
    documents = [document for path in options.text for document in read_documents(path)]
    splits = split_documents(documents, 0.25, 0.15)
    cut = dict(zip(("calibration", "train"), (splits.calibration, splits.train), strict=True))
    text = {name: windows(source.tokenizer, part, options.length) for name, part in cut.items()}
    heldout = windows(source.tokenizer, splits.heldout, options.length)
    watched, judged = heldout[:8], heldout[8 : 24 if table.quick else 72]
    calibration = text["calibration"].input_ids[:16]
    blocks = len(model.model.layers)
    ranking = rank(model, calibration, "greedy", remove=blocks // 2)
    dense = table.row("dense", lambda: {"loss": evaluate(model, judged, 16).loss})
    assert dense

    def greedy(count: int, **more: object) -> FoldPlan:
        return plan(model, ranking, remove=count / blocks, **more)

    both = greedy(blocks // 6, target_params=target(model, blocks - blocks // 3))
    plans = {
        "remove 4": greedy(blocks // 3),
        "share 4 pairs": plan(model, target_params=target(model, blocks - blocks // 3), share=2),
        BOTH: both,
    }
    base = CureConfig(steps=steps, batch_size=8, evaluate_every=max(1, steps // 5))
    variants: dict[str, tuple[FoldPlan, CureConfig]] = {n: (p, base) for n, p in plans.items()}
    for name in ("last", "best", "mean", "whitened"):
        changed = FoldPlan(blocks, both.removed, both.shared_groups, name)
        variants[f"representative {name}"] = (changed, base)
    parts = {"CE": (1, 0, 0), "KL": (0, 1, 0), "CE + tail": (1, 0, 1), "CE + KL": (1, 1, 0),
             "KL + tail": (0, 1, 1)}  # fmt: skip
    for name, (ce, kl, tail) in parts.items():
        weights = {"cross_entropy": ce, "distillation": kl, "tail": tail}
        config = dataclasses.replace(base, **weights)
        variants[f"loss {name}"] = (both, config)
    for name in ("norms", "lora"):
        variants[f"train {name}"] = (both, dataclasses.replace(base, trainable=name))

    found: dict[str, list[float]] = {}
    for name, (made, config) in variants.items():

        def attempt(seed: int, rate: float, made=made, config=config) -> tuple[float, float, float]:
            torch.manual_seed(seed)
            folded = fold(model, made, calibration)
            uncured = evaluate(folded, judged, 16).loss
            rated = dataclasses.replace(config, learning_rate=rate)
            cure(folded, model, text["train"], watched, rated, seed=seed, progress=False)
            return uncured, evaluate(folded, judged, 16).loss, evaluate(folded, watched, 16).loss

        best_rate(table, name, attempt, seeds, found, unique=lambda made=made: made.unique_blocks)

    def last_three(seed: int, rate: float) -> tuple[float, float, float]:
        removed = range(blocks - blocks // 3, blocks)
        shorter = fold(model, FoldPlan(blocks, removed=tuple(removed)))
        uncured = evaluate(shorter, judged, 16).loss
        tune_tail(shorter, model, text["train"], steps, rate, seed)
        return uncured, evaluate(shorter, judged, 16).loss, evaluate(shorter, watched, 16).loss

    best_rate(table, "drop the last 4, tune head and last 3", last_three, seeds, found)
    table.facts |= {
        "model": options.model, "steps": steps, "blocks": blocks, "dense": dense["loss"],
        "removed_order": ranking.order[: blocks // 2], "both": both.to_dict(),
        "summary": {name: spread(values) for name, values in found.items()},
    }  # fmt: skip
    table.write()
    table.show(["before_cure", "loss", "learning_rate", "seconds"])
    print(f"\n{'variant':<40}{'cured loss':>12}{'±':>10}   (dense {dense['loss']:.4f})")
    for name, one in table.facts["summary"].items():
        print(f"{name:<40}{one['mean']:>12.4f}{one['half_width']:>10.4f}")


def target(model, unique: int) -> int:
    """Unique parameters of a model with that many sets of block weights and all its norms."""
    from weightshare.folding.families import block_sizes

    sizes = block_sizes(model)
    return sizes.other + unique * sizes.shared + sizes.blocks * sizes.private


def best_rate(table, name, attempt, seeds, found, unique=None) -> None:
    """Sweep the learning rate on the first seed, then run the others at the best one."""
    sweep = {}
    rates = LEARNING_RATES[:1] if table.quick else LEARNING_RATES
    if not name.startswith(OWN_RATE):
        rates = (table.facts["rate of the plan"],)
    for rate in rates:

        def one(rate: float = rate) -> dict[str, float]:
            before, after, watched = attempt(0, rate)
            row = {"before_cure": before, "loss": after, "watched": watched, "learning_rate": rate}
            return row | ({"unique_blocks": unique()} if unique else {})

        row = table.row(f"{name}, seed 0, rate {rate:g}", one)
        if row:
            sweep[rate] = row
    if not sweep:
        return
    rate = min(sweep, key=lambda r: sweep[r]["watched"])
    if name == BOTH:
        table.facts["rate of the plan"] = rate
    found.setdefault(name, []).append(sweep[rate]["loss"])
    for seed in list(seeds)[1:]:

        def again(seed: int = seed) -> dict[str, float]:
            before, after, watched = attempt(seed, rate)
            return {"before_cure": before, "loss": after, "watched": watched, "learning_rate": rate}

        row = table.row(f"{name}, seed {seed}", again)
        if row:
            found[name].append(row["loss"])


def tune_tail(student, teacher, train, steps: int, rate: float, seed: int) -> None:
    """Next-token fine-tuning of the head, the final norm and the last three blocks."""
    config = CureConfig(steps=steps, distillation=0.0, tail=0.0)
    task = CureTask(student, teacher, config, depths_of(student, teacher))
    chosen = [*student.model.layers[-3:].parameters(), *student.model.norm.parameters(),
              *student.lm_head.parameters()]  # fmt: skip
    data = {"input_ids": train.input_ids, "mask": train.mask}
    loop = LoopConfig(steps=steps, learning_rate=rate, warmup_fraction=0.05, weight_decay=0.0)
    update = GradientUpdate.from_config(task, loop, chosen)
    Loop(update, EpochBatches(data, 8, seed), loop, progress=False).fit()


if __name__ == "__main__":
    main()
