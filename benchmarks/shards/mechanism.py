"""When sharing shards helps: known updates of 16 layers, approximated at equal budget.

    python benchmarks/shards/mechanism.py [--quick]

Layer k is to be changed by U_k Q_k S V_k' of rank 8 (singular values 0.8^i, Q_k a random rotation).
U_k and V_k mix a part that all layers have in common, of share c, with one of their own. Every
method fits all 16 changes with as many numbers as LoRA of rank 2; what is shown is the relative
squared error, the mean over seeds with its interval. With c = 0 the layers have nothing in common,
with c = 1 all their rows and columns lie in one space.
"""

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


def main() -> None:
    table = Table("shards_mechanism", __doc__)
    seeds, steps = (1, 100) if table.quick else (3, 1500)
    for name, options in METHODS.items():
        for share in (0.0, 0.5, 1.0):
            table.row(
                f"{name} | {share:g}",
                lambda options=options, share=share: {
                    "error": (of := spread([fit(options, share, s, steps) for s in range(seeds)]))[
                        "mean"
                    ],
                    "half_width": of["half_width"],
                    "seeds": seeds,
                },
            )
    table.facts["errors"] = {
        name: {
            f"c={share:g}": table.rows[f"{name} | {share:g}"]["error"]
            for share in (0.0, 0.5, 1.0)
            if f"{name} | {share:g}" in table.rows
        }
        for name in METHODS
    }
    table.write()
    table.show(["error", "half_width"])


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


def fit(options: dict[str, object], share: float, seed: int, steps: int) -> float:
    """Relative squared error after Adam on the pools."""
    generator = torch.Generator().manual_seed(seed)
    target = wanted(share, generator)
    usual = {"equivalent_rank": BUDGET, "rank": 8, "private_rank": 0, "index_seed": seed}
    config = MosConfig(**{**usual, **options})
    layers = [Target(f"layers.{k}.linear", WIDTH, WIDTH) for k in range(LAYERS)]
    plan = plan_pools(layers, config)
    pools, uses = [], []
    for pool in plan.pools.values():
        start = torch.rand(pool.rows, pool.width, generator=generator) * 2 - 1
        pools.append(nn.Parameter(start / WIDTH**0.5 if pool.side == "A" else 0 * start))
        sources = [{"x": torch.tensor(index)} for index in pool.indices]
        uses.append(Uses("x", pool.rows, sources).prepare(torch.device("cpu")))
    assert sum(p.numel() for p in pools) == BUDGET * LAYERS * 2 * WIDTH
    rank = next(iter(plan.ranks.values()))
    optimizer = torch.optim.Adam(pools, lr=2e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    error = torch.zeros(())
    for _ in range(steps):
        a, b = (
            torch.stack(gather_all(p, u, torch.float32)).view(LAYERS, rank, WIDTH)
            for p, u in zip(pools, uses, strict=True)
        )
        error = (b.transpose(1, 2) @ a - target).square().sum() / target.square().sum()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        schedule.step()
    return float(error)


if __name__ == "__main__":
    main()
