"""Rotation augmentation as part of an update: each example is turned before the device sees it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weightshare.equivariant.grids import random_rotations
from weightshare.training import GradientUpdate


def turned(
    batch: dict[str, Tensor],
    rotations: Tensor,
    vectors: Sequence[str],
    tensors: Sequence[str] = (),
) -> dict[str, Tensor]:
    """The batch with example b rotated by ``rotations[b]``.

    Tensors named in ``vectors`` end in a vector, those in ``tensors`` in a matrix. Their first axis
    are the examples, or points whose example stands in ``batch["batch"]``.
    """
    changed = {}
    for name in [*vectors, *tensors]:
        if name not in batch:
            continue
        x = batch[name]
        # Points of several examples one after another carry their example's number.
        flat = "batch" in batch and len(x) == len(batch["batch"]) != len(rotations)
        turns = rotations[batch["batch"]] if flat else rotations
        shape = (len(turns), *(1,) * (x.ndim - 2 - (name in tensors)), *turns.shape[1:])
        moved = turns.view(shape) @ (x if name in tensors else x.unsqueeze(-1))
        changed[name] = moved @ turns.view(shape).mT if name in tensors else moved.squeeze(-1)
    return {**batch, **changed}


class RotatedUpdate(GradientUpdate):
    """A gradient update on batches whose examples are rotated at random, each by its own rotation.

    The rotations are drawn while the batch is prepared, so that the update can be captured, and
    from the step's own random stream, so that a resumed run draws the same.

    Args:
        vectors, tensors: keys of the batch that turn, see ``turned``; the rest stays as it is.
        signs: keys that change sign together in half of the examples: all charges, where only
            their products act.
        examples: key whose first axis counts the examples.
    """

    def __init__(
        self,
        task: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        vectors: Sequence[str],
        tensors: Sequence[str] = (),
        signs: Sequence[str] = (),
        examples: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(task, optimizer, **options)
        self.vectors, self.tensors = tuple(vectors), tuple(tensors)
        self.signs, self.examples = tuple(signs), examples or self.vectors[0]

    def prepare(self, batch: Any, step: int) -> Any:
        first = batch[self.vectors[0]]
        turns = random_rotations(len(batch[self.examples]), first.shape[-1]).to(first)
        batch = turned(batch, turns, self.vectors, self.tensors)
        if self.signs:
            sign = 1.0 - 2.0 * torch.randint(2, (len(turns),))
            batch |= {name: _times(batch[name], sign) for name in self.signs}
        return super().prepare(batch, step)


def _times(x: Tensor, factors: Tensor) -> Tensor:
    return x * factors.to(x).view(-1, *(1,) * (x.ndim - 1))
