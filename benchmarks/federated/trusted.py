"""How many trusted samples an examination needs: digits, label flipping and none.

    python benchmarks/federated/trusted.py [--quick] [--minutes 10]

The rule ``examined`` of attacks.py with 10 to 100 trusted samples of ten classes, seeds 2, 3 and 4.
``adversary`` is the best one's accuracy; ``removed`` adversaries / honest, seed by seed; ``passes``
the seeds that pass as in attacks.py.
"""

import sys
from argparse import Namespace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from _table import Table, spread
from attacks import interval, name_of, row

SEEDS = range(2, 5)
CELLS = [("uniform", "none", 0), ("uniform", "label_flip", 2), ("uniform", "label_flip", 11)]


def figures(cell: tuple[str, str, int], root: int, rounds: int) -> dict[str, str]:
    """One number of trusted samples under one attack."""
    options = Namespace(data="digits", device="cpu", first_seed=SEEDS[0], seeds=len(SEEDS),
                        rules="examined", root=root, eager=True)  # fmt: skip
    runs = list(row(cell, options, rounds)["rules"]["examined"].values())
    worst = max((run["adversary"] for run in runs if run["adversary"] is not None), default=None)
    return {
        "gain": interval(spread([run["gain"] for run in runs])),
        "adversary": "-" if worst is None else f"{worst:.2f}",
        "removed": " ".join(f"{r['removed_adversaries']}/{r['removed_honest']}" for r in runs),
        "passes": f"{sum(run['passes'] for run in runs)}/{len(runs)}",
    }


def main() -> None:
    table = Table("federated_trusted", __doc__)
    torch.set_num_threads(1)
    counts, cells, rounds = ([50], CELLS[1:2], 12) if table.quick else (
        [10, 20, 30, 50, 100], CELLS, 25
    )  # fmt: skip
    for root in counts:
        for cell in cells:
            table.row(f"{root}, {name_of(cell)}", lambda c=cell, r=root: figures(c, r, rounds))
    table.write()
    table.show(["gain", "adversary", "removed", "passes"])


if __name__ == "__main__":
    main()
