"""A benchmark's table: printed, kept in benchmarks/results/NAME.json, resumed row by row.

    table = Table("folding_rankings", __doc__)
    table.row("greedy, seed 0", compute)          # compute() -> dict of figures; skipped if kept
    table.show(["loss", "seconds"])

``--quick`` runs at a small size into a temporary folder; ``--minutes`` caps the time: rows that do
not fit are left out and said so. ``--part 3/14`` computes every fourteenth row, so that one process
a core shares the work, each with its own ``--out``; ``--join FILE ...`` takes their rows over.
With ``--claims FOLDER`` processes share the rows as they get to them, however fast each is.
"""

import argparse
import json
import math
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from weightshare.errors import UserError
from weightshare.report import replacing

RESULTS = Path(__file__).parent / "results"


class Table:
    """Rows of figures by name, written after each row.

    ``name`` of the results file may depend on the options.
    """

    def __init__(
        self,
        name: str | Callable[[argparse.Namespace], str],
        about: str,
        parser: argparse.ArgumentParser | None = None,
    ):
        parser = parser or argparse.ArgumentParser(description=about.split("\n")[0])
        parser.add_argument("--quick", action="store_true", help="small, into a temporary folder")
        parser.add_argument("--minutes", type=float, default=60.0, help="stop adding rows after")
        parser.add_argument("--fresh", action="store_true", help="forget the rows kept so far")
        parser.add_argument("--out", type=Path, help="results file")
        parser.add_argument("--part", default="1/1", help="which of how many parts of the rows")
        parser.add_argument("--join", type=Path, nargs="*", default=[], help="files of other parts")
        parser.add_argument("--claims", type=Path, help="where processes say which row they do")
        self.options = parser.parse_args()
        name = name if isinstance(name, str) else name(self.options)
        self.part, self.parts = (int(number) for number in self.options.part.split("/"))
        self.asked = 0
        self.quick: bool = self.options.quick
        folder = Path(tempfile.mkdtemp()) if self.quick else RESULTS
        self.name = name
        self.file: Path = self.options.out or folder / f"{name}.json"
        self.end = time.monotonic() + 60 * self.options.minutes
        self.left_out: list[str] = []
        kept = {}
        if self.file.is_file() and not self.options.fresh:
            kept = json.loads(self.file.read_text(encoding="utf-8"))["rows"]
        for part in self.options.join:
            kept |= json.loads(part.read_text(encoding="utf-8"))["rows"]
        self.rows: dict[str, dict[str, Any]] = kept
        self.facts: dict[str, Any] = {}

    def row(
        self, name: str, compute: Callable[[], Mapping[str, Any]], unit: int | None = None
    ) -> dict[str, Any] | None:
        """The figures of one row: kept ones, or computed now and written.

        Rows of one ``unit``, numbered from 1, stay in one part.
        """
        self.asked += 1
        if name not in self.rows:
            number = self.asked if unit is None else unit
            if number % self.parts != self.part % self.parts:
                return None
            if time.monotonic() > self.end:
                self.left_out.append(name)
                return None
            if not self._claimed(name):
                return None
            begun = time.perf_counter()
            figures = dict(compute())
            figures.setdefault("seconds", round(time.perf_counter() - begun, 2))
            self.rows[name] = figures
            self.write()
            shown = {k: v for k, v in figures.items() if isinstance(v, (int, float, str))}
            print(f"{name}: {shown}", flush=True)
        return self.rows[name]

    def _claimed(self, name: str) -> bool:
        """Whether the row is this process's: whoever makes its folder first computes it."""
        if self.options.claims is None:
            return True
        folder = self.options.claims / self.name / name
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            return False
        return True

    def write(self) -> None:
        """The results file, with what a reader needs to place the figures."""
        import torch

        import weightshare

        content = {
            "command": " ".join(["python", *sys.argv]).replace(str(Path.cwd()) + "/", ""),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "weightshare": weightshare.__version__,
            **self.facts,
            "rows": self.rows,
        }
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.file) as path:
            path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def show(self, columns: Sequence[str]) -> None:
        """Print the rows as a table."""
        width = max([len(name) for name in self.rows] + [3])
        print("\n" + " " * width + "".join(f"{name:>16}" for name in columns))
        for name, figures in self.rows.items():
            cells = "".join(f"{_text(figures.get(column)):>16}" for column in columns)
            print(f"{name:<{width}}{cells}")
        if self.left_out:
            print(f"not run for lack of time: {', '.join(self.left_out)}")
        print(f"written to {self.file.name}")


def found_or_leave(find: Callable[[], Any]) -> Any:
    """What ``find`` finds; where the data is not on this machine, the script ends, not failing."""
    try:
        return find()
    except UserError as error:
        print(f"not run: {error}")
        sys.exit(0)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean and half width of the 95 % interval over seeds (Student's t)."""
    from scipy.stats import t

    n = len(values)
    if n < 2:
        return {"mean": values[0], "half_width": math.nan, "n": n}
    half = float(t.ppf(0.975, n - 1)) * stdev(values) / math.sqrt(n)
    return {"mean": mean(values), "half_width": half, "n": n}
