"""Figures follow the page's colours, explain themselves and come out the same every time."""

import itertools
import math
import os
import subprocess
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from matplotlib.figure import Figure

from weightshare.report import figures
from weightshare.report.svg import scoped

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "<script>alert('$\\frac$ & \"x\"')</script> $5 ]]>"


def titles(text: str) -> list[str]:
    return [element.text for element in ET.fromstring(text).iter(f"{SVG}title")]


def drawn(name: str) -> Figure:
    return {
        "lines": lambda: figures.lines(
            {
                HOSTILE: ([1, 2, 4], [3.0, float("nan"), 1.0]),
                "b": ([1, 2, 4], [1e6, 2e6, 3e6]),
                "one": ([1], [5.0]),
            },
            bands={"b": ([0, 1, 2], [2e6, 3e6, 4e6])},
            x=HOSTILE,
            log_x=True,
        ),
        "bars": lambda: figures.bars(
            {HOSTILE: 0.5, "b": -0.25},
            intervals={"b": (-0.3, -0.2)},
            reference=(HOSTILE, 0.1),
            highlight=[HOSTILE],
        ),
        "scatter": lambda: figures.scatter(
            [(1, 2, HOSTILE), (3, 4, "b")], groups=["found", HOSTILE]
        ),
        "heatmap": lambda: figures.heatmap(
            [[0.5, -1.0], [float("nan"), 0.0]], rows=[HOSTILE, "b"], diverging=True, unit="cosine"
        ),
        "image": lambda: figures.heatmap(np.arange(60 * 60).reshape(60, 60)),
        "strip": lambda: figures.strip(
            [(HOSTILE, "kept"), ("1", "removed", "block 1, loss 2.5"), ("2", "other")]
        ),
    }[name]()


ALL = ["lines", "bars", "scatter", "heatmap", "image", "strip"]


@pytest.mark.parametrize("name", ALL)
def test_hostile_text_is_text_and_shown_whole(name):
    text = figures.svg(drawn(name))
    root = ET.fromstring(text)
    assert not list(root.iter(f"{SVG}script"))
    if name != "image":
        words = [element.text for element in root.iter(f"{SVG}text")]
        assert HOSTILE in words


@pytest.mark.parametrize("name", ALL)
def test_ink_follows_the_page_and_nothing_is_painted_behind(name):
    text = figures.svg(drawn(name))
    assert "currentColor" in text
    assert "#010203" not in text
    assert "#000000" not in text
    assert "#ffffff" not in text or name in {"strip", "heatmap"}
    background = ET.fromstring(text).find(f".//{SVG}path")
    assert "fill: none" in background.get("style")


@pytest.mark.parametrize("name", ALL)
def test_a_figure_carries_no_date_font_or_unused_identifier(name):
    text = figures.svg(drawn(name))
    assert "metadata" not in text
    assert "DejaVu" not in text
    root = ET.fromstring(text)
    names = {element.get("id") for element in root.iter()} - {None}
    assert all(f"#{one}" in text for one in names)


def test_tooltips_name_what_the_pointer_rests_on():
    assert "b: -0.25 (-0.3 to -0.2)" in titles(figures.svg(drawn("bars")))
    assert "block 1, loss 2.5" in titles(figures.svg(drawn("strip")))
    assert f"{HOSTILE}, 1: -1" in titles(figures.svg(drawn("heatmap")))
    assert "b: x 3, y 4" in titles(figures.svg(drawn("scatter")))
    points = titles(figures.svg(drawn("lines")))
    assert f"{HOSTILE}: {HOSTILE} 4, y 1" in points
    assert not [point for point in points if "NaN" in point]


def test_control_characters_in_labels_do_not_break_the_drawing():
    text = figures.svg(figures.bars({"a\x00b\x1b[0m\n": 1.0}))
    assert titles(text) == ["a?b?[0m : 1"]


@pytest.mark.filterwarnings("error")
def test_letters_of_any_script_are_drawn_without_complaint():
    text = figures.svg(figures.bars({"猫 🐈 кот": 1.0}))
    assert "猫 🐈 кот" in [element.text for element in ET.fromstring(text).iter()]


def test_a_colour_named_in_a_label_stays():
    words = [e.text for e in ET.fromstring(figures.svg(figures.bars({"#000000": 1}))).iter()]
    assert "#000000" in words


def test_long_lines_get_a_bounded_number_of_targets():
    xs = list(range(10_000))
    assert len(titles(figures.svg(figures.lines({"a": (xs, xs)})))) <= 62


def test_ordinary_matplotlib_figures_are_made_to_follow_the_page():
    figure = Figure()
    axes = figure.add_subplot()
    axes.plot([1, 2], [2, 1], color="black")
    axes.set_title("$x^2$")
    text = figures.svg(figure)
    assert "#000000" not in text
    for element in ET.fromstring(text).iter(f"{SVG}text"):
        assert "fill: currentColor" in element.get("style")


def test_the_same_data_gives_the_same_bytes_in_another_process():
    code = (
        "import sys; sys.path.insert(0, {folder!r})\n"
        "import test_figures as t\n"
        "from weightshare.report import figures\n"
        "sys.stdout.write(''.join(figures.svg(t.drawn(n)) for n in t.ALL))"
    ).format(folder=__file__.rpartition("/")[0])
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            check=True,
            env=os.environ | {"PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_scoped_figures_do_not_meet_in_one_page():
    text = figures.svg(drawn("lines"))
    a, b = (scoped(text, prefix, "label") for prefix in ("a-", "b-"))

    def names(svg):
        return {element.get("id") for element in ET.fromstring(svg).iter()} - {None}

    assert names(a)
    assert not names(a) & names(b)
    assert all(f"#{name}" in a for name in names(a))
    assert ET.fromstring(a).get("aria-label") == "label"


def test_global_matplotlib_state_is_left_as_it_was():
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    figures.svg(drawn("lines"))
    assert dict(mpl.rcParams) == before
    assert "matplotlib.pyplot" not in sys.modules or not mpl.pyplot.get_fignums()


def linear(color: str) -> np.ndarray:
    values = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def contrast(a: str, b: str) -> float:
    high, low = sorted((float(linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (a, b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("color", [*figures.PALETTE, figures.GREY])
@pytest.mark.parametrize("page", ["#ffffff", "#14171b"])
def test_colours_stand_out_on_light_and_dark_pages(color, page):
    assert contrast(color, page) >= 3


# Viénot, Brettel and Mollon (1999), on linear RGB.
DICHROMAT = {
    "protanope": [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],
    "deuteranope": [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]],
}


def lab(rgb: np.ndarray) -> np.ndarray:
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    scaled = np.cbrt(np.array(to_xyz) @ rgb / [0.9505, 1.0, 1.089])
    return np.array(
        [116 * scaled[1] - 16, 500 * (scaled[0] - scaled[1]), 200 * (scaled[1] - scaled[2])]
    )


@pytest.mark.parametrize("eyes", DICHROMAT)
def test_the_first_colours_stay_apart_for_colour_blind_eyes(eyes):
    seen = [lab(np.array(DICHROMAT[eyes]) @ linear(color)) for color in figures.PALETTE[:4]]
    assert min(math.dist(a, b) for a, b in itertools.combinations(seen, 2)) > 12


def test_empty_figures_can_be_drawn():
    for figure in (figures.lines({}), figures.bars({}), figures.scatter([]), figures.strip([])):
        ET.fromstring(figures.svg(figure))
