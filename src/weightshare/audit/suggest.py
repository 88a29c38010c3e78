"""What to unshare, and what it would buy.

A layer whose users are split into groups g of n_g users has in each group the mean gradient ḡ_g;
the shared weight can follow only their overall mean ḡ. What separate weights add is a step along

    v_u = -(ḡ_g(u) - ḡ) / d,      projected on what the action can express,

where d is the metric: one, or the root mean square that Adam would divide by (equal for all users,
so that v has no common part). With slope s = Σ_u ⟨g_u, v_u⟩ < 0 and curvature c = vᵀHv the loss
falls along v by at most

    predicted gain = s² / (2 c),

exactly so where the loss is quadratic along v. It is not far from the weights: a parabola that is
nearly straight would promise more than there is to lose. So the step goes at most to a = a tenth of
the weights' norm, gaining |s| a - c a² / 2, also where the parabola has no end (c <= 0). v is taken
from half of the batches, s and c from the other, so that noise cannot promise a gain.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from weightshare.audit.findings import Finding
from weightshare.audit.layers import Layer
from weightshare.audit.steps import (
    Loss,
    Progress,
    Reduce,
    alone,
    curvature,
    mean_gradients,
    silent,
    slope_along,
    step,
    unit,
)
from weightshare.audit.unsharing import KINDS, SAYS, Kind, Unsharing
from weightshare.errors import UserError
from weightshare.sharing import partition, preserved

Metric = Literal["adam", "plain"]
REACH = 0.1
"""Farther, predictions were seen to promise twice the loss; within, they rank realised gains."""


@dataclass(frozen=True)
class Suggestion:
    """An unsharing and what it promises: ``predicted`` nats (or whatever the loss is in).

    ``first_order`` is the loss decrease per unit of learning rate of one gradient step, ``slope``
    and ``curvature`` are those along the step, ``longest`` the step up to which they are believed,
    ``endless`` the one where the parabola has no end; ``predicted`` is 0 where the held-out half of
    the batches saw no decrease.
    ``beyond_chance``: whether the layer's users disagree more than the permutation null.
    """

    unsharing: Unsharing
    added: int
    slope: float = 0.0
    curvature: float = math.nan
    longest: float = math.inf
    endless: float = 0.0
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
        ends = self.curvature > 0
        a = min(self.longest, -self.slope / self.curvature) if ends else self.endless
        return -self.slope * a - self.curvature * a**2 / 2

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
            "do": SAYS[u.kind]
            + (f" (rank {u.rank})" if u.kind == "low_rank" else "")
            + (f": {self.reason}" if self.reason else ""),
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
    findings: Sequence[Finding],
    *,
    rank: int = 4,
    kinds: Sequence[Kind] = KINDS,
    metric: Metric = "adam",
    reach: float = REACH,
    reduce: Reduce = alone,
    progress: Progress = silent,
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
    predicted = predict(
        model, batches, loss, wanted, beyond, metric, reach, reduce=reduce, progress=progress
    )
    return sorted([*predicted, *left], key=by_rank)


def by_rank(suggestion: Suggestion) -> tuple[int, float]:
    gain = suggestion.gain_per_parameter
    useful = suggestion.beyond_chance and gain > 0
    kept = suggestion.unsharing.kind == "nothing"
    return 0 if useful else 1 if kept else 2, -gain


def found_groups(found: Finding) -> tuple[tuple[str, ...], ...] | None:
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
    reach: float = REACH,
    bends: int = 4,
    together: int = 2**28,
    reduce: Reduce = alone,
    progress: Progress = silent,
) -> list[Suggestion]:
    """Slope and curvature of each unsharing.

    Slopes take two passes over the batches in all; a curvature takes two passes over ``bends``
    batches for each unsharing, because it varies less from batch to batch than a slope does.

    ``metric="adam"`` predicts for a model that is trained with Adam, as nearly all are;
    ``"plain"`` for gradient descent.

    ``reach`` is how far slope and curvature are believed, as a share of the weights' norm; with
    ``math.inf`` a parabola is followed to its end, as on a quadratic.

    ``reduce`` averages what is measured over ranks (:func:`~weightshare.sharing.all_reduce`), so
    that all of them come to one answer.

    Memory: two gradients per use of the layers looked at together, at most ``together`` elements
    (1 GB in float32), or one layer. The model stays as it is, as in an audit.
    """
    ours, theirs = list(batches[0::2]), list(batches[1::2])
    result: dict[int, Suggestion] = {}
    with preserved(model):
        for layers in _portions(model, [u.layer for u in unsharings], together):
            names = sorted({name for layer in layers for name in layer.tensors})
            directing, spread = mean_gradients(model, ours, loss, names, reduce)
            divisors = spread if metric == "adam" else {}
            measuring, _ = mean_gradients(model, theirs, loss, names, reduce)
            for number, unsharing in enumerate(unsharings):
                if unsharing.layer not in layers:
                    continue
                progress(f"worked out unsharing {len(result) + 1} of {len(unsharings)}")
                offsets, bases = step(model, unsharing, directing, divisors)
                norm = unit(model, offsets)
                slope = slope_along(measuring, offsets)
                result[number] = Suggestion(
                    unsharing,
                    added=unsharing.added(model),
                    slope=slope,
                    curvature=curvature(model, theirs[:bends], loss, offsets, reduce)
                    if slope < 0
                    else math.nan,
                    longest=reach * norm if norm else 0.0,
                    endless=min(reach, REACH) * norm,
                    beyond_chance=bool((beyond or {}).get(unsharing.layer, False)),
                    directions=bases,
                )
    return [result[number] for number in range(len(unsharings))]


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
