"""How far the blocks' gradients agree: a measure for choosing who shares with whom."""

from collections.abc import Sequence

import torch
from torch import Tensor

from weightshare.folding.blocks import BlockLosses
from weightshare.folding.families import blocks_of
from weightshare.folding.modeling_folded import is_private
from weightshare.language import evaluating, next_token_loss
from weightshare.sharing import Gram, by_tensor

CONTEXT = 2
"""Sequences per gradient: the debiased cosine compares gradients of different contexts."""


def gradient_distances(
    losses: BlockLosses, remaining: Sequence[int], private: Sequence[str] = ("norm",)
) -> Tensor:
    """``1 - cosine`` between the loss gradients of two blocks' weights, matrix by matrix.

    Blocks that would be pushed the same way can be pushed as one. Needs one backward pass per
    ``CONTEXT`` calibration sequences and the gradients of all blocks at once.

    Returns:
        (K, K) symmetric float64 over the remaining blocks, in their order.
    """

    def compute() -> list[list[float]]:
        gram = Gram(remaining)
        for ids in torch.cat(list(losses.batches)).split(CONTEXT):
            gram.update(by_tensor(_gradients(losses, ids, remaining, private)))
        # Not a number: a block whose gradient is no more than noise. It agrees with nobody.
        distance = gram.close().distance().nan_to_num(nan=1.0).fill_diagonal_(0)
        rows: list[list[float]] = distance.tolist()
        return rows

    rows = losses.memo(f"gradient distances among {list(remaining)}", compute)
    return torch.tensor(rows, dtype=torch.float64)


def _gradients(
    losses: BlockLosses, ids: Tensor, remaining: Sequence[int], private: Sequence[str]
) -> dict[int, dict[str, Tensor]]:
    model = losses.model
    named = {
        (block, name): parameter
        for block in remaining
        for name, parameter in blocks_of(model)[block].named_parameters()
        if not is_private(name, list(private))
    }
    asked = {parameter: parameter.requires_grad for parameter in named.values()}
    ids = ids.to(model.device)
    try:
        for parameter in asked:
            parameter.requires_grad_(True)
        with evaluating(model), torch.enable_grad():
            total, count = next_token_loss(model(input_ids=ids, use_cache=False).logits, ids)
            found = torch.autograd.grad(total / count, list(named.values()))
    finally:
        for parameter, wanted in asked.items():
            parameter.requires_grad_(wanted)
    losses.block_runs += 3 * losses.blocks
    gradients: dict[int, dict[str, Tensor]] = {block: {} for block in remaining}
    for (block, name), gradient in zip(named, found, strict=True):
        gradients[block][name] = gradient
    return gradients
