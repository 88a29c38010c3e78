"""What a round costs the server, beside Flower's own aggregation, argpartition and topk.

    python benchmarks/federated/speed.py [--quick] [--minutes 10]

``server``: validation of N replies as they arrive, reputations, quotas and where each reward ends,
against Flower's aggregate of the same replies (which decodes and averages, and validates nothing).
``rewards``: which entries and their values for every participant, as they are put into its message,
against ``numpy.argpartition`` and ``torch.topk`` for each participant alone; quotas between 0.5 and
1, and ``low`` ones between 0.1 and 0.5. Best of several repetitions, alternating, in one process on
one thread. A row is written as soon as it is done.
"""

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import flwr
import numpy as np
import torch
from flwr.app import Message, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

sys.path.insert(0, str(Path(__file__).parents[1]))
from _table import Table

from weightshare.federated import ReputationConfig, Standing, assess, flower, wire
from weightshare.federated.rewards import Rewards, entries_for

SIZES = [
    (10, 10**5),
    (50, 10**5),
    (200, 10**5),
    (10, 10**6),
    (50, 10**6),
    (200, 10**6),
    (10, 10**7),
]


def best(jobs: dict[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    """Least milliseconds of each job, taken in turns so that other load meets all alike."""
    least = {name: float("inf") for name in jobs}
    for _ in range(repetitions):
        for name, job in jobs.items():
            begun = time.perf_counter()
            job()
            least[name] = min(least[name], 1000 * (time.perf_counter() - begun))
    return least


def measure(count: int, dimension: int, repetitions: int) -> dict[str, float]:
    """One row of the table."""
    flower.ensure_identity()
    draw = np.random.default_rng(0)
    common = draw.standard_normal(dimension, np.float32)
    replies, plain, tickets = {}, [], {}
    for i in range(count):
        name = f"p{i:03d}"
        update = 0.01 * (common + draw.standard_normal(dimension, np.float32))
        tickets[name] = wire.Ticket(name, 1, 7)
        order = Message(RecordDict(), i + 2, wire.TRAIN)
        replies[name] = Message(wire.answer(update, 1, 7), reply_to=order)
        metrics = MetricRecord({"num-examples": 1.0})
        plain.append(RecordDict({"arrays": replies[name].content["update"], "metrics": metrics}))
    config = ReputationConfig()
    standing = Standing.begin(replies, config)

    def server() -> None:
        read = {n: wire.read_update(r, tickets[n], dimension) for n, r in replies.items()}
        updates = {name: update for name, (update, _) in read.items()}
        squares = {name: square for name, (_, square) in read.items()}
        _, judged = assess(standing, updates, config, squares=squares)
        Rewards(judged.aggregate, judged.quotas)

    _, judged = assess(
        standing,
        {n: wire.read_update(r, tickets[n], dimension)[0] for n, r in replies.items()},
        config,
    )
    aggregate = judged.aggregate
    magnitudes, tensor = np.abs(aggregate), torch.from_numpy(aggregate).abs()

    def nested(quotas: dict[str, float]) -> None:
        rewards = Rewards(aggregate, quotas)
        for name in quotas:
            rewards.cut(name)

    def argpartition(quotas: dict[str, float]) -> None:
        for quota in quotas.values():
            k = entries_for(quota, dimension)
            found = np.argpartition(magnitudes, dimension - k)[dimension - k :]
            aggregate[found]

    def topk(quotas: dict[str, float]) -> None:
        for quota in quotas.values():
            found = torch.topk(tensor, entries_for(quota, dimension), sorted=False).indices
            aggregate[found.numpy()]

    found = best(
        {"server": server, "flower": lambda: aggregate_arrayrecords(plain, "num-examples")},
        repetitions,
    )
    row = {**found, "server/flower": found["server"] / found["flower"]}
    for kind, low, high in (("rewards", 0.5, 1 - 1 / count), ("low_rewards", 0.1, 0.5)):
        quotas = dict(zip(replies, np.linspace(low, high, count).tolist(), strict=True))
        found = best(
            {
                "rewards": lambda q=quotas: nested(q),
                "argpartition": lambda q=quotas: argpartition(q),
            },
            repetitions,
        )
        found |= best({"topk": lambda q=quotas: topk(q)}, max(1, repetitions // 3))
        row[kind] = found["rewards"]
        for peer in ("argpartition", "topk"):
            row[f"{peer}/{kind}"] = found[peer] / found["rewards"]
    return row


def main() -> None:
    table = Table("federated_speed", __doc__)
    torch.set_num_threads(1)
    table.facts = {"unit": "milliseconds, best of the repetitions", "flwr": flwr.__version__,
                   "numpy": np.__version__}  # fmt: skip
    for count, dimension in SIZES[:2] if table.quick else SIZES:
        repetitions = 15 if count * dimension <= 10**6 else 7 if count * dimension <= 10**7 else 4
        table.row(
            f"{count}, 1e{round(math.log10(dimension))}",
            lambda n=count, d=dimension, r=repetitions: measure(n, d, r),
        )
    table.write()
    table.show(["server", "flower", "server/flower", "rewards", "argpartition/rewards",
                "topk/rewards", "low_rewards", "argpartition/low_rewards",
                "topk/low_rewards"])  # fmt: skip


if __name__ == "__main__":
    main()
