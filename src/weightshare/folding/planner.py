"""From a size to a plan: how many blocks go, and which of the rest share."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from weightshare.errors import UserError
from weightshare.folding.blocks import Batch, BlockLosses
from weightshare.folding.families import block_sizes, check_family
from weightshare.folding.gradients import gradient_distances
from weightshare.folding.order import Ranking
from weightshare.folding.plans import (
    BlockSizes,
    FoldPlan,
    adjacent_groups,
    count_removed,
    merge_adjacent,
    take,
)
from weightshare.sharing import contiguous

GROUPINGS = ("adjacent", "distance", "agreement")

FAR = 1e6
"""Distance, in nats, of blocks that are never to share: more than any loss."""


@dataclass(frozen=True)
class Budget:
    """What a plan has to reach: blocks to remove, sets of weights to merge away, group size.

    ``merges`` is None when every remaining block belongs to a group of ``share``; otherwise
    ``ends`` blocks at either end stay alone.
    """

    removals: int
    merges: int | None
    share: int
    ends: int = 0


def budget(
    sizes: BlockSizes, remove: float = 0.0, share: int = 1, target_params: int | None = None
) -> Budget:
    """Turn what a person asks for into counts.

    With ``target_params`` alone, half of the blocks' worth that must go is removed and half merged
    in pairs (the paper's 36 % on LLaMA-2-7B is about six removed and six shared); with ``remove``
    or ``share`` given too, that part is taken as given and sharing fills the rest.

    Raises:
        UserError: a fraction or group size that makes no sense, or a target out of reach.
    """
    if share < 1 or share > sizes.blocks:
        raise UserError(
            f"The group size is {share}; give one from 1 (no sharing) to {sizes.blocks}."
        )
    removals = count_removed(remove, sizes.blocks)
    if target_params is None:
        return Budget(removals, None if share > 1 else 0, share)
    smallest = sizes.other + sizes.shared + sizes.private
    if target_params < smallest:
        raise UserError(
            f"{target_params:,} unique parameters cannot be reached: embeddings, head and a single "
            f"block are {smallest:,} of the model's {sizes.total():,}."
        )
    if target_params >= sizes.total():
        raise UserError(
            f"The model has {sizes.total():,} unique parameters, no more than the target of "
            f"{target_params:,}; give a smaller target."
        )

    def merges_for(removed: int) -> int:
        uses = sizes.blocks - removed
        unique = (target_params - sizes.other - uses * sizes.private) // sizes.shared
        return max(0, uses - unique)

    if remove == 0 and share == 1:
        removals = merges_for(0) // 2
    ends = 2 if sizes.blocks - removals >= 8 else 1 if sizes.blocks - removals >= 4 else 0
    merges = merges_for(removals)
    middle = sizes.blocks - removals - 2 * ends
    group = max(2, share)
    while merges > middle - math.ceil(middle / group) and share == 1 and group < middle:
        group += 1
    return Budget(removals, merges, group, ends)


def plan(
    model: PreTrainedModel,
    ranking: Ranking | Sequence[int] = (),
    *,
    remove: float = 0.0,
    share: int = 1,
    target_params: int | None = None,
    protect: Sequence[int] = (),
    grouping: str = "adjacent",
    representative: str = "first",
    private: Sequence[str] = ("norm",),
    losses: BlockLosses | None = None,
) -> FoldPlan:
    """Make a plan for ``model``.

    Args:
        model: the model to fold; only its sizes are read.
        ranking: a ``Ranking``, or blocks in the order of removal.
        remove: fraction of the blocks to remove.
        share: size of the groups that share one set of weights; 1 shares nothing.
        target_params: unique parameters to reach (see ``budget``).
        protect: blocks that are neither removed nor shared.
        grouping: ``adjacent`` cuts the remaining blocks in order; ``distance`` finds the contiguous
            partition whose members replace each other at the least loss, exactly; ``agreement``
            the one whose members' gradients agree most.
        representative: see ``FoldPlan``.
        private: see ``FoldPlan``.
        losses: calibration losses, needed by every ``grouping`` but ``adjacent``.

    Raises:
        UserError: the request cannot be met.
    """
    check_family(model)
    sizes = block_sizes(model, private)
    outside = [block for block in protect if not 0 <= block < sizes.blocks]
    if outside:
        raise UserError(
            f"Block {outside[0]} cannot be protected: the model has 0 to {sizes.blocks - 1}."
        )
    wanted = budget(sizes, remove, share, target_params)
    order = ranking.order if isinstance(ranking, Ranking) else list(ranking)
    removed = take(order, wanted.removals, protect)
    remaining = [block for block in range(sizes.blocks) if block not in removed]
    groups: list[list[int]] = []
    if wanted.merges is None or wanted.merges > 0:
        if grouping not in GROUPINGS:
            raise UserError(
                f"The grouping {grouping!r} is not known; use one of {', '.join(GROUPINGS)}."
            )
        if grouping != "adjacent" and losses is None:
            raise UserError(f"grouping={grouping!r} needs calibration losses; pass losses.")
        distance = None
        if losses is not None and grouping == "distance":
            distance = replacement_costs(losses, remaining, wanted.share, representative)
        if losses is not None and grouping == "agreement":
            distance = gradient_distances(losses, remaining, private)
        groups = _groups(remaining, wanted, set(protect), distance)
    shared = tuple(tuple(group) for group in groups if len(group) > 1)
    return FoldPlan(sizes.blocks, tuple(removed), shared, representative, private=tuple(private))


def _groups(
    remaining: list[int], wanted: Budget, protected: set[int], distance: Tensor | None
) -> list[list[int]]:
    """Contiguous groups of the remaining blocks, between the protected ones."""
    if wanted.merges is None:
        runs: list[list[int]] = [[]]
        for block in remaining:
            if block in protected:
                runs.append([])
            else:
                runs[-1].append(block)
        groups = []
        for run in filter(None, runs):
            if distance is None:
                groups += adjacent_groups(run, wanted.share)
            else:
                count = math.ceil(len(run) / wanted.share)
                groups += _nearest(run, remaining, distance, count, wanted.share)
        return groups
    at_ends = set(remaining[: wanted.ends]) | set(remaining[len(remaining) - wanted.ends :])
    if distance is None:
        free = [block for block in remaining if block not in protected | at_ends]
        return merge_adjacent(free, wanted.merges, wanted.share, 0)
    middle = [block for block in remaining if block not in at_ends]
    for block in protected & set(middle):
        row = remaining.index(block)
        distance[row, :] = distance[:, row] = FAR
    return _nearest(middle, remaining, distance, len(middle) - wanted.merges, wanted.share)


def _nearest(
    run: list[int], remaining: list[int], distance: Tensor, count: int, size: int
) -> list[list[int]]:
    places = torch.tensor([remaining.index(block) for block in run])
    part = distance[places][:, places]
    return [
        [run[index] for index in group]
        for group in contiguous(part, groups=count, max_size=size, objective="within")
    ]


def replacement_costs(
    losses: BlockLosses, remaining: Sequence[int], reach: int, representative: str = "first"
) -> Tensor:
    """Loss in nats that is added when one block runs on another's weights and norms.

    Only pairs fewer than ``reach`` places apart are tried, the others are ``FAR``. Which of a pair
    stands for both follows ``representative``; for those that mix weights it is the mean of both.

    Returns:
        (K, K) symmetric float64 over the remaining blocks, in their order.
    """
    count = len(remaining)
    pairs = [
        (place, other)
        for place in range(count)
        for other in range(max(0, place - reach + 1), min(count, place + reach))
        if other != place
    ]

    def compute(batch: Batch) -> list[float]:
        hidden, sums, tokens = batch.start, [], 0.0
        for place in range(count):
            for _, other in (pair for pair in pairs if pair[0] == place):
                tried = batch.block(remaining[other], hidden, at=remaining[place])
                rest = remaining[place + 1 :]
                total, n = batch.loss(batch.run(tried, rest))
                losses.block_runs += 1 + len(rest)
                sums.append(float(total))
                tokens = float(n)
            hidden = batch.block(remaining[place], hidden)
        total, _ = batch.loss(hidden)
        losses.block_runs += count
        return [*sums, float(total), tokens]

    means = losses.mean(f"replacements among {list(remaining)} within {reach}", compute)
    cost = torch.full((count, count), FAR, dtype=torch.float64)
    for (place, other), loss in zip(pairs, means, strict=False):
        cost[place, other] = max(0.0, loss - means[-1])
    if representative == "first":
        cost = cost.tril()
        cost = cost + cost.T
    elif representative == "last":
        cost = cost.triu()
        cost = cost + cost.T
    else:
        cost = (cost + cost.T) / 2
    return cost.fill_diagonal_(0)
