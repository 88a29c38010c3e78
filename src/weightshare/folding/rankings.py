"""Every way to choose the blocks to remove, behind one function."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from weightshare.errors import UserError
from weightshare.folding.blocks import BlockLosses, Memo, no_memo
from weightshare.folding.config import RANKINGS, GateConfig
from weightshare.folding.coupling import rank_by_coupling
from weightshare.folding.families import blocks_of, check_family
from weightshare.folding.gates import rank_by_gates
from weightshare.folding.influence import angular_spans, block_influence, hidden_cosines
from weightshare.folding.order import Ranking, ascending
from weightshare.folding.plans import take
from weightshare.folding.search import exhaustive, greedy, one_shot, swaps


def rank(
    model: PreTrainedModel,
    calibration: Tensor,
    method: str = "greedy",
    *,
    remove: int,
    protect: Sequence[int] = (),
    refine: str = "none",
    seed: int = 0,
    batch_size: int = 8,
    gates: GateConfig | None = None,
    memo: Memo = no_memo,
    progress: Callable[[str], None] | None = None,
) -> Ranking:
    """Rank a model's blocks for removal.

    Args:
        model: a causal language model of a supported family; left as it is.
        calibration: token ids (n, length) without padding.
        method: one of ``folding.RANKINGS``.
        remove: how many blocks will go; searching methods need to know.
        protect: blocks that must stay.
        refine: ``"swaps"`` exchanges removed and kept blocks while the calibration loss falls.
        seed: for gates and random.
        batch_size: sequences per forward pass.
        gates: settings of the gate learner.
        memo: keeps partial results, so that a killed ranking goes on (``run.memo``).
        progress: called with a line when a stage begins.

    Raises:
        UserError: an unknown method, or more blocks to remove than may go.
    """
    check_family(model)
    if method not in RANKINGS:
        raise UserError(f"The ranking {method!r} is not known; use one of {', '.join(RANKINGS)}.")
    if refine not in ("none", "swaps"):
        raise UserError(f"The refinement {refine!r} is not known; use 'none' or 'swaps'.")
    blocks = len(blocks_of(model))
    if not 0 <= remove <= blocks - max(1, len(set(protect))):
        raise UserError(
            f"{remove} of {blocks} blocks should go while {len(set(protect))} are protected; "
            "at least one block must stay."
        )
    losses = BlockLosses(model, calibration, batch_size, memo)
    say = progress or (lambda line: None)
    say(f"ranking {blocks} blocks by {method}")
    if method == "gates":
        ranking = rank_by_gates(losses, remove, protect, gates or GateConfig(), seed, say)
    else:
        ranking = _METHODS[method](losses, remove, protect, seed)
    if refine == "swaps" and remove:
        say("refining by swaps")
        chosen, loss, made = swaps(losses, take(ranking.order, remove, protect), protect)
        rest = [block for block in ranking.order if block not in chosen]
        found = {"swaps": made, "loss": loss, "before_swaps": ranking.order[:remove]}
        ranking = Ranking(method, ranking.scores, [*chosen, *rest], {**ranking.metadata, **found})
    ranking.metadata["block_runs"] = losses.block_runs
    return ranking


def _by_influence(losses: BlockLosses, remove: int, protect: Sequence[int], seed: int) -> Ranking:
    scores = block_influence(losses)
    return Ranking("block_influence", scores, ascending(scores, protect))


def _by_angle(losses: BlockLosses, remove: int, protect: Sequence[int], seed: int) -> Ranking:
    cosines = hidden_cosines(losses)
    length = max(1, remove)
    spans = angular_spans(cosines, length)
    free = [
        start for start in range(len(spans)) if not set(protect) & set(range(start, start + length))
    ]
    if not free:
        raise UserError(f"No {length} blocks in a row are unprotected; protect or remove fewer.")
    start = min(free, key=spans.__getitem__)
    span = list(range(start, start + length))
    scores = angular_spans(cosines, 1)
    rest = [block for block in ascending(scores, protect) if block not in span]
    return Ranking("angular", scores, [*span, *rest], {"spans": spans, "start": start})


def _by_loss(losses: BlockLosses, remove: int, protect: Sequence[int], seed: int) -> Ranking:
    costs = one_shot(losses)
    scores = [costs[block] for block in range(losses.blocks)]
    return Ranking("one_shot", scores, ascending(scores, protect))


def _by_greed(losses: BlockLosses, remove: int, protect: Sequence[int], seed: int) -> Ranking:
    order, path = greedy(losses, remove, protect)
    rest = [block for block in range(losses.blocks) if block not in order]
    # The later a block goes, the more important it is; what stays is above all of them.
    scores = [float(order.index(b)) if b in order else float(remove) for b in range(losses.blocks)]
    return Ranking("greedy", scores, [*order, *rest], {"path": path})


def _at_random(losses: BlockLosses, remove: int, protect: Sequence[int], seed: int) -> Ranking:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(losses.blocks, generator=generator, dtype=torch.float64).tolist()
    return Ranking("random", scores, ascending(scores, protect))


def _by_all(losses: BlockLosses, remove: int, protect: Sequence[int], seed: int) -> Ranking:
    table = exhaustive(losses, remove, protect)
    best = min(table, key=table.__getitem__)
    # A block's score: the best loss reachable when it is removed.
    scores = [
        min(
            (loss for subset, loss in table.items() if block in subset),
            default=float(max(table.values())),
        )
        for block in range(losses.blocks)
    ]
    rest = [block for block in ascending(scores, protect) if block not in best]
    ordered = sorted(table.values())
    found = {"subsets": len(table), "best": ordered[0], "median": ordered[len(ordered) // 2]}
    return Ranking("exhaustive", scores, [*best, *rest], {**found, "worst": ordered[-1]})


def _by_coupling(losses: BlockLosses, remove: int, protect: Sequence[int], seed: int) -> Ranking:
    return rank_by_coupling(losses, remove, protect)


_METHODS: dict[str, Callable[[BlockLosses, int, Sequence[int], int], Ranking]] = {
    "block_influence": _by_influence,
    "angular": _by_angle,
    "one_shot": _by_loss,
    "greedy": _by_greed,
    "coupling": _by_coupling,
    "random": _at_random,
    "exhaustive": _by_all,
}
