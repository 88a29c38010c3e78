"""What to unshare, and what it would buy.

A layer whose users are split into groups g of n_g users has in each group the mean gradient ḡ_g;
the shared weight can follow only their overall mean ḡ. What separate weights add is a step along

    v_u = -(ḡ_g(u) - ḡ) / d,      projected on what the action can express,

where d is the metric: one, or the root mean square that Adam would divide by (equal for all users,
so that v has no common part). With slope s = Σ_u ⟨g_u, v_u⟩ < 0 and curvature c = vᵀHv the loss
falls along v by at most

    predicted gain = s² / (2 c),

exactly so where the loss is quadratic along v. Where it curves down (c <= 0) the parabola has no
end: there the step goes as far as a tenth of the weights' norm and gains |s| a + |c| a² / 2. v is
taken from half of the batches, s and c from the other, so that noise cannot promise a gain.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from weightshare.audit.layers import Layer
from weightshare.errors import UserError
from weightshare.sharing import Use, accumulate, displaced, partition, per_use
from weightshare.sharing.gradients import Gradients

if TYPE_CHECKING:
    from weightshare.audit.examine import Finding

Kind = Literal["nothing", "scale", "low_rank", "unshare"]
KINDS: tuple[Kind, ...] = ("scale", "low_rank", "unshare")
SAYS = {
    "nothing": "leave it shared",
    "scale": "private scales",
    "low_rank": "low-rank deltas",
    "unshare": "weights of their own",
}
Metric = Literal["adam", "plain"]
Loss = Callable[[nn.Module, Any], Tensor]
Offsets = dict[str, dict[Use, Tensor]]


@dataclass(frozen=True)
class Unsharing:
    """One way to give groups of a layer's users something of their own.

    The first group keeps the shared weight; every other group gets, for each tensor,

    * ``scale``: a factor per output row (a vector, such as a norm, is copied),
    * ``low_rank``: a delta of that ``rank`` (vectors stay shared),
    * ``unshare``: a copy.
    """

    kind: Kind
    layer: Layer
    groups: tuple[tuple[str, ...], ...]
    rank: int = 0

    def added(self, model: nn.Module) -> int:
        """Parameters it adds."""
        each = sum(self._added(model.get_parameter(name)) for name in self.layer.tensors)
        return each * (len(self.groups) - 1)

    def _added(self, weight: Tensor) -> int:
        if self.kind == "nothing":
            return 0
        if self.kind == "unshare" or (self.kind == "scale" and weight.ndim < 2):
            return weight.numel()
        if self.kind == "scale":
            return len(weight)
        return self.rank_of(weight) * (len(weight) + weight[0].numel()) if weight.ndim > 1 else 0

    def rank_of(self, weight: Tensor) -> int:
        """The rank a delta of ``weight`` has: never so much that a copy would be smaller."""
        rows, columns = len(weight), weight[0].numel()
        return max(1, min(self.rank, rows * columns // (rows + columns)))

    def group_of(self, user: str) -> int | None:
        """The group a user belongs to; None for one that never received a gradient."""
        for number, group in enumerate(self.groups):
            if user in group:
                return number
        return None


@dataclass(frozen=True)
class Suggestion:
    """An unsharing and what it promises: ``predicted`` nats (or whatever the loss is in).

    ``first_order`` is the loss decrease per unit of learning rate of one gradient step, ``slope``
    and ``curvature`` are those along the step, ``longest`` the step that a tenth of the weights'
    norm allows; ``predicted`` is 0 where the held-out half of the batches saw no decrease.
    ``beyond_chance``: whether the layer's users disagree more than the permutation null.
    """

    unsharing: Unsharing
    added: int
    slope: float = 0.0
    curvature: float = math.nan
    longest: float = 0.0
    beyond_chance: bool = False
    reason: str = ""
    directions: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def first_order(self) -> float:
        return max(0.0, -self.slope)

    @property
    def predicted(self) -> float:
        if self.unsharing.kind == "nothing" or self.slope >= 0:
            return 0.0
        if not self.curvature > 0:
            return -self.slope * self.longest - self.curvature * self.longest**2 / 2
        return self.slope**2 / (2 * self.curvature)

    @property
    def gain_per_parameter(self) -> float:
        return self.predicted / self.added if self.added else 0.0

    def row(self) -> dict[str, Any]:
        """One line of the ranked list."""
        u = self.unsharing
        groups = " | ".join(", ".join(group) for group in u.groups)
        gain = self.predicted
        return {
            "shared weight": u.layer.name,
            "do": SAYS[u.kind] + (f" (rank {u.rank})" if u.kind == "low_rank" else ""),
            "groups": groups if u.kind != "nothing" else "-",
            "added": self.added,
            "predicted gain": float(f"{gain:.3g}"),
            "per million": float(f"{1e6 * self.gain_per_parameter:.3g}"),
            "beyond chance": self.beyond_chance,
        }


def suggest(
    model: nn.Module,
    batches: Sequence[Any],
    loss: Loss,
    findings: Sequence["Finding"],
    *,
    rank: int = 4,
    kinds: Sequence[Kind] = KINDS,
    metric: Metric = "adam",
) -> list[Suggestion]:
    """Every way to unshare every layer that was audited, and leaving it; best first.

    Ranked by predicted gain per added parameter, those beyond chance before those that are not.
    The groups of a layer are the split that gains most at first order, in the gradients' own
    length, among those users that received one.
    """
    wanted, left = [], []
    for found in findings:
        groups = found_groups(found)
        if groups is None:
            left.append(nothing(found.layer, found.split.reason))
            continue
        wanted += [Unsharing(kind, found.layer, groups, rank) for kind in kinds]
        if not found.split.advised:
            left.append(nothing(found.layer, found.split.reason))
    beyond = {found.layer: found.split.advised for found in findings}
    predicted = predict(model, batches, loss, wanted, beyond, metric)
    return sorted([*predicted, *left], key=_rank)


def _rank(suggestion: Suggestion) -> tuple[int, float]:
    gain = suggestion.gain_per_parameter
    useful = suggestion.beyond_chance and gain > 0
    kept = suggestion.unsharing.kind == "nothing"
    return 0 if useful else 1 if kept else 2, -gain


def found_groups(found: "Finding") -> tuple[tuple[str, ...], ...] | None:
    """The advised groups of a layer, or the best two by the gradients' own lengths."""
    if found.split.advised:
        return found.split.groups
    try:
        chosen = partition(found.gram.distance(unit=False), 2)
    except UserError:
        return None
    users = found.layer.users
    return tuple(
        tuple(users[u] for u in group if u not in chosen.undefined) for group in chosen.groups
    )


