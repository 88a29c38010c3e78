"""Spend a budget of parameters on the unsharings that promise most together."""

from collections.abc import Sequence

from weightshare.audit.layers import Layer
from weightshare.audit.suggest import Suggestion
from weightshare.errors import UserError


def spend(
    suggestions: Sequence[Suggestion], budget: int, resolution: int = 1000
) -> list[Suggestion]:
    """At most one suggestion per layer, within ``budget`` added parameters, most predicted gain.

    A multiple-choice knapsack, exact up to sizes rounded up to ``budget / resolution``. Gains of
    different layers are added, as if layers did not interact.

    Raises:
        UserError: a budget below one parameter.
    """
    if budget < 1:
        raise UserError(f"the budget is {budget} parameters; give at least 1.")
    unit = max(1, budget // resolution)
    room = budget // unit
    by_layer: dict[Layer, list[Suggestion]] = {}
    for suggestion in suggestions:
        if suggestion.predicted > 0 and suggestion.added <= budget:
            by_layer.setdefault(suggestion.unsharing.layer, []).append(suggestion)
    # best[r]: gain and choices within r units
    best: list[tuple[float, tuple[Suggestion, ...]]] = [(0.0, ())] * (room + 1)
    for choices in by_layer.values():
        new = list(best)
        for suggestion in choices:
            size = -(-suggestion.added // unit)
            for r in range(size, room + 1):
                gain = best[r - size][0] + suggestion.predicted
                if gain > new[r][0]:
                    new[r] = gain, (*best[r - size][1], suggestion)
        best = new
    return sorted(best[-1][1], key=lambda s: -s.gain_per_parameter)


def scales_first(suggestions: Sequence[Suggestion], budget: int) -> list[Suggestion]:
    """Private scales on every layer, then weights of their own for what is left of the budget.

    Scales take a few per cent of what a tenth of a fold's savings buys and gained more than most
    ways to spend all of it; with copies by a trial on top they gained most. A folded model may have
    both on one weight; elsewhere :func:`~weightshare.audit.apply` refuses the second.

    Raises:
        UserError: a budget that does not pay for the scales.
    """
    scales = [s for s in suggestions if s.unsharing.kind == "scale"]
    copies = [s for s in suggestions if s.unsharing.kind == "unshare" and s.beyond_chance]
    left = budget - sum(s.added for s in scales)
    if left < 0:
        raise UserError(
            f"the budget is {budget} parameters, but private scales on every shared weight take "
            f"{budget - left}; give more, or spend it without scales first."
        )
    return [*scales, *(spend(copies, left) if left else [])]
