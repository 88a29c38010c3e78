"""Should the users of a weight be split? Only where the gain is more than chance would give."""

import math
from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from weightshare.errors import UserError
from weightshare.sharing.agreement import Gram
from weightshare.sharing.grouping import Objective, Partition, group_cost, partition


@dataclass(frozen=True)
class Split:
    """The best split of a weight's users, and whether to believe it.

    ``groups`` are users' labels. ``gain`` is that of :class:`Partition` for unit gradients, ``low``
    to ``high`` its jackknife interval, ``null`` the gain that the best partition reaches at the
    given level where labels are permuted: what chance explains. ``advised`` only where the gain is
    above the null's upper end and its interval above the null's median; ``reason`` says why not.
    """

    groups: tuple[tuple[Hashable, ...], ...]
    gain: float
    low: float
    high: float
    null: float
    advised: bool
    reason: str
    partition: Partition | None = None


def split(
    gram: Gram,
    groups: int = 2,
    *,
    objective: Objective = "neutral",
    balanced: bool = False,
    contiguous: bool = False,
    level: float = 0.95,
    draws: int = 200,
    seed: int = 0,
) -> Split:
    """Group the users of a weight by the direction of their gradients, or advise against it.

    Directions are debiased: each user's gradients are divided by the norm of its mean gradient,
    and products are taken across batches. "Do not split" is an answer: too few users with a
    gradient above its noise, or no more disagreement than chance. Chance is a permutation of the
    users' labels, independent in every (context, batch): it leaves all noise in place and makes
    the users' mean gradients equal.

    Args:
        level: of the interval and of the null.
        draws: permutations.

    Raises:
        UserError: a level that is not between 0 and 1, or no draws.
    """
    if not 0 < level < 1 or draws < 1:
        raise UserError(
            f"level is {level} and draws are {draws}; give a level between 0 and 1 and a draw."
        )
    measured = unit_gram(gram)
    if len(measured.labels) < max(2, groups):
        return _no(
            f"{len(measured.labels)} of {len(gram.labels)} users have a gradient above its noise, "
            f"too few for {groups} groups"
        )
    try:
        best = partition(
            measured.distance(unit=False),
            groups,
            objective,
            balanced=balanced,
            contiguous=contiguous,
        )
    except UserError as refused:
        return _no(str(refused))
    named = tuple(tuple(measured.labels[u] for u in group) for group in best.groups)
    if gram.units < 3:
        return _no("fewer than three batches or contexts give no interval", named, best)

    from scipy.stats import t

    error = float(measured.jackknife(lambda g: torch.tensor(gain_of(g.distance(unit=False), best))))
    reach = float(t.ppf(0.5 + level / 2, gram.units - 1)) * error
    low, high = best.gain - reach, best.gain + reach

    generator = torch.Generator().manual_seed(seed)
    null = [
        partition(
            measured.permuted(generator).distance(unit=False),
            groups,
            objective,
            balanced=balanced,
            contiguous=contiguous,
        ).gain
        for _ in range(draws)
    ]
    chance = torch.tensor(null).quantile(torch.tensor([0.5, level]))
    median, upper = float(chance[0]), float(chance[1])
    if not best.gain > upper:
        reason = f"a gain of {best.gain:.3g} is within chance ({upper:.3g})"
    elif not low > median:
        reason = f"the interval of the gain reaches down to {low:.3g}, chance gives {median:.3g}"
    else:
        reason = "the groups disagree beyond chance"
    advised = best.gain > upper and low > median
    return Split(named, best.gain, low, high, upper, advised, reason, best)


class Stable:
    """Whether a decision has come out the same ``patience`` times in a row.

    For stopping early: ``if stable.update(decision(gram)): break``.
    """

    def __init__(self, patience: int = 3) -> None:
        self.patience = patience
        self._last: Hashable = object()
        self._run = 0

    def update(self, decision: Hashable) -> bool:
        self._run = self._run + 1 if decision == self._last else 1
        self._last = decision
        return self._run >= self.patience


def unit_gram(gram: Gram) -> Gram:
    """The users whose mean gradient is above its noise, divided by its norm.

    The divisor is fixed: were it estimated again in every permutation, where mean gradients nearly
    cancel, the null would be the ratio of two noises and reject nothing.
    """
    if not gram.tensors or max(map(len, gram.contexts()), default=0) < 2:
        return Gram([])
    norms = gram.norms()
    alive = [u for u, norm in enumerate(norms.tolist()) if norm == norm]
    while alive and gram.products()[alive][:, alive].isnan().any():
        missing = gram.products()[alive][:, alive].isnan().sum(1)
        alive.pop(int(missing.argmax()))
    return gram.restrict(alive, 1 / norms)


def gain_of(distance: Tensor, chosen: Partition) -> float:
    """The gain of a given partition under another distance matrix."""
    d = distance.double()
    users = [u for group in chosen.groups for u in group]
    parts = sum(group_cost(d, group, "neutral") for group in chosen.groups)
    return group_cost(d, users, "neutral") - parts


def _no(
    reason: str,
    groups: tuple[tuple[Hashable, ...], ...] = (),
    best: Partition | None = None,
) -> Split:
    gain = best.gain if best else math.nan
    return Split(groups, gain, math.nan, math.nan, math.nan, False, reason, best)
