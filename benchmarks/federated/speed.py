"""What a round costs the server, beside Flower's own aggregation, argpartition and topk.

    python benchmarks/federated/speed.py [--quick] [--minutes 10]

``server``: validation of N replies as they arrive, reputations and rewards, against Flower's
aggregate of the same replies (which decodes and averages, and validates nothing).
``rewards``: quotas between 0.5 and 1, indices and values for every participant, against
``numpy.argpartition`` and ``torch.topk`` for each participant alone. Best of several repetitions,
alternating, in one process on one thread. A row is written as soon as it is done.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import flwr
import numpy as np
import torch
from flwr.app import Message, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

import weightshare
from weightshare.federated import ReputationConfig, Standing, assess, flower, wire
from weightshare.federated.rewards import Order, Rewards, entries_for
from weightshare.report import read_json, write_json

RESULTS = Path(__file__).parents[1] / "results"
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
    """Least seconds of each job, taken in turns so that other load meets all alike."""
    seconds = {name: float("inf") for name in jobs}
    for _ in range(repetitions):
        for name, job in jobs.items():
            begun = time.perf_counter()
            job()
            seconds[name] = min(seconds[name], time.perf_counter() - begun)
    return seconds


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
        rewards = Rewards(judged.aggregate, judged.quotas)
        for order, counts in rewards._parts:
            for k in counts.values():
                order.indices[:k] if k < dimension else None

    _, judged = assess(
        standing,
        {n: wire.read_update(r, tickets[n], dimension)[0] for n, r in replies.items()},
        config,
    )
    aggregate = judged.aggregate
    magnitudes, tensor = np.abs(aggregate), torch.from_numpy(aggregate).abs()
    counts = [entries_for(q, dimension) for q in np.linspace(0.5, 1 - 1 / count, count)]

    def nested() -> None:
        order = Order(aggregate, counts)
        values = aggregate[order.indices]
        for k in counts:
            order.indices[:k], values[:k]

    def masks() -> None:
        order = Order(aggregate, counts)
        for k in counts:
            aggregate[order.support(k)]

    def argpartition() -> None:
        for k in counts:
            found = np.argpartition(magnitudes, dimension - k)[dimension - k :]
            aggregate[found]

    def topk() -> None:
        for k in counts:
            found = torch.topk(tensor, k, sorted=False).indices
            aggregate[found.numpy()]

    found = best(
        {"server": server, "flower": lambda: aggregate_arrayrecords(plain, "num-examples")},
        repetitions,
    )
    found |= best({"nested": nested, "masks": masks, "argpartition": argpartition}, repetitions)
    found |= best({"topk": topk}, max(1, repetitions // 3))
    return {
        "N": count,
        "D": dimension,
        **{name: 1000 * value for name, value in found.items()},
        "server/flower": found["server"] / found["flower"],
        "argpartition/nested": found["argpartition"] / found["nested"],
        "topk/nested": found["topk"] / found["nested"],
        "argpartition/masks": found["argpartition"] / found["masks"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, in a temporary place")
    parser.add_argument("--minutes", type=float, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp()) if options.quick else RESULTS
    path = folder / "federated_speed.json"
    results = read_json(path) if path.exists() else {"rows": []}
    results |= {
        "command": " ".join(sys.argv),
        "unit": "milliseconds, best of the repetitions",
        "versions": {"weightshare": weightshare.__version__, "numpy": np.__version__,
                     "torch": torch.__version__, "flwr": flwr.__version__,
                     "python": platform.python_version()},
        "device": f"cpu, one thread, {platform.machine()}",
    }  # fmt: skip
    until = time.monotonic() + 60 * options.minutes
    for count, dimension in SIZES[:2] if options.quick else SIZES:
        if any((row["N"], row["D"]) == (count, dimension) for row in results["rows"]):
            continue
        if time.monotonic() > until:
            print("time is up; the same command goes on where this one stopped")
            break
        repetitions = 7 if count * dimension <= 10**7 else 4
        results["rows"].append(measure(count, dimension, repetitions))
        write_json(path, results)
        row = results["rows"][-1]
        print(json.dumps({k: round(v, 2) for k, v in row.items()}), flush=True)


if __name__ == "__main__":
    main()
