"""The look of figures: colours that read on any page, thin axes, no box."""

from collections.abc import Iterator
from contextlib import contextmanager

PALETTE = ("#3b82c9", "#d9701f", "#16967a", "#c2569b", "#8f6fd1", "#a8851a", "#7b8794")
"""Series colours: at least 3:1 against white and near-black pages, apart for colour-blind eyes."""

GREY = "#858d97"
"""Axis lines and whatever should recede, on any page."""

STATES = {"kept": PALETTE[0], "shared": PALETTE[1], "removed": GREY}
"""Colours of the usual states of a block; other states take the remaining palette in order."""

INK = "#010203"
"""Text and rules: a colour no one draws with, turned into ``currentColor`` in the SVG."""


@contextmanager
def house_style() -> Iterator[None]:
    """Set the house style for figures made inside; needed only for figures drawn by hand."""
    import matplotlib as mpl
    from cycler import cycler

    with mpl.rc_context(
        {
            "axes.axisbelow": True,
            "axes.edgecolor": GREY,
            "axes.facecolor": "none",
            "axes.grid": True,
            "axes.labelcolor": INK,
            "axes.labelsize": 10.5,
            "axes.linewidth": 0.8,
            "axes.prop_cycle": cycler(color=PALETTE),
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlecolor": INK,
            "axes.titlesize": 11,
            "figure.constrained_layout.use": True,
            "figure.facecolor": "none",
            "font.family": ["sans-serif"],
            "font.size": 10.5,
            "grid.alpha": 0.28,
            "grid.color": GREY,
            "grid.linewidth": 0.7,
            "legend.fontsize": 10.5,
            "legend.frameon": False,
            "legend.labelcolor": INK,
            "lines.linewidth": 1.8,
            "savefig.facecolor": "none",
            "svg.fonttype": "none",
            "svg.hashsalt": "weightshare",
            # Labels are data: "$" in a model's name is a dollar.
            "text.parse_math": False,
            "text.color": INK,
            "xtick.color": GREY,
            "xtick.labelcolor": INK,
            "xtick.labelsize": 10,
            "ytick.color": GREY,
            "ytick.labelcolor": INK,
            "ytick.labelsize": 10,
        }
    ):
        yield
