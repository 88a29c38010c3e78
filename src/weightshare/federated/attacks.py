"""What adversaries send instead of their update, as RFFL's evaluation and its successors define it.

An attack is a function of the honestly trained update and of what the adversary knows. Those that
need the updates of honest participants (``inner_product``, ``alie``, ``mimic``) are given them: the
strongest adversary there is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

from weightshare.federated.vectors import Vector


class Crowd:
    """A round's honest updates; what all adversaries want to know of them is computed once."""

    def __init__(self, updates: Sequence[Vector] = ()) -> None:
        self.updates = list(updates)

    def __bool__(self) -> bool:
        return bool(self.updates)

    @cached_property
    def mean(self) -> Vector:
        """``(D,)``."""
        mean: Vector = np.mean(np.stack(self.updates), axis=0)
        return mean

    @cached_property
    def spread(self) -> Vector:
        """Standard deviations, ``(D,)``."""
        spread: Vector = np.std(np.stack(self.updates), axis=0)
        return spread


@dataclass(frozen=True)
class Situation:
    """What an adversary knows in a round."""

    round: int
    draw: np.random.Generator
    """Its own randomness."""
    common: np.random.Generator
    """Randomness that all adversaries share, for those who act as one."""
    honest: Crowd = field(default_factory=Crowd)
    """This round's updates of the honest participants."""
    last_reward: Vector | None = None


Transform = Callable[[Vector, Situation], Vector]


@dataclass(frozen=True)
class Attack:
    """``transform`` turns the honest update into what is sent; the other fields act before."""

    transform: Transform
    flips: bool = False
    """Samples of one class carry the label of another (1 and 7, or 1 and 0 where there are two)."""
    claims: float = 1.0
    """By what the claimed number of samples is multiplied."""
    needs: Literal["always", "alone", "never"] = "always"
    """When the honestly trained update matters: never, or only alone, where no honest participant
    has answered. Otherwise the adversary need not be trained, and ``transform`` is given zeros."""


def free_rider(update: Vector, now: Situation) -> Vector:
    """Entries uniform in (-1, 1)."""
    return now.draw.uniform(-1, 1, len(update)).astype(np.float32)


def honest(update: Vector, now: Situation) -> Vector:
    """The update itself."""
    return update


def sign_randomise(update: Vector, now: Situation) -> Vector:
    """Each entry with a random sign."""
    return update * now.draw.choice(np.array([-1, 1], np.float32), len(update))


def rescale(update: Vector, now: Situation) -> Vector:
    """Each entry times ``10 · U(-10, 10)``: not a positive factor."""
    return update * (10 * now.draw.uniform(-10, 10, len(update))).astype(np.float32)


def value_invert(update: Vector, now: Situation) -> Vector:
    """Each entry with probability ½ replaced by ``1 / (x + 10⁻¹⁰)``."""
    inverse = 1 / (update.astype(np.float64) + 1e-10)
    chosen = now.draw.random(len(update)) < 0.5
    return np.where(chosen, inverse, update).astype(np.float32)


def sign_flip(update: Vector, now: Situation) -> Vector:
    """The negative."""
    return -update


def scaled(update: Vector, now: Situation) -> Vector:
    """A million times too long."""
    return update * np.float32(1e6)


def inner_product(update: Vector, now: Situation, factor: float = 2.0) -> Vector:
    """``-τ`` times the honest mean, τ = 2 (inner product manipulation, Xie et al. 2019)."""
    return (-factor * (now.honest.mean if now.honest else update)).astype(np.float32)


def alie(update: Vector, now: Situation, deviations: float = 1.5) -> Vector:
    """Honest mean minus 1.5 standard deviations ("A Little Is Enough", Baruch et al. 2019)."""
    if not now.honest:
        return update
    return (now.honest.mean - deviations * now.honest.spread).astype(np.float32)


def identical(update: Vector, now: Situation) -> Vector:
    """One random direction, the same for all adversaries and all rounds, as long as the update."""
    direction = now.common.standard_normal(len(update)).astype(np.float32)
    return direction * np.float32(np.linalg.norm(update) / np.linalg.norm(direction))


def mimic(update: Vector, now: Situation) -> Vector:
    """A copy of one honest participant's update (Karimireddy et al. 2022)."""
    return now.honest.updates[0].copy() if now.honest else update


def replay(update: Vector, now: Situation) -> Vector:
    """The last reward, sent back; where there was none, the honest update."""
    return update if now.last_reward is None else now.last_reward


def zero(update: Vector, now: Situation) -> Vector:
    """Nothing."""
    return np.zeros_like(update)


def late(update: Vector, now: Situation, honest_rounds: int = 12) -> Vector:
    """Honest for 12 rounds, then the negative."""
    return update if now.round <= honest_rounds else -update


ATTACKS: dict[str, Attack] = {
    "free_rider": Attack(free_rider, needs="never"),
    "label_flip": Attack(honest, flips=True),
    "sign_randomise": Attack(sign_randomise),
    "rescale": Attack(rescale),
    "value_invert": Attack(value_invert),
    "sign_flip": Attack(sign_flip),
    "scaled": Attack(scaled),
    "inner_product": Attack(inner_product, needs="alone"),
    "alie": Attack(alie, needs="alone"),
    "identical": Attack(identical),
    "mimic": Attack(mimic, needs="alone"),
    "replay": Attack(replay),
    "zero": Attack(zero, needs="never"),
    "late": Attack(late),
    "count_lie": Attack(sign_flip, claims=1e6),
}
"""Attacks by name."""
