"""Pictures of a tuning run. Plain data in, matplotlib figures out."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from weightshare.report import figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def course(train: Sequence[tuple[int, float]], heldout: Sequence[tuple[int, float]]) -> "Figure":
    """Training and held-out loss by step."""
    series = {
        name: ([step for step, _ in points], [loss for _, loss in points])
        for name, points in (("training", train), ("held out", heldout))
        if points
    }
    return figures.lines(series, x="step", y="nats per token")


def sweep(losses: Mapping[float, float], chosen: float) -> "Figure":
    """Held-out loss by learning rate; the chosen one stands out."""
    values = {f"{rate:g}": loss for rate, loss in losses.items()}
    return figures.bars(values, highlight=[f"{chosen:g}"], x="held-out loss (nats per token)")


def use_counts(uses: Sequence[int]) -> "Figure":
    """How many shards are used how often."""
    most = max(uses)
    counts = {f"used {n} times": float(list(uses).count(n)) for n in range(most + 1)}
    return figures.bars(counts, x="shards")
