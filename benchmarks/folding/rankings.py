"""Which blocks to remove: every ranking against the exhaustive optimum, on the model that ships.

    python benchmarks/folding/rankings.py [--quick] [--model tiny] [--remove 3]

Rankings see calibration text only; the table gives the held-out loss before any cure. Regret is the
held-out loss above that of the best of all subsets on the held-out text itself. Seeds change the
calibration text, and what else is random.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from _table import Table, spread

from weightshare.folding import GateConfig, rank
from weightshare.folding.blocks import BlockLosses
from weightshare.folding.search import exhaustive
from weightshare.language import load_model, read_documents, split_documents, windows

METHODS = ["gates", "block_influence", "angular", "one_shot", "greedy", "coupling", "random",
           "exhaustive"]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--text", default="pystdlib")
    parser.add_argument("--remove", type=int, default=3)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    table = Table("folding_rankings", __doc__, parser)
    options = table.options
    seeds = range(1 if table.quick else 3)
    sequences, heldout_windows = (4, 4) if table.quick else (16, 64)
    source = load_model(options.model, dtype="fp32", device=options.device)
    model = source.model
    splits = split_documents(read_documents(options.text), 0.3, 0.4)
    every = windows(source.tokenizer, splits.calibration, options.length).input_ids
    heldout = windows(source.tokenizer, splits.heldout, options.length, limit=heldout_windows)
    judge = BlockLosses(model, heldout.input_ids, 16)
    blocks = judge.blocks
    count = 2 if table.quick else options.remove
    table.facts = {"model": options.model, "blocks": blocks, "removed": count,
                   "calibration_sequences": sequences, "length": options.length}  # fmt: skip

    def optimum() -> dict[str, float]:
        subsets = exhaustive(judge, count)
        ordered = sorted(subsets.values())
        best = min(subsets, key=subsets.__getitem__)
        return {"loss": ordered[0], "median": ordered[len(ordered) // 2], "worst": ordered[-1],
                "subsets": len(ordered), "removed": list(best)}  # fmt: skip

    best = table.row("best subset on the held-out text", optimum)
    dense = table.row("dense", lambda: {"loss": judge.of(list(range(blocks)))})
    assert best and dense
    gates = GateConfig(steps=40, seeds=1, sequences=2) if table.quick else GateConfig(sequences=4)
    losses: dict[str, list[float]] = {}
    for method in METHODS:
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            rows = torch.randperm(len(every), generator=generator)[:sequences]
            known: dict[str, object] = {}

            def memo(key, compute, known=known):
                """So that a ranking is not learnt twice, with and without swaps."""
                if key not in known:
                    known[key] = compute()
                return known[key]

            def attempt(
                method: str, refine: str, seed: int, rows: torch.Tensor
            ) -> dict[str, object]:
                found = rank(model, every[rows], method, remove=count, refine=refine, seed=seed,
                             gates=gates, memo=memo)  # fmt: skip
                removed = sorted(found.order[:count])
                loss = judge.of([b for b in range(blocks) if b not in removed])
                return {"loss": loss, "regret": loss - best["loss"], "removed": removed,
                        "block_runs": found.metadata["block_runs"]}  # fmt: skip

            for refine in ("none", "swaps"):
                name = method + (" + swaps" if refine == "swaps" else "")
                row = table.row(
                    f"{name}, seed {seed}",
                    lambda m=method, f=refine, s=seed, r=rows: attempt(m, f, s, r),
                )
                if row:
                    losses.setdefault(name, []).append(row["loss"])
    table.facts["summary"] = {
        name: {**spread(values), "regret": spread(values)["mean"] - best["loss"]}
        for name, values in losses.items()
    }
    table.write()
    table.show(["loss", "regret", "block_runs", "seconds"])
    print(f"\n{'ranking':<28}{'loss':>10}{'±':>10}{'regret':>10}")
    for name, one in table.facts["summary"].items():
        print(f"{name:<28}{one['mean']:>10.4f}{one['half_width']:>10.4f}{one['regret']:>10.4f}")


if __name__ == "__main__":
    main()
