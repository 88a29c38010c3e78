"""Figures in the house style: plain data in, a matplotlib figure out.

They are drawn on nothing, with text and axes in the colour of the page around them, so that one SVG
suits a light page, a dark page and paper. Names and values appear as tooltips, without JavaScript.
For a figure of your own, draw it inside :func:`house_style` and give its parts a :func:`tooltip`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from weightshare.report.style import GREY, INK, PALETTE, STATES, house_style
from weightshare.report.svg import svg, tooltip
from weightshare.report.wording import show

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "GREY",
    "PALETTE",
    "STATES",
    "bars",
    "heatmap",
    "house_style",
    "lines",
    "scatter",
    "strip",
    "svg",
    "tooltip",
]

_MARKERS = "osD^vPX"
_DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
_MOST_TIPS, _MOST_CELLS = 60, 2500


def lines(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x: str = "",
    y: str = "",
    bands: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
    log_x: bool = False,
    log_y: bool = False,
    size: tuple[float, float] = (5.6, 3.3),
) -> "Figure":
    """Draw named ``series`` of (x, y) values; ``bands`` gives a series its (low, high) interval."""
    with house_style():
        figure, axes = _figure(size)
        for number, (name, (xs, ys)) in enumerate(series.items()):
            color = PALETTE[number % len(PALETTE)]
            if bands and name in bands:
                axes.fill_between(xs, *bands[name], color=color, alpha=0.18, linewidth=0)
            dash = _DASHES[number % len(_DASHES)] if len(series) > 1 else "-"
            (line,) = axes.plot(xs, ys, color=color, linestyle=dash, label=name)
            tooltip(line, name)
            if len(xs) == 1:
                line.set_marker("o")
            _points(axes, name, xs, ys, x, y, color)
        if log_x:
            axes.set_xscale("log")
        if log_y:
            axes.set_yscale("log")
        _label(axes, x, y)
        if len(series) > 1:
            _legend(axes)
    return figure


def bars(
    values: Mapping[str, float],
    *,
    intervals: Mapping[str, tuple[float, float]] | None = None,
    highlight: Sequence[str] = (),
    reference: tuple[str, float] | None = None,
    x: str = "",
    size: tuple[float, float] | None = None,
) -> "Figure":
    """Draw one horizontal bar for each name, top to bottom.

    ``intervals`` are (low, high) ends, ``highlight`` names the bars that matter (all when empty),
    ``reference`` is a labelled vertical line, such as chance.
    """
    with house_style():
        figure, axes = _figure(size or (5.6, 0.9 + 0.36 * len(values)))
        axes.grid(axis="y", visible=False)
        for row, (name, value) in enumerate(values.items()):
            strong = not highlight or name in highlight
            (bar,) = axes.barh(row, value, height=0.62, color=PALETTE[0] if strong else GREY)
            low, high = (intervals or {}).get(name, (value, value))
            tooltip(bar, f"{name}: {show(value)}" + _interval(low, high))
            if high > low:
                axes.plot([low, high], [row, row], color=INK, linewidth=1.2, solid_capstyle="butt")
            end = max(value, high) if value >= 0 else min(value, low)
            axes.annotate(
                show(value),
                (end, row),
                xytext=(4 if value >= 0 else -4, 0),
                textcoords="offset points",
                ha="left" if value >= 0 else "right",
                va="center",
                fontsize=9.5,
            )
        axes.set_yticks(range(len(values)), list(values))
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        if reference:
            rule = axes.axvline(reference[1], color=INK, linewidth=1, linestyle=(0, (3, 2)))
            tooltip(rule, f"{reference[0]}: {show(reference[1])}")
            axes.annotate(
                reference[0],
                (reference[1], 1),
                xycoords=("data", "axes fraction"),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=9.5,
            )
        _label(axes, x, "")
    return figure


def scatter(
    points: Sequence[tuple[float, float, str]],
    *,
    x: str = "",
    y: str = "",
    groups: Sequence[str] | None = None,
    label: bool | None = None,
    log_x: bool = False,
    log_y: bool = False,
    size: tuple[float, float] = (5.6, 3.8),
) -> "Figure":
    """Draw (x, y, name) ``points``; ``groups`` colours them, ``label`` writes names (up to 12)."""
    label = len(points) <= 12 if label is None else label
    with house_style():
        figure, axes = _figure(size)
        kinds = list(dict.fromkeys(groups or ()))
        for number, (px, py, name) in enumerate(points):
            kind = kinds.index(groups[number]) if groups else 0
            (dot,) = axes.plot(
                [px],
                [py],
                marker=_MARKERS[kind % len(_MARKERS)],
                color=PALETTE[kind % len(PALETTE)],
                markersize=7,
                alpha=0.85,
                markeredgewidth=0,
                linestyle="none",
                label=kinds[kind] if groups and groups.index(groups[number]) == number else None,
            )
            tooltip(dot, f"{name}: {_pair(px, py, x, y)}")
            if label:
                axes.annotate(
                    name,
                    (px, py),
                    xytext=(6, 4),
                    textcoords="offset points",
                    fontsize=9.5,
                )
        if log_x:
            axes.set_xscale("log")
        if log_y:
            axes.set_yscale("log")
        axes.margins(0.12)
        _label(axes, x, y)
        if len(kinds) > 1:
            _legend(axes)
    return figure


def heatmap(
    values: Any,
    *,
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    x: str = "",
    y: str = "",
    diverging: bool = False,
    limits: tuple[float, float] | None = None,
    numbers: bool | None = None,
    unit: str = "",
    size: tuple[float, float] | None = None,
) -> "Figure":
    """Draw a matrix [rows, columns] as coloured cells; cells that are not finite stay empty.

    ``diverging`` centres the colours on zero (cosines, differences). ``numbers`` writes the values
    into the cells, by default up to 12 columns. ``unit`` names the colour bar.
    """
    import numpy as np

    array = np.asarray(values, dtype=float)
    height, width = array.shape
    finite = array[np.isfinite(array)]
    low, high = limits or ((finite.min(), finite.max()) if finite.size else (0.0, 1.0))
    if diverging:
        high = max(abs(low), abs(high)) or 1.0
        low = -high
    row_names = list(rows) if rows is not None else [str(i) for i in range(height)]
    column_names = list(columns) if columns is not None else [str(j) for j in range(width)]
    side = min(0.5, 4.3 / max(width, 1))
    with house_style():
        figure, axes = _figure(size or (5.6, min(max(1.1 + side * height, 1.8), 6.0)))
        _cells(axes, array, (low, high), diverging, row_names, column_names, numbers, unit)
        axes.set_xticks(*_ticks(column_names))
        axes.set_yticks(*_ticks(row_names))
        if max(map(len, column_names), default=0) * width > 70:
            axes.tick_params(axis="x", rotation=45)
        _label(axes, x, y)
    return figure


def strip(
    blocks: Sequence[tuple[str, str]] | Sequence[tuple[str, str, str]],
    *,
    colors: Mapping[str, str] | None = None,
    size: tuple[float, float] | None = None,
) -> "Figure":
    """Draw blocks in a row: (label, state) or (label, state, tooltip), coloured by state.

    The states ``kept``, ``shared`` and ``removed`` have fixed colours (:data:`STATES`); ``removed``
    is drawn as an outline. Up to 24 blocks stand on one line.
    """
    per_line = math.ceil(len(blocks) / math.ceil(len(blocks) / 24)) if blocks else 1
    line_count = math.ceil(len(blocks) / per_line) or 1
    states = list(dict.fromkeys(block[1] for block in blocks))
    free = iter(color for color in PALETTE if color not in STATES.values())
    chosen = {state: STATES.get(state) or next(free, GREY) for state in states} | dict(colors or {})
    with house_style():
        from matplotlib.patches import FancyBboxPatch

        figure, axes = _figure(size or (8.4, 0.75 + 0.55 * line_count))
        axes.set_axis_off()
        seen: set[str] = set()
        for number, (label, state, *tip) in enumerate(blocks):
            line, place = divmod(number, per_line)
            color = chosen[state]
            hollow = state == "removed"
            box = FancyBboxPatch(
                (place + 0.06, -line - 0.4),
                0.88,
                0.8,
                boxstyle="round,pad=0,rounding_size=0.12",
                facecolor=(0, 0, 0, 0) if hollow else color,
                edgecolor=color,
                linestyle=(0, (2.5, 2)) if hollow else "-",
                linewidth=1.1,
                label=None if state in seen else state,
            )
            seen.add(state)
            axes.add_patch(box)
            tooltip(box, tip[0] if tip else f"{label}: {state}")
            text = axes.text(
                place + 0.5,
                -line - 0.02,
                label,
                ha="center",
                va="center",
                fontsize=9.5 if per_line <= 16 else 8.5,
                color=INK if hollow else "#ffffff",
                alpha=0.7 if hollow else 1,
            )
            tooltip(text, tip[0] if tip else f"{label}: {state}")
        axes.set_xlim(0, per_line)
        axes.set_ylim(-line_count + 0.5, 0.5)
        if states:
            _legend(axes)
    return figure


def _figure(size: tuple[float, float]) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=size)
    return figure, figure.add_subplot()


def _label(axes: "Axes", x: str, y: str) -> None:
    from matplotlib.ticker import EngFormatter

    axes.set_xlabel(x)
    axes.set_ylabel(y)
    for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        if max(map(abs, limits)) >= 1e5:
            axis.set_major_formatter(EngFormatter())


def _legend(axes: "Axes") -> None:
    axes.figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside upper left",
        ncols=4,
        handlelength=1.8,
        columnspacing=1.4,
        borderpad=0.1,
    )


def _points(
    axes: "Axes", name: str, xs: Sequence[float], ys: Sequence[float], x: str, y: str, color: str
) -> None:
    """Lay invisible targets on a line, for the pointer to find its values."""
    count = len(xs)
    chosen = range(count) if count <= _MOST_TIPS else range(0, count, math.ceil(count / _MOST_TIPS))
    for i in chosen:
        if math.isfinite(xs[i]) and math.isfinite(ys[i]):
            (dot,) = axes.plot([xs[i]], [ys[i]], marker="o", markersize=9, color=color, alpha=0.001)
            dot.set_label("_hidden")
            tooltip(dot, f"{name}: {_pair(xs[i], ys[i], x, y)}")


def _cells(
    axes: "Axes",
    array: Any,
    limits: tuple[float, float],
    diverging: bool,
    rows: list[str],
    columns: list[str],
    numbers: bool | None,
    unit: str,
) -> None:
    import matplotlib as mpl
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.patches import Rectangle

    height, width = array.shape
    numbers = width <= 12 and height <= 16 if numbers is None else numbers
    small = max(map(abs, limits)) < 10
    colors = (
        LinearSegmentedColormap.from_list("sides", [PALETTE[1], "#e6e6e3", PALETTE[0]])
        if diverging
        else mpl.colormaps["cividis"]
    )
    scale = Normalize(*limits)
    axes.grid(visible=False)
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(height - 0.5, -0.5)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if array.size > _MOST_CELLS:
        axes.imshow(array, cmap=colors, norm=scale, aspect="auto", interpolation="nearest")
    else:
        for i, j in ((i, j) for i in range(height) for j in range(width)):
            value = float(array[i, j])
            if not math.isfinite(value):
                continue
            red, green, blue, _ = colors(scale(value))
            # The outline closes the seams through which the page would shine.
            cell = Rectangle(
                (j - 0.5, i - 0.5),
                1,
                1,
                facecolor=(red, green, blue),
                edgecolor=(red, green, blue),
                linewidth=0.5,
            )
            axes.add_patch(cell)
            tip = f"{rows[i]}, {columns[j]}: {show(value)}"
            tooltip(cell, tip)
            if numbers:
                dark = 0.3 * red + 0.59 * green + 0.11 * blue > 0.55
                text = axes.text(
                    j,
                    i,
                    f"{value:.2f}" if small else show(value),
                    ha="center",
                    va="center",
                    fontsize=8.5,
                    color="#14181d" if dark else "#ffffff",
                )
                tooltip(text, tip)
    bar = axes.figure.colorbar(
        ScalarMappable(scale, colors), ax=axes, label=unit, pad=0.02, aspect=30
    )
    bar.outline.set_visible(False)


def _ticks(names: list[str]) -> tuple[list[int], list[str]]:
    step = math.ceil(len(names) / 24) or 1
    places = list(range(0, len(names), step))
    return places, [names[i] for i in places]


def _pair(px: float, py: float, x: str, y: str) -> str:
    return f"{x or 'x'} {show(px)}, {y or 'y'} {show(py)}"


def _interval(low: float, high: float) -> str:
    return f" ({show(low)} to {show(high)})" if high > low else ""
