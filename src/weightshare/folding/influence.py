"""How much each block changes the hidden states: Block Influence and the angular distance."""

import math

import torch
from torch import Tensor
from transformers import PreTrainedModel

from weightshare.folding.blocks import BlockLosses

Cosines = Tensor
"""(N+1, N+1) mean cosine over tokens between the hidden states in front of block i and block j."""


def block_influence(losses: BlockLosses) -> list[float]:
    """Block Influence of every block, ``1 - E[cos(h_i, h_{i+1})]``, in one forward pass.

    ShortGPT's score (arXiv 2403.03853): a block that leaves its input's direction alone is taken to
    be dispensable. Needs memory for two hidden states, whatever the depth or the length.
    """

    def compute(batch):  # type: ignore[no-untyped-def]
        hidden, sums = batch.start, []
        for block in range(losses.blocks):
            after = batch.block(block, hidden)
            sums.append(float(_cosine(hidden, after).sum()))
            hidden = after
        losses.block_runs += losses.blocks
        return [*sums, float(hidden.shape[0] * hidden.shape[1])]

    return [1.0 - mean for mean in losses.mean("block influence", compute)]


def hidden_cosines(losses: BlockLosses) -> Cosines:
    """Mean cosine between the hidden states at every two depths, for pictures and angular spans."""
    depths = losses.blocks + 1

    def compute(batch):  # type: ignore[no-untyped-def]
        states = [batch.start]
        for block in range(losses.blocks):
            states.append(batch.block(block, states[-1]))
        losses.block_runs += losses.blocks
        flat = torch.stack([torch.nn.functional.normalize(s.float(), dim=-1) for s in states])
        flat = flat.flatten(1, 2)  # (N+1, tokens, d)
        sums = torch.einsum("itd,jtd->ij", flat, flat)
        return [*sums.flatten().tolist(), float(flat.shape[1])]

    means = losses.mean("hidden cosines", compute)
    return torch.tensor(means, dtype=torch.float64).view(depths, depths)


def angular_spans(cosines: Cosines, length: int) -> list[float]:
    """Angular distance across each span of ``length`` blocks, ``arccos(cos) / pi``, by its start.

    The score of "The Unreasonable Ineffectiveness of the Deeper Layers" (arXiv 2403.17887): the
    span over which the hidden state turns least is removed as a whole.
    """
    return [
        math.acos(min(1.0, max(-1.0, float(cosines[start, start + length])))) / math.pi
        for start in range(len(cosines) - length)
    ]


def _cosine(before: Tensor, after: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)


def similarity(model: PreTrainedModel, calibration: Tensor, batch_size: int = 8) -> Cosines:
    """The similarity heat map of a model's hidden states (see ``hidden_cosines``)."""
    return hidden_cosines(BlockLosses(model, calibration, batch_size))
