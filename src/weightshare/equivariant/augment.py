"""Rotation augmentation as part of an update: each example is turned before the device sees it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from weightshare.equivariant.grids import random_rotations
from weightshare.training import GradientUpdate


class RotatedUpdate(GradientUpdate):
    """A gradient update on batches whose examples are rotated at random, each by its own rotation.

    The rotations are drawn while the batch is prepared, so that the update can be captured, and
    from the step's own random stream, so that a resumed run draws the same.

    Args:
        vectors: keys of the batch that hold vectors (B, ..., d); the rest stays as it is.
    """

    def __init__(
        self,
        task: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        vectors: Sequence[str],
        **options: Any,
    ) -> None:
        super().__init__(task, optimizer, **options)
        self.vectors = tuple(vectors)

    def prepare(self, batch: Any, step: int) -> Any:
        first = batch[self.vectors[0]]
        turns = random_rotations(first.shape[0], first.shape[-1]).to(first)
        turned = {
            name: torch.einsum("b...d,bed->b...e", batch[name], turns) for name in self.vectors
        }
        return super().prepare({**batch, **turned}, step)
