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
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from weightshare.errors import UserError

Objective = Literal["neutral", "within", "diameter"]
OBJECTIVES: tuple[Objective, ...] = ("neutral", "within", "diameter")


# 42,525 partitions of ten users into five groups are compared in a tenth of a second.
EXACT_UP_TO = 10


@dataclass(frozen=True)
class Partition:
    """Users in groups, and what separating them gains.

    Groups and their members are in ascending order. ``gain`` is, whatever the objective,

        gain = (1/K) Σ_{i<j} D_ij - Σ_U (1/|U|) Σ_{i<j∈U} D_ij

    which for ``D = ½‖u_i - u_j‖²`` is half the between-group sum of squares of the u's: with
    unit gradients a number of the users' disagreement, with plain gradients, times the learning
    rate and two, the first-order decrease of the summed losses that separate weights buy.
    """

    groups: tuple[tuple[int, ...], ...]
    cost: float
    gain: float
    total: float
    undefined: tuple[int, ...] = ()

    @property
    def users(self) -> int:
        return sum(map(len, self.groups)) - len(self.undefined)

    @property
    def gain_per_user(self) -> float:
        """Compare blocks of weights by this: it does not grow with the number of users."""
        return self.gain / max(1, self.users)

    @property
    def explained(self) -> float:
        """Share of the disagreement that the groups explain, in [0, 1].

        It says how clean the grouping is, not whether it is worth anything: NaN where users agree.
        """
        return self.gain / self.total if self.total > 0 else math.nan

    def labels(self) -> list[int]:
        """The group of each user."""
        where = {user: g for g, group in enumerate(self.groups) for user in group}
        return [where[user] for user in sorted(where)]


