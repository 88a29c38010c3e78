"""Several training loops, one after another, in one run."""

from pathlib import Path
from typing import Protocol


class RunLike(Protocol):
    """What the loop needs of a run directory (``weightshare.report.Run`` has it)."""

    path: Path
    checkpoints: Path

    def log(self, step: int, **scalars: float) -> None: ...
    def truncate(self, step: int) -> None: ...


class Phase:
    """A view of ``run`` for one of its loops: own checkpoints, and steps counted on from ``start``.

    Give phases that follow each other rising starts (the steps of all loops before), so that
    resuming one cuts the metrics of no other.
    """

    def __init__(self, run: RunLike, name: str, start: int = 0) -> None:
        self.run, self.start = run, start
        self.path = run.path
        self.checkpoints = run.checkpoints / name

    def log(self, step: int, **scalars: float) -> None:
        self.run.log(self.start + step, **scalars)

    def truncate(self, step: int) -> None:
        self.run.truncate(self.start + step)
