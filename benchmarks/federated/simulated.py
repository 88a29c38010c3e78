"""How large a federation fits into one process, and what training its participants at once saves.

    python benchmarks/federated/simulated.py [--quick] [--minutes 3] [--device cuda]

``participants``: a whole federation of N on MNIST (in WEIGHTSHARE_DATA), 6 samples each, messages
by reference and through their bytes: seconds of a round, of which training, and the process's peak
memory so far.
``training``: one round of 20 participants with 300 samples each, one after another, stacked on the
CPU and stacked on the device; ``difference`` is the largest of a weight from the first.
"""

import argparse
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from _table import Table

from weightshare.federated.config import FederateConfig
from weightshare.federated.simulation import simulate


def participants(
    count: int, data: str, samples: int, rounds: int, device: str, as_bytes: bool
) -> dict:
    """One federation of many."""
    config = FederateConfig(data, participants=count, samples=samples, rounds=rounds, epochs=1,
                            strategy="reputation", device=device)  # fmt: skip
    here = simulate(config, as_bytes=as_bytes)
    spent, train = [0.0], here.training.train

    def timed(starts, number):
        begun = time.perf_counter()
        trained = train(starts, number)
        spent[0] += time.perf_counter() - begun
        return trained

    here.training.train = timed
    begun = time.perf_counter()
    here.run()
    seconds = time.perf_counter() - begun
    return {
        "weights": len(here.initial),
        "seconds_per_round": seconds / rounds,
        "training_per_round": spent[0] / rounds,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "models_mb": 4e-6 * count * len(here.initial),
    }


def training(data: str, samples: int, device: str) -> dict:
    """The same local training in three ways."""
    vectors, figures = {}, {}
    for name, how, where in (("loop", "loop", "cpu"), ("stacked", "stacked", "cpu"),
                             ("device", "stacked", device)):  # fmt: skip
        config = FederateConfig(data, participants=20, samples=samples, training=how, device=where)
        here = simulate(config)
        starts = dict.fromkeys(here.honest, here.initial)
        here.training.train(starts, 1)  # warm
        begun = time.perf_counter()
        vectors[name] = here.training.train(starts, 2)
        figures[f"{name}_seconds"] = time.perf_counter() - begun
    for name in ("stacked", "device"):
        figures[f"{name}_difference"] = max(
            float(np.abs(vectors[name][n] - vectors["loop"][n]).max()) for n in vectors["loop"]
        )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    table = Table("federated_simulated", __doc__, parser)
    device = table.options.device
    torch.set_num_threads(1)
    table.facts = {"trained_on": device}
    count, data, samples = (100, "digits", 600) if table.quick else (1000, "mnist", 6000)
    table.row("training", lambda: training(data, 400 if table.quick else samples, device))
    for how, as_bytes in (("by reference", False), ("as bytes", True)):
        table.row(
            f"{count} participants, {how}",
            lambda b=as_bytes: participants(count, data, samples, 3, device, b),
        )
    table.write()
    table.show(["loop_seconds", "stacked_seconds", "device_seconds", "device_difference",
                "seconds_per_round", "peak_gib"])  # fmt: skip


if __name__ == "__main__":
    main()