def partition(
    distance: Tensor,
    groups: int,
    objective: Objective = "neutral",
    *,
    balanced: bool = False,
    contiguous: bool = False,
    max_size: int | None = None,
) -> Partition:
    """The cheapest partition of K users into ``groups`` groups.

    Exact by enumeration up to ten users, exact by dynamic programming where the groups must be
    ``contiguous``; above ten users spectral clustering followed by single moves and swaps until
    none lowers the cost. Ties go to the partition that keeps the lowest users together.

    ``objective="within", balanced=True`` is gradient matching's rule: the cheapest cut of the
    similarity graph with group sizes ⌊K/B⌋ to ⌈K/B⌉.

    Users whose distances are NaN (they never received a gradient) are no evidence: they are left
    out of every cost, put into the first group (of contiguous ones, into their neighbour's) and
    listed in ``undefined``.

    Raises:
        UserError: when ``distance`` is not a symmetric matrix or has fewer users than groups, for
            an unknown objective, or sizes that contradict one another.
    """
    check_square(distance)
    check_objective(objective)
    defined = _defined(distance)
    d = checked(distance[defined][:, defined])
    k = len(d)
    if not 1 <= groups <= k:
        raise UserError(f"{k} users cannot be split into {groups} groups; choose 1 to {k}.")
    if balanced and (contiguous or max_size is not None):
        raise UserError(
            "balanced groups have the sizes ⌊K/B⌋ to ⌈K/B⌉ and can be neither contiguous nor of "
            "another max_size; leave one of them out."
        )
    if max_size is not None and max_size < 1:
        raise UserError(f"max_size is {max_size}; a group has at least one member.")
    sizes = (k // groups, -(-k // groups)) if balanced else (1, max_size or k)
    if contiguous:
        found = _runs(d, groups, max_size, objective)
    elif k <= EXACT_UP_TO:
        found = _enumerated(d, groups, objective, sizes)
    else:
        found = _spectral(d, groups, objective, sizes)

    one = group_cost(d, range(k), "neutral")
    gain = one - sum(group_cost(d, group, "neutral") for group in found)
    cost = sum(group_cost(d, group, objective) for group in found)
    named = [[defined[i] for i in group] for group in found]
    undefined = tuple(sorted(set(range(len(distance))) - set(defined)))
    for user in undefined:  # among contiguous groups it stays between its neighbours
        before = [n for n, group in enumerate(named) if contiguous and group[0] < user]
        named[before[-1] if before else 0].append(user)
    ordered = tuple(sorted(tuple(sorted(group)) for group in named))
    return Partition(ordered, cost, gain, one, undefined)


def group_cost(d: Tensor, group: Sequence[int], objective: Objective) -> float:
    """The cost of one group, see the head of this file."""
    members = torch.as_tensor(list(group))
    inside = d[members][:, members].triu(1)
    if objective == "diameter":
        return float(inside.max())
    return float(inside.sum()) / (len(members) if objective == "neutral" else 1)


@cache
def _assignments(k: int, groups: int) -> Tensor:
    """All partitions of k users into exactly ``groups`` groups, ``(N, k)`` group numbers.

    Restricted growth strings in lexicographic order: user 0 is in group 0, a new group takes the
    next number.
    """
    strings = [[0]]
    for user in range(1, k):
        strings = [
            [*s, g]
            for s in strings
            for g in range(min(max(s) + 2, groups))
            if groups - max(max(s) + 1, g + 1) <= k - 1 - user
        ]
    return torch.tensor(strings)


def _enumerated(
    d: Tensor, groups: int, objective: Objective, sizes: tuple[int, int]
) -> list[list[int]]:
    strings = _assignments(len(d), groups)
    member = (strings[:, None] == torch.arange(groups)[:, None]).to(d.dtype)  # (N, groups, K)
    size = member.sum(-1)
    if objective == "diameter":
        pairs = (member[..., :, None] * member[..., None, :]) * d
        cost = pairs.flatten(-2).amax(-1).sum(-1)
    else:
        inside = ((member @ d) * member).sum(-1) / 2
        cost = (inside / size if objective == "neutral" else inside).sum(-1)
    allowed = ((size >= sizes[0]) & (size <= sizes[1])).all(-1)
    if not allowed.any():
        raise UserError(
            f"{len(d)} users cannot be split into {groups} groups of at most {sizes[1]}; "
            "allow more groups or larger ones."
        )
    cost = torch.where(allowed, cost, math.inf)
    best = cost.min()
    tied = cost <= best + 1e-12 * max(1.0, float(best.abs()))
    return _as_groups(strings[int(tied.nonzero()[0])].tolist())


def _spectral(
    d: Tensor, groups: int, objective: Objective, sizes: tuple[int, int]
) -> list[list[int]]:
    """Relax spherical k-means to the leading eigenvectors (Ding & He, 2004), then descend."""
    k = len(d)
    if groups * sizes[1] < k:
        raise UserError(
            f"{k} users cannot be split into {groups} groups of at most {sizes[1]}; "
            "allow more groups or larger ones."
        )
    centre = torch.eye(k, dtype=d.dtype) - 1 / k
    values, vectors = torch.linalg.eigh(centre @ (1 - d) @ centre)
    spread = vectors * values.clamp(min=0).sqrt()
    best: tuple[float, list[int]] | None = None
    # Farthest-first starts, no random stream: in the leading directions, and in all of them, since
    # without clear groups the leading ones tell little.
    for points in (spread[:, -max(1, groups - 1) :], spread):
        for first in range(min(k, 16)):
            chosen = [first]
            while len(chosen) < groups:
                chosen.append(int(torch.cdist(points, points[chosen]).amin(1).argmax()))
            assigned = _seeded(torch.cdist(points, points[chosen]), sizes)
            cost, labels = _descend(d, assigned, groups, objective, sizes)
            if best is None or cost < best[0] - 1e-12:
                best = cost, labels
    assert best is not None
    return _as_groups(best[1])


def _seeded(far: Tensor, sizes: tuple[int, int]) -> list[int]:
    """Nearest seed with room, the most certain users first; every group gets its minimum."""
    k, groups = far.shape
    labels, room = [-1] * k, [sizes[0]] * groups
    for bound in sizes:
        room = [bound - labels.count(g) for g in range(groups)]
        for flat in far.flatten().argsort(stable=True).tolist():
            user, g = divmod(flat, groups)
            if labels[user] < 0 and room[g] > 0:
                labels[user] = g
                room[g] -= 1
    return labels


def _descend(
    d: Tensor, labels: list[int], groups: int, objective: Objective, sizes: tuple[int, int]
) -> tuple[float, list[int]]:
    """Single moves and swaps while one lowers the cost."""

    def cost_of(g: int, members: list[int]) -> float:
        return group_cost(d, members, objective)

    members = [[i for i, g in enumerate(labels) if g == h] for h in range(groups)]
    costs = [cost_of(g, m) for g, m in enumerate(members)]
    improved = True
    while improved:
        improved = False
        for user in range(len(d)):
            a = next(g for g, m in enumerate(members) if user in m)
            for b in range(groups):
                # Move the user to group b, or swap it with one of b's members.
                for other in [None, *members[b]] if b != a else []:
                    to_a = [i for i in members[a] if i != user] + ([] if other is None else [other])
                    to_b = [*(i for i in members[b] if i != other), user]
                    if not all(sizes[0] <= len(m) <= sizes[1] for m in (to_a, to_b)):
                        continue
                    new = cost_of(a, to_a), cost_of(b, to_b)
                    if sum(new) < costs[a] + costs[b] - 1e-12:
                        members[a], members[b] = to_a, to_b
                        costs[a], costs[b] = new
                        improved = True
                        break
                if improved:
                    break
            if improved:
                break
    where = {user: g for g, m in enumerate(members) for user in m}
    return sum(costs), [where[user] for user in range(len(d))]


def _as_groups(labels: Sequence[int]) -> list[list[int]]:
    groups: dict[int, list[int]] = {}
    for user, label in enumerate(labels):
        groups.setdefault(label, []).append(user)
    return list(groups.values())


def _defined(distance: Tensor) -> list[int]:
    """Users to reckon with: the most undefined is left out until every pair is defined."""
    off = ~torch.eye(len(distance), dtype=torch.bool)
    missing = distance.detach().cpu().isnan() & off
    kept = list(range(len(distance)))
    while len(kept) > 1 and missing[kept][:, kept].any():
        kept.pop(int(missing[kept][:, kept].sum(1).argmax()))
    return kept


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
    check_objective(objective)
    return _runs(checked(distance), groups, max_size, objective)


def _runs(
    d: Tensor, groups: int | None, max_size: int | None, objective: Objective
) -> list[list[int]]:
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


def check_objective(objective: str) -> None:
    if objective not in OBJECTIVES:
        raise UserError(f"the objective is {objective!r}; choose one of {', '.join(OBJECTIVES)}.")


def check_square(distance: Tensor) -> None:
    if distance.ndim != 2 or distance.shape[0] != distance.shape[1] or not len(distance):
        raise UserError(
            f"the distance matrix has shape {tuple(distance.shape)}; it must be square, (K, K)."
        )


def checked(distance: Tensor) -> Tensor:
    """``distance`` in double precision on the CPU, after the checks every public function makes."""
    check_square(distance)
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
