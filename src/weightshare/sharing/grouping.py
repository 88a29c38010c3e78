"""Split users into groups that agree.

A distance matrix D over K users (``1 - cosine`` of their gradients, of their activations, ...) is
cut into groups so that the distances inside groups stay small. Two costs of a group U:

    within     Σ_{i<j∈U} D_ij                 what a cut of the complete graph leaves inside
    neutral    (1/|U|) Σ_{i<j∈U} D_ij         spherical k-means: no preference for any group size

``within`` grows with the square of a group's size, so it can pair two users only because the rest
are close to each other; ``neutral`` isolates an outlier. ``diameter`` is the largest distance in a
group, for callers who must bound the worst pair.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from weightshare.errors import UserError

Objective = Literal["neutral", "within", "diameter"]
OBJECTIVES: tuple[Objective, ...] = ("neutral", "within", "diameter")


def contiguous(
    distance: Tensor,
    groups: int | None = None,
    max_size: int | None = None,
    objective: Objective = "neutral",
) -> list[list[int]]:
    """The cheapest partition of ``0..K-1`` into runs of neighbours, exactly, in O(K³) time.

    Dynamic programming over the last boundary: ``best[b][j] = min_i best[b-1][i] + cost(i..j-1)``.

    Args:
        distance: ``(K, K)``, symmetric; the diagonal is not read.
        groups: how many groups; by default the fewest that ``max_size`` allows.
        max_size: the largest group; by default any.
        objective: the cost of one group, see above; the partition's cost is the sum over groups.

    Of equally cheap partitions the one with the longest first group wins, then the longest second.

    Raises:
        UserError: when neither ``groups`` nor ``max_size`` is given, or they cannot be met.
    """
    d = checked(distance)
    k = len(d)
    if groups is None and max_size is None:
        raise UserError("contiguous() got neither groups nor max_size; give at least one of them.")
    if max_size is not None and max_size < 1:
        raise UserError(f"max_size is {max_size}; a group has at least one member.")
    longest = k if max_size is None else min(max_size, k)
    count = math.ceil(k / longest) if groups is None else groups
    if not math.ceil(k / longest) <= count <= k:
        raise UserError(
            f"{k} users cannot be split into {count} groups of at most {longest}; "
            f"choose between {math.ceil(k / longest)} and {k} groups."
        )

    cost = _interval_costs(d, objective)
    # best[b][i]: cheapest split of users i..K-1 into b groups; filled from the right, so that the
    # walk back starts at user 0 and ties are broken by the earliest group.
    best = [[math.inf] * (k + 1) for _ in range(count + 1)]
    best[0][k] = 0.0
    for b in range(1, count + 1):
        for i in range(k):
            best[b][i] = min(
                cost[i][j] + best[b - 1][j] for j in range(i + 1, min(i + longest, k) + 1)
            )
    result, i = [], 0
    for b in range(count, 0, -1):
        ends = range(min(i + longest, k), i, -1)
        j = next(j for j in ends if _close(cost[i][j] + best[b - 1][j], best[b][i]))
        result.append(list(range(i, j)))
        i = j
    return result


def checked(distance: Tensor) -> Tensor:
    """``distance`` in double precision on the CPU, after the checks every public function makes."""
    if distance.ndim != 2 or distance.shape[0] != distance.shape[1] or not len(distance):
        raise UserError(
            f"the distance matrix has shape {tuple(distance.shape)}; it must be square, (K, K)."
        )
    d = distance.detach().to("cpu", torch.float64, copy=True)
    d.fill_diagonal_(0)
    if not torch.isfinite(d).all():
        raise UserError(
            "the distance matrix holds values that are not finite; leave out the users that never "
            "received a gradient."
        )
    if not torch.allclose(d, d.T, rtol=1e-5, atol=1e-8 * max(1.0, float(d.abs().max()))):
        raise UserError("the distance matrix is not symmetric; pass (D + D.T) / 2.")
    return d


def _interval_costs(d: Tensor, objective: Objective) -> list[list[float]]:
    """``cost[i][j]`` of the run i..j-1."""
    k = len(d)
    table = [[0.0] * (k + 1) for _ in range(k)]
    for i in range(k):
        inside = largest = 0.0
        for j in range(i + 1, k):
            column = d[i:j, j]
            inside += float(column.sum())
            largest = max(largest, float(column.max()))
            size = j + 1 - i
            table[i][j + 1] = {
                "within": inside,
                "neutral": inside / size,
                "diameter": largest,
            }[objective]
    return table


def _close(a: float, b: float) -> bool:
    return a == b or math.isclose(a, b, rel_tol=1e-12, abs_tol=1e-15)
