"""Figures of an audit: plain data in, a matplotlib figure out."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from weightshare.report import figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from weightshare.audit.examine import Audit
    from weightshare.audit.findings import Finding
    from weightshare.audit.honesty import Probe


def agreement_data(finding: "Finding") -> dict[str, Any]:
    """Users and their debiased cosines, NaN where undefined."""
    bases = {user.partition("#")[0] for user in finding.layer.users}
    mark = "#" if len(bases) == 1 else "."
    names = [mark.strip(".") + user.rpartition(mark)[2] for user in finding.layer.users]
    users = names if len(set(names)) == len(names) else list(finding.layer.users)
    return {"users": users, "cosines": finding.similarity.tolist()}


def agreement_map(users: Sequence[str], cosines: Sequence[Sequence[float]]) -> "Figure":
    """Heat map of the users' cosines; a pair without two gradients stays empty.

    The debiased estimate is not bounded by one, so colours end at the true range, -1 to 1.
    """
    clipped = [[max(-1.0, min(1.0, value)) for value in row] for row in cosines]
    return figures.heatmap(
        clipped, rows=users, columns=users, diverging=True, limits=(-1, 1), unit="cosine"
    )


def agreements_data(audit: "Audit") -> dict[str, Any]:
    """Agreement and its interval of every layer that has one."""
    known = [f for f in audit.findings if f.agreement == f.agreement]
    return {
        "values": {f.layer.name: f.agreement for f in known},
        "intervals": {f.layer.name: (f.low, f.high) for f in known if f.low == f.low},
        "advised": [f.layer.name for f in known if f.split.advised],
    }


def agreement_bars(
    values: dict[str, float], intervals: dict[str, tuple[float, float]], advised: Sequence[str]
) -> "Figure":
    """One bar per shared layer with its interval; those that disagree beyond chance stand out."""
    whole = intervals if len(intervals) == len(values) else None
    return figures.bars(values, intervals=whole, highlight=advised, x="mean cosine of the users")


def trials_data(probe: "Probe") -> dict[str, Any]:
    """Predicted and realised gain of every trial, by origin."""
    return {
        "points": [
            (t.suggestion.predicted, t.realised, t.origin, t.suggestion.unsharing.layer.name)
            for t in probe.trials
        ]
    }


def promise_scatter(points: Sequence[tuple[float, float, str, str]]) -> "Figure":
    """Realised against predicted gain."""
    return figures.scatter(
        [(predicted, realised, name) for predicted, realised, _, name in points],
        groups=[origin for _, _, origin, _ in points],
        label=False,
        x="predicted gain in loss",
        y="realised gain in loss",
    )
