"""Choose blocks by what their removal costs: leave one out, greedily, all subsets, swaps."""

import itertools
import math
from collections.abc import Iterable, Sequence

from weightshare.errors import UserError
from weightshare.folding.blocks import Batch, BlockLosses

MOST_SUBSETS = 20_000
"""Above this many subsets an exhaustive search is refused: hours on any real model."""


def one_shot(losses: BlockLosses) -> dict[int, float]:
    """Loss without each block alone: exact for one block, blind to what two blocks do together."""
    every = range(losses.blocks)
    return losses.without_each(list(every), list(every))


def greedy(
    losses: BlockLosses, count: int, protect: Iterable[int] = ()
) -> tuple[list[int], list[float]]:
    """Remove the block whose removal costs least, then the next one given the first, and so on.

    SLEB's rule (arXiv 2402.09025). The hidden states in front of a candidate are reused, so block j
    of N costs N - j block runs and a round about half of N forward passes.

    Returns:
        The removed blocks in order, and the loss after each removal.
    """
    remaining, order, path = list(range(losses.blocks)), [], []
    protected = set(protect)
    for _ in range(count):
        candidates = [block for block in remaining if block not in protected]
        costs = losses.without_each(remaining, candidates)
        cheapest = min(candidates, key=costs.__getitem__)
        remaining.remove(cheapest)
        order.append(cheapest)
        path.append(costs[cheapest])
    return order, path


def swaps(
    losses: BlockLosses, removed: Sequence[int], protect: Iterable[int] = ()
) -> tuple[list[int], float, int]:
    """Exchange removed and kept blocks while that lowers the loss (a local optimum of 1-swaps).

    For each removed block in turn it is put back and the best block to take out instead is sought;
    all exchanges of one block share their hidden states.

    Returns:
        The removed blocks, their loss, and the number of exchanges made.
    """
    chosen, protected, made = list(removed), set(protect), 0
    best = losses.of([b for b in range(losses.blocks) if b not in chosen])
    improved = bool(chosen)
    while improved:
        improved = False
        for back in list(chosen):
            with_back = [b for b in range(losses.blocks) if b not in chosen or b == back]
            candidates = [b for b in with_back if b not in protected and b != back]
            costs = losses.without_each(with_back, candidates)
            out = min(candidates, key=costs.__getitem__, default=back)
            if out != back and costs[out] < best:
                best, improved, made = costs[out], True, made + 1
                chosen[chosen.index(back)] = out
    return chosen, best, made


def exhaustive(
    losses: BlockLosses, count: int, protect: Iterable[int] = ()
) -> dict[tuple[int, ...], float]:
    """Loss of every subset of ``count`` removed blocks, sharing the blocks in front of each choice.

    Raises:
        UserError: there are more than ``MOST_SUBSETS`` subsets.
    """
    allowed = sorted(set(range(losses.blocks)) - set(protect))
    subsets = math.comb(len(allowed), count)
    if subsets > MOST_SUBSETS:
        raise UserError(
            f"An exhaustive search over {count} of {len(allowed)} blocks has {subsets:,} subsets, "
            f"more than {MOST_SUBSETS:,}; use greedy with swaps instead."
        )
    order = list(itertools.combinations(allowed, count))

    def compute(batch: Batch) -> list[float]:
        sums: dict[tuple[int, ...], float] = {}
        tokens = 0.0

        def descend(hidden, block: int, gone: tuple[int, ...]) -> None:  # type: ignore[no-untyped-def]
            nonlocal tokens
            left = [b for b in allowed if b >= block]
            if len(gone) == count or not left:
                if len(gone) == count:
                    rest = range(block, losses.blocks)
                    losses.block_runs += len(rest)
                    total, n = batch.loss(batch.run(hidden, list(rest)))
                    sums[gone], tokens = float(total), float(n)
                return
            if len(gone) + len(left) < count:
                return
            if block in allowed:
                descend(hidden, block + 1, (*gone, block))
            losses.block_runs += 1
            descend(batch.block(block, hidden), block + 1, gone)

        descend(batch.start, 0, ())
        return [*(sums[subset] for subset in order), tokens]

    means = losses.mean(f"all subsets of {count} from {allowed}", compute)
    return dict(zip(order, means, strict=True))
