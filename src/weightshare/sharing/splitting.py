"""Should the users of a weight be split? Only where the gain is more than chance would give."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from weightshare.errors import UserError
from weightshare.sharing.agreement import Estimate, Gram
from weightshare.sharing.grouping import Objective, Partition, group_cost, partition


@dataclass(frozen=True)
class Split:
    """The best split of a weight's users, and whether to believe it.

    ``low`` to ``high`` is the jackknife interval of the partition's gain, ``null`` the gain that
    the best partition reaches, at the given level, where users' labels are permuted: what chance
    explains. ``advised`` only where the interval lies above the median of that null and the gain
    above its upper end; otherwise ``reason`` says why not.
    """

    partition: Partition | None
    low: float
    high: float
    null: float
    advised: bool
    reason: str


def split(
    gram: Gram,
    groups: int = 2,
    *,
    objective: Objective = "neutral",
    balanced: bool = False,
    contiguous: bool = False,
    estimate: Estimate = "debiased",
    level: float = 0.95,
    draws: int = 200,
    seed: int = 0,
) -> Split:
    """Group the users of a weight by the direction of their gradients, or advise against it.

    "Do not split" is an answer: too few users with a gradient, or no more disagreement than the
    permutation null. The null says that users are exchangeable: their labels are permuted
    independently in every (context, batch), which leaves all noise in place and makes every user's
    mean gradient the same. ("paper" estimates know only products on common batches; for two users
    a permutation changes none of them, so there the null cannot reject.)

    Args:
        level: of the interval and of the null.
        draws: permutations.
    """
    distance = gram.distance(estimate)
    alive = int((~distance.isnan()).any(1).sum()) if len(distance) else 0
    if alive < max(2, groups):
        return _no(f"{alive} of {len(gram.labels)} users have a gradient above its noise")
    try:
        best = partition(distance, groups, objective, balanced=balanced, contiguous=contiguous)
    except UserError as refused:
        return _no(str(refused))
    if gram.units < 3:
        return _no("fewer than three batches or contexts: no interval", best)

    from scipy.stats import t

    at = torch.tensor(best.gain)
    error = float(gram.jackknife(lambda g: torch.tensor(gain_of(g.distance(estimate), best))))
    reach = float(t.ppf(0.5 + level / 2, gram.units - 1)) * error
    low, high = float(at) - reach, float(at) + reach

    generator = torch.Generator().manual_seed(seed)
    null = []
    for _ in range(draws):
        d = gram.permuted(generator).distance(estimate)
        try:
            null.append(partition(d, groups, objective, balanced=balanced).gain)
        except UserError:
            continue  # too few users are above the noise in this draw
    if not null:
        return Split(best, low, high, math.nan, False, "no permutation left users to compare")
    chance = torch.tensor(null).quantile(torch.tensor([0.5, level]))
    median, upper = float(chance[0]), float(chance[1])
    if math.isnan(error):
        reason = "the gain has no interval: a user's gradient is lost in noise in some batches"
    elif best.gain <= upper:
        reason = f"a gain of {best.gain:.3g} is within chance ({upper:.3g})"
    elif low <= median:
        reason = f"the interval of the gain reaches down to {low:.3g}, chance gives {median:.3g}"
    else:
        return Split(best, low, high, upper, True, "the groups disagree beyond chance")
    return Split(best, low, high, upper, False, reason)


def gain_of(distance: Tensor, chosen: Partition) -> float:
    """The gain of a given partition under another distance matrix; NaN where it is undefined."""
    users = [u for group in chosen.groups for u in group if u not in chosen.undefined]
    d = distance.double()
    one = group_cost(d, users, "neutral")
    parts = [[u for u in group if u not in chosen.undefined] for group in chosen.groups]
    return one - sum(group_cost(d, part, "neutral") for part in parts if part)


def _no(reason: str, best: Partition | None = None) -> Split:
    return Split(best, math.nan, math.nan, math.nan, False, reason)