def nothing(layer: Layer, reason: str) -> Suggestion:
    return Suggestion(Unsharing("nothing", layer, (layer.users,)), added=0, reason=reason)


def predict(
    model: nn.Module,
    batches: Sequence[Any],
    loss: Loss,
    unsharings: Sequence[Unsharing],
    beyond: Mapping[Layer, bool] | None = None,
    metric: Metric = "adam",
    bends: int = 4,
    together: int = 2**28,
) -> list[Suggestion]:
    """Slope and curvature of each unsharing.

    Slopes take two passes over the batches in all; a curvature takes two passes over ``bends``
    batches for each unsharing, because it varies less from batch to batch than a slope does.

    ``metric="adam"`` predicts for a model that is trained with Adam, as nearly all are;
    ``"plain"`` for gradient descent.

    Memory: two gradients per use of the layers looked at together, at most ``together`` elements
    (1 GB in float32), or one layer.
    """
    ours, theirs = list(batches[0::2]), list(batches[1::2])
    result: dict[int, Suggestion] = {}
    for layers in _portions(model, [u.layer for u in unsharings], together):
        names = sorted({name for layer in layers for name in layer.tensors})
        directing, spread = mean_gradients(model, ours, loss, names)
        measuring, _ = mean_gradients(model, theirs, loss, names)
        for number, unsharing in enumerate(unsharings):
            if unsharing.layer not in layers:
                continue
            offsets, bases = step(model, unsharing, directing, spread if metric == "adam" else {})
            slope = sum(
                float((_dense(measuring[name][use]) * offset).sum(dtype=torch.float64))
                for name, uses in offsets.items()
                for use, offset in uses.items()
                if use in measuring.get(name, {})
            )
            result[number] = Suggestion(
                unsharing,
                added=unsharing.added(model),
                slope=slope,
                curvature=curvature(model, theirs[:bends], loss, offsets)
                if slope < 0
                else math.nan,
                longest=0.1 * unit(model, offsets),
                beyond_chance=bool((beyond or {}).get(unsharing.layer, False)),
                directions=bases,
            )
    return [result[number] for number in range(len(unsharings))]


