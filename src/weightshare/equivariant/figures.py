"""Pictures of a training on points. Plain data in, matplotlib figures out."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from weightshare.report import figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from weightshare.equivariant.nbody import NBody


def course(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str], y: str) -> "Figure":
    """Logged values against the step; ``names``: key in the log -> label."""
    series = {}
    for key, label in names.items():
        found = [(row["step"], row[key]) for row in rows if key in row and row[key] > 0]
        if found:
            series[label] = ([s for s, _ in found], [v for _, v in found])
    return figures.lines(series, x="step", y=y, log_y=True)


def parity(
    truth: Sequence[float], said: Sequence[float], unit: str, name: str, most: int = 300
) -> "Figure":
    """Prediction against truth, at most ``most`` points evenly picked."""
    step = max(len(truth) // most, 1)
    points = [(a, b, name) for a, b in zip(truth[::step], said[::step], strict=True)]
    return figures.scatter(
        points, x=f"true {name} ({unit})", y=f"predicted {name} ({unit})", label=False
    )


def trajectories(data: "NBody", predicted: Any, rows: Sequence[int]) -> "Figure":
    """Where the particles of some trajectories start, end, and were said to end; the plane x, y."""
    from matplotlib.figure import Figure

    with figures.house_style():
        figure = Figure(figsize=(7, 2.6))
        panels = figure.subplots(1, len(rows), squeeze=False)[0]
        for axes, row in zip(panels, rows, strict=True):
            for i, charge in enumerate(data.charges[row]):
                color = figures.PALETTE[0 if charge > 0 else 1]
                start, end, said = data.start[row, i], data.target[row, i], predicted[row, i]
                axes.plot([start[0], end[0]], [start[1], end[1]], color=color, linewidth=1)
                axes.plot([end[0]], [end[1]], "o", color=color, markersize=5)
                (cross,) = axes.plot([said[0]], [said[1]], "x", color=color, markersize=8)
                off = float(((said - end) ** 2).sum() ** 0.5)
                figures.tooltip(cross, f"particle {i}: predicted {off:.3f} from the truth")
            axes.set_aspect("equal", "datalim")
            axes.set_xlabel("x")
        panels[0].set_ylabel("y")
    return figure


def equivariance(errors: Mapping[int, float], trained: int) -> "Figure":
    """Equivariance error of the trained weights by number of orientations."""
    return figures.lines(
        {f"weights trained on {trained}": (list(errors), list(errors.values()))},
        x="orientations",
        y="relative error under rotation",
        log_x=True,
        log_y=True,
    )
