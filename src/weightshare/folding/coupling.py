r"""Second-order coupling between blocks, from the gates' gradient and Hessian at the full model.

With the gates g of ``folding.gates``, removing the set S changes the loss by about

.. math:: \Delta(S) = -\sum_{i\in S} \partial_i L + \tfrac12 \sum_{i,j\in S} \partial_i\partial_j L,

an N x N quadratic that is minimised over subsets (after arXiv 2602.00161). It is local: two blocks
either of which saturates the loss look free to it, so pair it with ``refine="swaps"``.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from weightshare.folding.blocks import BlockLosses
from weightshare.folding.gates import frozen, gated
from weightshare.folding.order import Ranking, ascending
from weightshare.language import evaluating, next_token_loss

MOST_SUBSETS = 200_000
"""Above this many subsets the quadratic is minimised greedily; below, exactly."""


def gate_derivatives(losses: BlockLosses) -> tuple[Tensor, Tensor]:
    """Gradient (N,) and Hessian (N, N) of the calibration loss with respect to the gates, at 1."""
    blocks = losses.blocks

    def compute(ids: Tensor) -> list[float]:
        gates = torch.ones(blocks, requires_grad=True, device=losses.model.device)
        # Flash and fused attention cannot be differentiated twice.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), gated(losses.model, gates):
            total, count = next_token_loss(losses.model(input_ids=ids, use_cache=False).logits, ids)
            (slope,) = torch.autograd.grad(total, gates, create_graph=True)
            rows = [
                torch.autograd.grad(slope[i], gates, retain_graph=i + 1 < blocks)[0]
                for i in range(blocks)
            ]
        losses.block_runs += 2 * (blocks + 1) * blocks
        return [*slope.detach().tolist(), *torch.stack(rows).flatten().tolist(), float(count)]

    with frozen(losses.model), evaluating(losses.model):
        means = torch.tensor(
            losses.mean("gate derivatives", lambda batch: compute(batch.ids)), dtype=torch.float64
        )
    hessian = means[blocks:].view(blocks, blocks)
    return means[:blocks], (hessian + hessian.T) / 2


def best_subset(
    slope: Tensor, hessian: Tensor, remove: int, protect: Sequence[int] = ()
) -> tuple[list[int], float]:
    """The set with the least predicted loss change, exact when there are few enough sets."""
    allowed = [block for block in range(len(slope)) if block not in set(protect)]

    def change(subset: Sequence[int]) -> float:
        index = torch.tensor(list(subset))
        return float(hessian[index][:, index].sum() / 2 - slope[index].sum()) if subset else 0.0

    if math.comb(len(allowed), remove) <= MOST_SUBSETS:
        sets = torch.tensor(list(itertools.combinations(allowed, remove)), dtype=torch.long)
        values = hessian[sets[:, :, None], sets[:, None, :]].sum((1, 2)) / 2 - slope[sets].sum(1)
        best = int(values.argmin())
        return sets[best].tolist(), float(values[best])
    chosen: list[int] = []
    for _ in range(remove):
        rest = [block for block in allowed if block not in chosen]
        chosen.append(min(rest, key=lambda block: change([*chosen, block])))
    return chosen, change(chosen)


def rank_by_coupling(losses: BlockLosses, remove: int, protect: Sequence[int]) -> Ranking:
    """Remove the set that the quadratic model says costs least."""
    slope, hessian = gate_derivatives(losses)
    chosen, predicted = best_subset(slope, hessian, remove, protect)
    alone = (hessian.diagonal() / 2 - slope).tolist()
    chosen.sort(key=alone.__getitem__)
    rest = [block for block in ascending(alone, protect) if block not in chosen]
    found = {"slope": slope.tolist(), "hessian": hessian.tolist(), "predicted": predicted}
    return Ranking("coupling", alone, [*chosen, *rest], found)
