"""Pictures of a federation: plain data in, a matplotlib figure out."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from weightshare.report.figures import PALETTE, heatmap, house_style, scatter, tooltip

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Course = Mapping[str, Sequence[tuple[int, float]]]
"""(round, value) by participant."""


def reputation_course(
    course: Course, adversaries: Sequence[str], threshold: Sequence[tuple[int, float]]
) -> "Figure":
    """Reputation of each participant over the rounds; it ends where one is removed."""
    from matplotlib.figure import Figure

    with house_style():
        figure = Figure(figsize=(7.0, 3.6))
        axes = figure.add_subplot()
        seen = set()
        for name, points in course.items():
            bad = name in adversaries
            label = "adversary" if bad else "honest"
            (line,) = axes.plot(
                *zip(*points, strict=True) if points else ((), ()),
                color=PALETTE[1] if bad else PALETTE[0],
                linestyle=(0, (5, 1.5)) if bad else "-",
                linewidth=1.3,
                label=None if label in seen else label,
            )
            seen.add(label)
            tooltip(line, name)
            if points and points[-1][0] < threshold[-1][0]:
                (end,) = axes.plot(*points[-1], marker="x", color=line.get_color())
                tooltip(end, f"{name} removed")
        axes.plot(
            *zip(*threshold, strict=True),
            color=PALETTE[6],
            linestyle=(0, (1.5, 1.2)),
            label="threshold",
        )
        axes.set_xlabel("round")
        axes.set_ylabel("reputation")
        figure.legend(loc="outside upper left", ncols=3)
    return figure


def rewards_received(quotas: Course, rounds: int) -> "Figure":
    """Who received how much of the aggregate in which round, in per cent of its entries."""
    names = list(quotas)
    table = np.full((len(names), rounds), np.nan)
    for row, name in enumerate(names):
        for number, value in quotas[name]:
            table[row, number - 1] = 100 * value
    return heatmap(
        table,
        rows=names,
        columns=[str(i + 1) for i in range(rounds)],
        x="round",
        unit="% of entries",
        limits=(0, 100),
        numbers=False,
        size=(7.4, min(1.2 + 0.22 * len(names), 6)),
    )


def alone_and_together(alone: Mapping[str, float], together: Mapping[str, float]) -> "Figure":
    """Test accuracy trained alone (across) and after the federation (up)."""
    points = [(alone[name], together[name], name) for name in alone]
    return scatter(points, x="accuracy trained alone", y="accuracy after the federation")


def confusion_map(table: np.ndarray) -> "Figure":
    """Shares of true class (row) taken for class (column)."""
    return heatmap(table, x="taken for", y="class", unit="share", limits=(0, 1), size=(5.6, 4.4))
