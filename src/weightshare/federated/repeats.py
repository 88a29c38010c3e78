"""Who sends what it has sent, or been sent, the round before."""

import numpy as np

from weightshare.federated.vectors import Vector

WATCHED = 4096
"""Entries by which an update is compared with the last update and the last reward."""
REPEATED = 0.999
"""Cosine from which an update counts as a repetition (it is noted, not punished)."""


class Repeats:
    """Remembers a few entries of everyone's last update and reward; part of the checkpoint."""

    def __init__(self, dimension: int) -> None:
        draw = np.random.default_rng(dimension)
        self._entries = draw.choice(dimension, min(WATCHED, dimension), replace=False)
        self.seen: dict[str, Vector] = {}
        self.paid: dict[str, Vector] = {}

    def pay(self, name: str, reward: Vector | None) -> None:
        """Remember the reward of ``name``, ``(D,)``."""
        self.paid.pop(name, None)
        if reward is not None:
            self.paid[name] = reward[self._entries]

    def found(self, name: str, update: Vector) -> list[str]:
        """What ``update`` repeats of ``name``; it takes the place of the last one."""
        now = update[self._entries]
        known = {"its last update": self.seen.get(name), "its last reward": self.paid.get(name)}
        self.seen[name] = now
        return [
            what
            for what, before in known.items()
            if before is not None and _cosine(now, before) > REPEATED
        ]


def _cosine(one: Vector, other: Vector) -> float:
    a, b = one.astype(np.float64), other.astype(np.float64)
    lengths = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / lengths if lengths > 0 else 0.0
