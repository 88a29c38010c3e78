"""Who sends what it has sent the round before."""

import numpy as np

from weightshare.federated.vectors import Vector

WATCHED = 4096
"""Entries by which an update is compared with the last one."""
REPEATED = 0.999
"""Cosine from which an update counts as a repetition (it is noted, not punished)."""


class Repeats:
    """Remembers a few entries of everyone's last update; part of the checkpoint."""

    def __init__(self, dimension: int) -> None:
        draw = np.random.default_rng(dimension)
        self._entries = draw.choice(dimension, min(WATCHED, dimension), replace=False)
        self.seen: dict[str, Vector] = {}

    def found(self, name: str, update: Vector) -> bool:
        """Whether ``update`` repeats the last one of ``name``; it takes its place."""
        now, before = update[self._entries], self.seen.get(name)
        self.seen[name] = now
        return before is not None and _cosine(now, before) > REPEATED


def _cosine(one: Vector, other: Vector) -> float:
    a, b = one.astype(np.float64), other.astype(np.float64)
    lengths = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / lengths if lengths > 0 else 0.0
