"""The step that an unsharing makes possible, and the loss's slope and curvature along it."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weightshare.audit.unsharing import Unsharing
from weightshare.sharing import Use, accumulate, displaced, per_use
from weightshare.sharing.gradients import Gradients

Loss = Callable[[nn.Module, Any], Tensor]
Offsets = dict[str, dict[Use, Tensor]]
Reduce = Callable[[Gradients[Any]], Gradients[Any]]
"""Turns one rank's gradients into those of the whole batch."""


Progress = Callable[[str], object]


def silent(_: str) -> None:
    """Nobody is told."""


def alone(gradients: Gradients[Any]) -> Gradients[Any]:
    """There is one process: its gradients are all there are."""
    return gradients


def mean_gradients(
    model: nn.Module,
    batches: Sequence[Any],
    loss: Loss,
    names: Sequence[str],
    reduce: Reduce = alone,
) -> tuple[Gradients[Use], dict[str, Tensor]]:
    """Each use's gradient, averaged over the batches, and the elementwise root mean square.

    The latter is over batches and uses together: what Adam's second moment settles at.
    """
    total: Gradients[Use] | None = None
    squares: dict[str, Tensor] = {}
    with per_use(model, names) as uses:
        for batch in batches:
            found = reduce(uses.gradients(loss(model, batch)))
            for name, each in found.items():
                square = torch.stack([dense(g).square() for g in each.values()]).mean(0)
                square = square / len(batches)
                squares[name] = squares[name] + square if name in squares else square
            wide: Gradients[Use] = {
                name: {use: dense(g) for use, g in each.items()} for name, each in found.items()
            }
            total = accumulate(total, wide)
    mean: Gradients[Use] = {
        name: {use: dense(g) / len(batches) for use, g in each.items()}
        for name, each in (total or {}).items()
    }
    return mean, {name: square.sqrt() for name, square in squares.items()}


def step(
    model: nn.Module,
    unsharing: Unsharing,
    gradients: Gradients[Use],
    spread: Mapping[str, Tensor],
) -> tuple[Offsets, dict[str, Tensor]]:
    """The step v that an unsharing makes possible, and the row space of its low-rank deltas."""
    offsets: Offsets = {}
    bases: dict[str, Tensor] = {}
    for name, users in unsharing.layer.tensors.items():
        weight = dense(model.get_parameter(name).detach())
        grouped = {use: unsharing.group_of(user) for use, user in users.items()}
        found = gradients.get(name, {})
        members = {use: g for use, g in grouped.items() if g is not None and use in found}
        if len(set(members.values())) < 2:
            continue
        divisor = torch.ones_like(weight)
        if name in spread:
            # A thousandth of the mean keeps weights that hardly ever get a gradient at rest.
            divisor = spread[name] + 1e-3 * spread[name].mean() + torch.finfo(weight.dtype).tiny
        overall = torch.stack([dense(found[use]) for use in members]).mean(0)
        for number in sorted(set(members.values())):
            uses = [use for use, g in members.items() if g == number]
            deviation = torch.stack([dense(found[use]) for use in uses]).mean(0) - overall
            projected, basis = _project(unsharing, weight, deviation, divisor)
            if basis is not None and number > 0:
                bases[f"{name}@{number}"] = basis
            if projected is not None:
                offsets.setdefault(name, {}).update(dict.fromkeys(uses, -projected))
    return offsets, bases


def _project(
    unsharing: Unsharing, weight: Tensor, deviation: Tensor, divisor: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """``deviation / divisor`` in the space the action can reach."""
    if unsharing.kind == "unshare" or (unsharing.kind == "scale" and weight.ndim < 2):
        return deviation / divisor, None
    if unsharing.kind == "scale":
        # Of the factors themselves: their gradient, and what Adam would divide it by.
        rows = weight.flatten(1)
        slope = (rows * deviation.flatten(1)).sum(1)
        scale = (rows * divisor.flatten(1)).norm(dim=1).clamp(min=torch.finfo(rows.dtype).tiny)
        factor = slope / (scale if bool((divisor != 1).any()) else scale.square())
        return (factor[:, None] * rows).view_as(weight), None
    if weight.ndim < 2:
        return None, None
    flat = (deviation / divisor).flatten(1).float()
    rank = unsharing.rank_of(weight)
    u, s, vh = _leading(flat, rank)
    return ((u * s) @ vh).to(weight.dtype).view_as(weight), vh


def _leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triplets; randomised above a size where the full SVD is slow."""
    if min(matrix.shape) <= 512:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], s[:rank], vh[:rank]
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(matrix, q=min(rank + 8, *matrix.shape), niter=4)
    return u[:, :rank], s[:rank], v[:, :rank].T


def slope_along(gradients: Mapping[str, Mapping[Use, Any]], offsets: Offsets) -> float:
    """The loss's slope along the offsets; a use without a gradient has none."""
    return sum(
        float((dense(gradients[name][use]) * offset).sum(dtype=torch.float64))
        for name, uses in offsets.items()
        for use, offset in uses.items()
        if use in gradients.get(name, {})
    )


def unit(model: nn.Module, offsets: Offsets) -> float:
    """The multiple of the offsets that has the norm of the weights they move."""
    weights = sum(
        len(uses) * float(model.get_parameter(name).detach().double().square().sum())
        for name, uses in offsets.items()
    )
    moved = sum(
        float(o.double().square().sum()) for uses in offsets.values() for o in uses.values()
    )
    return (math.sqrt(weights) or 1.0) / math.sqrt(moved) if moved > 0 else 0.0


def curvature(
    model: nn.Module,
    batches: Sequence[Any],
    loss: Loss,
    offsets: Offsets,
    reduce: Reduce = alone,
    reach: float = 1e-2,
) -> float:
    """``vᵀHv`` of the mean loss, by a central difference of its slope along v.

    The difference is taken at ``reach`` of the weights' norm: far above rounding, and exact on a
    quadratic.
    """
    epsilon = reach * unit(model, offsets)
    if epsilon == 0:
        return math.nan
    like = next(iter(next(iter(offsets.values())).values()))
    slopes = []
    for sign in (1.0, -1.0):
        total = torch.zeros((), dtype=torch.float64, device=like.device)
        for batch in batches:
            amount = torch.tensor(sign * epsilon, dtype=like.dtype, device=like.device)
            amount.requires_grad_()
            with displaced(model, offsets, amount):
                value = loss(model, batch)
            total += torch.autograd.grad(value, amount)[0]
        (mean,) = reduce({"slope": {0: total / len(batches)}})["slope"].values()
        slopes.append(float(dense(mean)))
    return (slopes[0] - slopes[1]) / (2 * epsilon)


def dense(gradient: Any) -> Tensor:
    """A whole gradient, in float32 at least: sums of bfloat16 numbers lose what is looked for."""
    assert isinstance(gradient, Tensor)
    return gradient.float() if gradient.dtype in (torch.bfloat16, torch.float16) else gradient
