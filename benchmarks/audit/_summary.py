"""The tables of ``unsharing.py``: what a budget bought, ways against each other, the clause."""

import itertools
import math
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from _table import spread

from weightshare.audit.honesty import rank_correlation


def summary(rows, ways):
    """The tables, and where the rows came from, which may be other machines than the last."""
    facts = {
        name: " and ".join(sorted({str(row[name]) for row in rows.values()}))
        for name in ("device", "torch")
    }
    bought, paired, held = spent(rows, ways), against(rows), clause(rows)
    shown = [way for way in ways if any(row["spent on"].endswith(f": {way}") for row in bought)]
    facts |= {"spent": bought, "against": paired, "clause": held}
    return facts | {
        "spent_by_way": side_by_side(
            bought, "spent on", ": ", shown, lambda r: f"{thousandths(r, 'gain')} ({r['settings']})"
        ),
        "against_by_way": side_by_side(
            paired,
            "ways",
            " against ",
            OTHERS,
            lambda r: f"{thousandths(r, 'better_by')} ({r['wins']}/{r['settings']})",
        ),
        "clause_by_predictor": side_by_side(
            held,
            "trials",
            ": ",
            PREDICTORS,
            lambda r: f"{r['rho']:.2f} [{r['low']:.2f}, {r['high']:.2f}]",
        ),
    }


def side_by_side(rows, title, between, columns, cell):
    """One row for what stands before ``between`` in a title, one column for what stands behind."""
    table = {}
    for row in rows:
        before, behind = row[title].rsplit(between, 1)
        cells = table.setdefault(before, {title: before} | dict.fromkeys(columns))
        cells[behind] = cell(row)
    return list(table.values())


def thousandths(row, figure):
    """A loss and its half width, where there is one, in thousandths of a nat."""
    half = row["half_width"]
    return f"{1e3 * row[figure]:.1f}" + ("" if math.isnan(half) else f" ± {1e3 * half:.1f}")


def by_case(rows):
    """The rows of each model, fold and moment."""
    found = {}
    for row in rows:
        groups = [list(group) for group in row["groups"]]
        found.setdefault(f"{row['model']}, {groups}, {row['moment']}", []).append(row)
    return found


def spent(rows, ways):
    """Held-out loss that one budget bought, over settings, and paired with the random choice."""
    table = []
    for case, mine in by_case([row for row in rows.values() if "way" in row]).items():
        runs = {(str(row["groups"]), row["seed"], row["way"]): row for row in mine}
        for way in ways:
            done = [key for key in runs if key[2] == way and (*key[:2], "nothing") in runs]
            if way == "nothing" or not done:
                continue
            gains = [runs[*k[:2], "nothing"]["loss"] - runs[k]["loss"] for k in done]
            over = [
                runs[*k[:2], "random"]["loss"] - runs[k]["loss"]
                for k in done
                if (*k[:2], "random") in runs
            ]
            bought, better = spread(gains), spread(over or [math.nan])
            table.append(
                {
                    "spent on": f"{case}: {way}",
                    "added": int(statistics.mean(runs[k]["added"] for k in done)),
                    "gain": bought["mean"],
                    "half_width": bought["half_width"],
                    "over_random": better["mean"],
                    "its_half_width": better["half_width"],
                    "settings": len(done),
                }
            )
    return table


DEVELOPED = {
    ("stories260K", "[[1, 2], [3, 4]]", 0),
    ("tiny", "[[2, 3, 4, 5], [6, 7, 8, 9]]", 0),
    ("babyllama105", "[[1, 2], [3, 4]]", 2),
}
"""Models, folds and seeds that the trial was chosen on and the scales were noticed on."""


OTHERS = ("random", "everywhere", "first", "last", "audit (adam)", "trial", "scales")


def against(rows):
    """How far the trial, private scales and both end below each other way, paired by setting.

    Without the settings that they were developed on.
    """
    losses = {}
    for row in rows.values():
        setting = row["model"], str([list(group) for group in row["groups"]]), row["seed"]
        if "way" in row and setting not in DEVELOPED:
            losses.setdefault((*setting, row["moment"]), {})[row["way"]] = row["loss"]
    models = dict.fromkeys((key[0], key[3]) for key in losses)
    table = []
    for model, moment in [*models, *(("all models", moment) for moment in ("folded", "cured"))]:
        mine = {
            key: ways
            for key, ways in losses.items()
            if key[3] == moment and model in (key[0], "all models")
        }
        for way, other in itertools.product(("scales and copies", "scales", "trial"), OTHERS):
            if way != other:
                both = {key: w for key, w in mine.items() if {way, other} <= w.keys()}
                found = [w[other] - w[way] for w in both.values()]
                one_model = len({key[0] for key in both}) == 1
                if len(found) > 2 and one_model == (model != "all models"):
                    better = spread(found)
                    table.append(
                        {
                            "ways": f"{model}, {moment}: {way} against {other}",
                            "better_by": better["mean"],
                            "half_width": better["half_width"],
                            "wins": sum(value > 0 for value in found),
                            "settings": len(found),
                        }
                    )
    return table


PREDICTORS = ("adam", "adam, far", "trial", "added")


def clause(rows):
    """Rank correlation of predicted and realised gain inside each row, averaged over rows.

    The interval is a bootstrap over trials, resampled inside each row.
    """
    table = []
    tried = [row for row in rows.values() if "trials" in row]
    cases = by_case(tried)
    for row in tried:
        cases.setdefault(f"{row['model']}, all folds, {row['moment']}", []).append(row)
    for case, mine in cases.items():
        for predictor in PREDICTORS:
            pairs = [[(t[predictor], t["gain"]) for t in row["trials"]] for row in mine]
            rho, low, high = rank_correlation(pairs)
            table.append(
                {
                    "trials": f"{case}: {predictor}",
                    "count": sum(map(len, pairs)),
                    "rho": rho,
                    "low": low,
                    "high": high,
                }
            )
    return table
