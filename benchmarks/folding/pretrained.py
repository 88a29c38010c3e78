"""Folding a pretrained language model: what each ranking costs, and what a short cure brings back.

    python benchmarks/folding/pretrained.py --model FOLDER --text FILE --heldout FILE [--quick]

Held-out loss in nats per token, after removing a tenth and a fifth of the blocks by each ranking
(no cure), and after a cure of the greedy fold, of sharing, and of both at equal unique parameters;
beside them the original model, tuned for as many steps on the same text.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from _table import Table, spread
from curing import target

from weightshare.folding import CureConfig, FoldPlan, cure, fold, plan, rank
from weightshare.folding.blocks import BlockLosses
from weightshare.language import evaluate, load_model, read_documents, windows

RANKINGS = ("block_influence", "angular", "one_shot", "greedy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--text", default="pystdlib", help="calibration and cure")
    parser.add_argument("--heldout", default="pystdlib")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    table = Table("folding_pretrained", __doc__, parser)
    options = table.options
    steps, seeds = (3, 1) if table.quick else (options.steps, options.seeds)
    length = 64 if table.quick else options.length
    source = load_model(options.model, dtype="bf16", device=options.device)
    model = source.model
    text = windows(source.tokenizer, read_documents(options.text), length)
    count = 4 if table.quick else 16
    calibration, train = text.input_ids[:count], text[count:]
    heldout = windows(
        source.tokenizer, read_documents(options.heldout), length, limit=8 if table.quick else 96
    )
    watched, judged = heldout[: len(heldout) // 6], heldout[len(heldout) // 6 :]
    blocks = len(model.model.layers)
    few, many = round(blocks / 10), round(blocks / 5)
    table.facts = {
        "model": Path(options.model).name,
        "blocks": blocks,
        "length": length,
        "steps": steps,
        "learning_rate": options.rate,
        "batch": options.batch,
        "calibration_sequences": count,
        "heldout_sequences": len(judged),
    }
    table.row("dense", lambda: {"loss": evaluate(model, judged, 8).loss})

    def removing(chosen: list[int]) -> float:
        return evaluate(fold(model, FoldPlan(blocks, tuple(sorted(chosen)))), judged, 8).loss

    orders: dict[str, tuple[int, ...]] = {}

    def order(method: str) -> dict[str, object]:
        found = rank(model, calibration, method, remove=many)
        return {"order": list(found.order[:many]), "block_runs": found.metadata["block_runs"]}

    for method in RANKINGS:
        row = table.row(f"ranking {method}", lambda m=method: order(m))
        if row:
            orders[method] = tuple(row["order"])
    orders["the last"] = tuple(range(blocks - 1, blocks - 1 - many, -1))
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        orders[f"random {seed}"] = tuple(torch.randperm(blocks, generator=generator).tolist())
    for method, chosen in orders.items():
        for number in (few, many):
            table.row(
                f"remove {number} by {method}",
                lambda c=chosen, n=number: {"loss": removing(list(c[:n])), "removed": list(c[:n])},
            )
    if "greedy" not in orders:
        return
    size = target(model, blocks - many)
    losses = BlockLosses(model, calibration)
    plans = {
        f"remove {many}": plan(model, orders["greedy"], remove=many / blocks),
        f"share {many} pairs": plan(
            model, target_params=size, share=2, grouping="distance", losses=losses
        ),
        f"remove {few}, share {many - few} pairs": plan(
            model, orders["greedy"], remove=few / blocks, target_params=size, share=2,
            grouping="distance", losses=losses,
        ),
    }  # fmt: skip
    # What the same steps do to the model that nothing was taken from: the text itself teaches.
    plans["nothing folded, tuned"] = FoldPlan(blocks)
    cured: dict[str, list[float]] = {}
    for name, made in plans.items():
        for seed in range(seeds):

            def attempt(made: FoldPlan = made, seed: int = seed) -> dict[str, object]:
                torch.manual_seed(seed)
                folded = fold(model, made, calibration)
                before = evaluate(folded, judged, 8).loss
                config = CureConfig(
                    steps=steps,
                    batch_size=min(options.batch, len(train)),
                    learning_rate=options.rate,
                    evaluate_every=max(1, steps // 3),
                    distillation=0.0 if made.is_stock and not made.removed else 1.0,
                    tail=0.0 if made.is_stock and not made.removed else 1.0,
                )
                cure(folded, model, train, watched, config, seed=seed, precision="bf16",
                     progress=False)  # fmt: skip
                return {
                    "before_cure": before,
                    "loss": evaluate(folded, judged, 8).loss,
                    "unique_blocks": made.unique_blocks,
                    "plan": made.to_dict(),
                }

            row = table.row(f"cured, {name}, seed {seed}", attempt)
            if row:
                cured.setdefault(name, []).append(row["loss"])
    table.facts["summary"] = {name: spread(values) for name, values in cured.items()}
    table.write()
    table.show(["before_cure", "loss", "block_runs", "seconds"])


if __name__ == "__main__":
    main()
