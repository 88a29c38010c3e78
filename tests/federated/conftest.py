"""Participants that answer what a test tells them to, over real messages."""

from collections.abc import Callable

import numpy as np
import pytest

from weightshare.federated import ReputationConfig
from weightshare.federated.grid import InProcessGrid
from weightshare.federated.participant import Cohort
from weightshare.federated.strategy import ReputationStrategy

SIZE = 400


class Scripted:
    """Training that adds ``update(name, number)`` to the weights."""

    def __init__(self, update: Callable[[str, int], np.ndarray]) -> None:
        self.update = update

    def train(self, starts, number):
        return {n: start + self.update(n, number).astype(np.float32) for n, start in starts.items()}


def noisy(name: str, number: int, agreement: float = 0.8) -> np.ndarray:
    common = np.random.default_rng([7, number]).standard_normal(SIZE)
    own = np.random.default_rng([number, *name.encode()]).standard_normal(SIZE)
    return (0.1 * (agreement * common + own)).astype(np.float32)


class Federation:
    """A strategy, its grid and its participants."""

    def __init__(self, names=4, config=None, update=noisy, **options) -> None:
        self.names = [f"p{i}" for i in range(names)] if isinstance(names, int) else list(names)
        self.cohort = Cohort(Scripted(update), SIZE, dict.fromkeys(self.names, 1))
        self.grid = InProcessGrid(self.names, self.cohort.answer)
        self.initial = np.linspace(-1, 1, SIZE).astype(np.float32)
        self.strategy = ReputationStrategy(self.initial, config or ReputationConfig(), **options)

    def run(self, rounds=1):
        for _ in range(rounds):
            messages = list(self.strategy.configure_train(0, None, None, self.grid))
            self.asked = [
                name for name in self.names for m in messages
                if m.metadata.dst_node_id == self.grid._ids[name]
            ]  # fmt: skip
            replies = self.grid.send_and_receive(messages)
            _, self.metrics = self.strategy.aggregate_train(0, replies)
        return self

    def outcome(self, leave_out=()):
        """Everything that must be equal for two runs to be the same."""
        s = self.strategy
        return (
            s.server.tobytes(),
            {n: s.model_of(n).tobytes() for n in self.names if n not in leave_out},
            {n: r for n, r in s.standing.reputation.items() if n not in leave_out},
        )


@pytest.fixture
def federation():
    return Federation
