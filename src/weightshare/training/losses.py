"""Losses as sums and their counts, so that parts of a batch and ranks add up exactly."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from weightshare.training.place import Place
from weightshare.training.trees import to_device


@dataclass(frozen=True)
class Term:
    """One named part of a loss: a sum over ``count`` tokens, atoms, graphs or examples.

    A term of weight 0 is a metric: reported as ``sum / count``, never differentiated. Terms that
    are counted in the same unit should carry the same count *tensor*: when a batch is split into
    parts they are then differentiated together, in one backward pass.
    """

    sum: Tensor
    count: Tensor | float
    weight: float = 1.0


Losses = dict[str, Term]
"""What a task returns. The loss is ``sum_k weight_k * sum_k / count_k``."""


class Task(nn.Module):
    """A model with its objective: ``forward(batch) -> Losses``.

    Everything that is trained or needed to compute the loss lives inside (a student and its frozen
    teacher, say), so that one module is moved to a device and broadcast to other ranks.
    """

    def forward(self, batch: Any) -> Losses:
        raise NotImplementedError


def total(losses: Losses) -> Tensor:
    r""":math:`\sum_k w_k\, s_k / c_k` of one batch, 0-dim; a term that counts nothing gives 0."""
    terms = [t for t in losses.values() if t.weight]
    return sum((t.weight * t.sum / positive(count_of(t)) for t in terms), start=torch.zeros(()))


def count_of(term: Term) -> Tensor:
    """The count as a 0-dim tensor beside the sum."""
    like = term.sum
    if isinstance(term.count, Tensor):
        return term.count.to(like.device, like.dtype)
    return torch.full((), term.count, device=like.device, dtype=like.dtype)


def positive(count: Tensor) -> Tensor:
    """1 where nothing was counted: the sum is 0 there, and so becomes the mean."""
    return torch.where(count == 0, torch.ones_like(count), count)


@torch.no_grad()
def held_out(
    task: nn.Module, batches: Iterable[Any], place: Place | None = None
) -> dict[str, float]:
    """Each term's mean over all ``batches``, and the weighted ``loss``, in evaluation mode.

    Sums and counts are added in double precision over the batches and, where ``place`` has several
    ranks, over the ranks (each then gives its own share of the batches). The mode of every module
    is put back afterwards. A task that needs a derivative in its forward pass (forces) turns
    gradients on itself.
    """
    place = place or Place(device=next(task.parameters()).device)
    modes = {module: module.training for module in task.modules()}
    task.eval()
    sums: dict[str, list[float]] = {}
    weights: dict[str, float] = {}
    try:
        for batch in batches:
            with place.autocast():
                losses = task(to_device(batch, place.device))
            for name, term in losses.items():
                value, count = sums.get(name, (0.0, 0.0))
                sums[name] = [value + float(term.sum), count + float(term.count)]
                weights[name] = term.weight
    finally:
        for module, training in modes.items():
            module.training = training
    if place.world > 1:
        everyone: list[dict[str, list[float]]] = [{}] * place.world
        dist.all_gather_object(everyone, sums)
        sums = {
            name: [sum(one[name][0] for one in everyone), sum(one[name][1] for one in everyone)]
            for name in sums
        }
    means = {name: value / (count or 1.0) for name, (value, count) in sums.items()}
    return means | {"loss": sum(weights[name] * mean for name, mean in means.items())}