def mean_gradients(
    model: nn.Module, batches: Sequence[Any], loss: Loss, names: Sequence[str]
) -> tuple[Gradients[Use], dict[str, Tensor]]:
    """Each use's gradient, averaged over the batches, and the elementwise root mean square.

    The latter is over batches and uses together: what Adam's second moment settles at.
    """
    total: Gradients[Use] | None = None
    squares: dict[str, Tensor] = {}
    with per_use(model, names) as uses:
        for batch in batches:
            found = uses.gradients(loss(model, batch))
            for name, each in found.items():
                square = torch.stack([_dense(g).square() for g in each.values()]).mean(0)
                square = square / len(batches)
                squares[name] = squares[name] + square if name in squares else square
            wide: Gradients[Use] = {
                name: {use: _dense(g) for use, g in each.items()} for name, each in found.items()
            }
            total = accumulate(total, wide)
    mean: Gradients[Use] = {
        name: {use: _dense(g) / len(batches) for use, g in each.items()}
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
        weight = _dense(model.get_parameter(name).detach())
        grouped = {use: unsharing.group_of(user) for use, user in users.items()}
        found = gradients.get(name, {})
        members = {use: g for use, g in grouped.items() if g is not None and use in found}
        if len(set(members.values())) < 2:
            continue
        divisor = torch.ones_like(weight)
        if name in spread:
            # A thousandth of the mean keeps weights that hardly ever get a gradient at rest.
            divisor = spread[name] + 1e-3 * spread[name].mean() + torch.finfo(weight.dtype).tiny
        overall = torch.stack([_dense(found[use]) for use in members]).mean(0)
        for number in sorted(set(members.values())):
            uses = [use for use, g in members.items() if g == number]
            deviation = torch.stack([_dense(found[use]) for use in uses]).mean(0) - overall
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
    model: nn.Module, batches: Sequence[Any], loss: Loss, offsets: Offsets, reach: float = 1e-2
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
        total = 0.0
        for batch in batches:
            amount = torch.tensor(sign * epsilon, dtype=like.dtype, device=like.device)
            amount.requires_grad_()
            with displaced(model, offsets, amount):
                value = loss(model, batch)
            total += float(torch.autograd.grad(value, amount)[0])
        slopes.append(total / len(batches))
    return (slopes[0] - slopes[1]) / (2 * epsilon)


def _dense(gradient: Any) -> Tensor:
    """A whole gradient, in float32 at least: sums of bfloat16 numbers lose what is looked for."""
    assert isinstance(gradient, Tensor)
    return gradient.float() if gradient.dtype in (torch.bfloat16, torch.float16) else gradient


def _portions(model: nn.Module, layers: Sequence[Layer], together: int) -> list[list[Layer]]:
    portions: list[list[Layer]] = [[]] if layers else []
    room = together
    for layer in dict.fromkeys(layers):
        need = 2 * sum(
            model.get_parameter(name).numel() * len(users) for name, users in layer.tensors.items()
        )
        if portions[-1] and need > room:
            portions.append([])
            room = together
        portions[-1].append(layer)
        room -= need
    return portions
