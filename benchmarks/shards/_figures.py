"""The figures of docs/shards.md, drawn from the results that are there.

    python benchmarks/shards/_figures.py

When sharing helps: error over the share that layers have in common (mechanism.py). What a budget
buys: held-out loss over trained parameters (replica.py --budgets).
"""

import json
from pathlib import Path

from matplotlib.figure import Figure

from weightshare.report import figures

ROOT = Path(__file__).parents[2]
RESULTS, IMAGES = ROOT / "benchmarks/results", ROOT / "docs/images"
SIZE = (6.6, 3.6)
SHOWN = {
    "LoRA": "LoRA",
    "pure sharing": "pure sharing",
    "subset, dissociated": "whole vectors",
    "+ private rank": "with private",
    "4 shards": "four shards",
}


def main() -> None:
    for name, figure in (("shards_mechanism", mechanism), ("shards_budgets_r1", budgets)):
        if (RESULTS / f"{name}.json").is_file():
            draw(name, figure())


def mechanism() -> Figure:
    rows = read("shards_mechanism")["rows"]
    series, bands = {}, {}
    for name, title in SHOWN.items():
        shares = [key for key in rows[name] if key.startswith("c=")]
        x = [float(key[2:]) for key in shares]
        y = [rows[name][key] for key in shares]
        half = [rows[name][f"± {key}"] for key in shares]
        series[title] = x, y
        bands[title] = (
            [mean - h for mean, h in zip(y, half, strict=True)],
            [mean + h for mean, h in zip(y, half, strict=True)],
        )
    title = "share of their spaces that the layers have in common"
    return figures.lines(series, x=title, y="relative squared error", bands=bands, size=SIZE)


def budgets() -> Figure:
    summary = read("shards_budgets_r1")["summary"]
    series, bands = {}, {}
    for family in ("LoRA", "MoS", "MoS, whole vectors", "Uni-LoRA"):
        rows = [
            row
            for name, row in summary.items()
            if name.rsplit(" ", 1)[0] == family and row["seeds"] > 1
        ]
        rows.sort(key=lambda row: row["trained"])
        if not rows:
            continue
        x, y = [row["trained"] for row in rows], [row["loss"] for row in rows]
        series[family] = x, y
        bands[family] = (
            [row["loss"] - row["half_width"] for row in rows],
            [row["loss"] + row["half_width"] for row in rows],
        )
    return figures.lines(
        series, x="trained parameters", y="nats per byte", bands=bands, log_x=True, size=SIZE
    )


def read(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def draw(name: str, figure: Figure) -> None:
    # On white: a transparent picture would be black on black on a dark page.
    figure.savefig(IMAGES / f"{name}.png", dpi=110, facecolor="white", metadata={"Software": None})


if __name__ == "__main__":
    main()
