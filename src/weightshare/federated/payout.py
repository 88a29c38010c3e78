"""What a round has earned everyone, until the next message carries it out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from flwr.app import RecordDict

from weightshare.federated import wire
from weightshare.federated.config import ReputationConfig
from weightshare.federated.reputation import Assessment
from weightshare.federated.rewards import Rewards
from weightshare.federated.vectors import Vector


@dataclass(frozen=True)
class Payout:
    """Rewards of one round; empty before the first, and once they are delivered."""

    rewards: Rewards | None = None
    scales: Mapping[str, float] = field(default_factory=dict)
    """By what its own update counts for a participant."""
    own: Mapping[str, Vector] = field(default_factory=dict)
    """Its own share of the aggregate, where that is taken out of the reward."""

    def count(self, name: str) -> int:
        """How many entries the participant gets."""
        return 0 if self.rewards is None or name not in self.scales else self.rewards.count(name)

    def reward_of(self, name: str) -> Vector | None:
        """The reward, ``(D,)``; None where there is none."""
        if self.rewards is None or not self.count(name):
            return None
        return self.rewards.dense(name, self._values(name))

    def order(self, ticket: wire.Ticket) -> RecordDict:
        """The message that brings it."""
        name = ticket.name
        scale = self.scales.get(name, 0.0)
        if self.rewards is None or not self.count(name):
            return wire.order(ticket, scale=scale)
        return wire.order(ticket, scale=scale, reward=self.rewards.cut(name, self._values(name)))

    def _values(self, name: str) -> Vector:
        assert self.rewards is not None
        own = self.own.get(name)
        return self.rewards.aggregate if own is None else self.rewards.aggregate - own


def payout_of(
    updates: Mapping[str, Vector],
    judged: Assessment,
    config: ReputationConfig,
    layers: Sequence[int] | None,
) -> Payout:
    """What the judgement of a round is worth to everyone who was judged."""
    names = list(judged.quotas)
    own: dict[str, Vector] = {}
    if config.subtract_own:
        for name in names:
            share = np.float32(judged.weights[name] * judged.scales[name])
            own[name] = share * updates[name]
    keep_own = config.keep_own or judged.round <= config.probation
    scales = {name: judged.scales[name] if keep_own else 0.0 for name in names}
    return Payout(Rewards(judged.aggregate, judged.quotas, layers), scales, own)
