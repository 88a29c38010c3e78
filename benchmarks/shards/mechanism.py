"""When sharing shards helps: known updates of 16 layers, approximated at equal budget.

    python benchmarks/shards/mechanism.py [--quick] [--budgets]

Layer k is to be changed by U_k Q_k S V_k' of rank 8 (singular values 0.8^i, Q_k a random rotation).
U_k and V_k mix a part that all layers have in common, of share c, with one of their own. Every
method fits all 16 changes with as many numbers as LoRA of rank 2; what is shown is the relative
squared error, the mean over seeds with its interval. With c = 0 the layers have nothing in common,
with c = 1 all their rows and columns lie in one space. ``--budgets`` varies the budget instead,
also below LoRA of rank 1, for LoRA and for dissociated subsets of whole vectors.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from _table import Table, spread

from weightshare.shards import MosConfig, Target, plan_pools
from weightshare.shards.gather import Table as Uses
from weightshare.shards.gather import gather_all

LAYERS, WIDTH, RANK, BUDGET = 16, 48, 8, 2
METHODS = {
    "LoRA": {"rank": 2, "private_rank": 2, "shards_per_vector": 1},
    "pure sharing": {"rank": 32, "shards_per_vector": 1, "pair_dissociation": False},
    "subset": {"shards_per_vector": 1, "pair_dissociation": False},
    "subset, dissociated": {"shards_per_vector": 1},
    "+ private rank": {"shards_per_vector": 1, "private_rank": 1},
    "private, not dissociated": {
        "shards_per_vector": 1,
        "private_rank": 1,
        "pair_dissociation": False,
    },
    "2 shards, private": {"shards_per_vector": 2, "private_rank": 1},
    "4 shards, private": {"shards_per_vector": 4, "private_rank": 1},
    "4 shards": {"shards_per_vector": 4},
    "balanced subset": {"shards_per_vector": 1, "index_strategy": "balanced"},
    "4 shards, balanced": {"shards_per_vector": 4, "index_strategy": "balanced"},
}


SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--budgets", action="store_true", help="the curve over budgets")
    parsed, _ = parser.parse_known_args()
    name = "shards_mechanism_budgets" if parsed.budgets else "shards_mechanism"
    table = Table(name, __doc__, parser)
    seeds, steps = (2, 100) if table.quick else (5, 1500)
    for name, options in (budgets() if parsed.budgets else METHODS).items():
        table.row(name, lambda options=options: errors(options, seeds, steps))
    columns = [f"c={share:g}" for share in SHARES]
    table.show([*columns, *(f"± {column}" for column in columns)])


def budgets() -> dict[str, dict[str, object]]:
    """LoRA and subsets of whole vectors, of a rank that holds the change where the pool allows."""
    found: dict[str, dict[str, object]] = {}
    for e in (0.25, 0.5, 1, 2, 4):
        if e >= 1:
            found[f"LoRA e={e}"] = {"equivalent_rank": e, "rank": e, "private_rank": e}
        rank = min(max(RANK, round(4 * e)), int(e * LAYERS))
        found[f"subset e={e:g}"] = {"equivalent_rank": e, "rank": rank}
    for options in found.values():
        options["shards_per_vector"] = 1
    return found


def errors(options: dict[str, object], seeds: int, steps: int) -> dict[str, float]:
    """Mean error and half width of its interval for each share."""
    found = fit(options, seeds, steps).view(len(SHARES), seeds)
    figures = {}
    for share, row in zip(SHARES, found, strict=True):
        over = spread(row.tolist())
        figures[f"c={share:g}"], figures[f"± c={share:g}"] = over["mean"], over["half_width"]
    return figures


def wanted(share: float, generator: torch.Generator) -> Tensor:
    """The changes to approximate, (layers, width, width)."""

    def orthonormal(*shape: int) -> Tensor:
        return torch.linalg.qr(torch.randn(*shape, generator=generator))[0]

    def mixed() -> Tensor:
        common, own = orthonormal(WIDTH, RANK), orthonormal(LAYERS, WIDTH, RANK)
        return torch.linalg.qr(share**0.5 * common + (1 - share) ** 0.5 * own)[0]

    spectrum = torch.diag(0.8 ** torch.arange(RANK))
    rotation = orthonormal(LAYERS, RANK, RANK)
    return mixed() @ rotation @ spectrum @ mixed().transpose(1, 2)


def fit(options: dict[str, object], seeds: int, steps: int) -> Tensor:
    """Relative squared errors after Adam on the pools, (shares * seeds).

    All problems are fitted at once: a shard holds theirs side by side. Their targets and starts
    differ, the index is one draw.
    """
    draws = [torch.Generator().manual_seed(seed) for _ in SHARES for seed in range(seeds)]
    shares = [share for share in SHARES for _ in range(seeds)]
    target = torch.stack([wanted(s, g) for s, g in zip(shares, draws, strict=True)])
    usual = {"equivalent_rank": BUDGET, "rank": 8, "private_rank": 0}
    config = MosConfig(**{**usual, **options})
    layers = [Target(f"layers.{k}.linear", WIDTH, WIDTH) for k in range(LAYERS)]
    plan = plan_pools(layers, config)
    rank, problems = next(iter(plan.ranks.values())), len(shares)
    pools, uses = [], []
    for pool in plan.pools.values():
        parts = [torch.rand(pool.rows, pool.width, generator=g) * 2 - 1 for g in draws]
        start = torch.stack(parts, 1).flatten(1) / WIDTH**0.5
        pools.append(nn.Parameter(start if pool.side == "A" else 0 * start))
        sources = [{"x": torch.tensor(index)} for index in pool.indices]
        uses.append(Uses("x", pool.rows, sources).prepare(torch.device("cpu")))
    assert sum(p.numel() for p in pools) == problems * config.equivalent_rank * LAYERS * 2 * WIDTH
    optimizer = torch.optim.Adam(pools, lr=2e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    error = torch.zeros(problems)
    for _ in range(steps):
        a, b = (
            torch.stack(gather_all(pool, of, torch.float32))
            .view(LAYERS, rank, -1, problems, WIDTH // (len(of.sources[0]["x"]) // rank))
            .permute(3, 0, 1, 2, 4)
            .reshape(problems, LAYERS, rank, WIDTH)
            for pool, of in zip(pools, uses, strict=True)
        )
        gap = (b.transpose(-1, -2) @ a - target).square().sum((1, 2, 3))
        error = gap / target.square().sum((1, 2, 3))
        optimizer.zero_grad()
        error.sum().backward()
        optimizer.step()
        schedule.step()
    return error.detach()


if __name__ == "__main__":
    main()
