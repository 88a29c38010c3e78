"""Several processes of one command, as ``accelerate launch`` or ``torchrun`` start them.

Only the training loop is shared among them. The first process does everything else and owns the
run directory; the others wait for what it decides, train with it, and write nothing.
"""

import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from weightshare.errors import UserError

WAIT = timedelta(days=7)
"""How long the others wait for the first one's decision, such as a long ranking."""


@dataclass(frozen=True)
class Ranks:
    """This process among its siblings; ``accelerator`` is None where it has none."""

    accelerator: Any
    device: str

    @property
    def first(self) -> bool:
        """Whether this process writes and prints."""
        return self.accelerator is None or bool(self.accelerator.is_main_process)

    def told(self, value: Any = None) -> Any:
        """The first process's ``value``, on every process; the others wait for it."""
        if self.accelerator is None:
            return value
        from weightshare.training import Place

        return Place.of(self.accelerator, "fp32").agreed(value)


def ranks(device: str) -> Ranks:
    """Join the other processes, if there are any.

    Args:
        device: as ``--device``; several processes take one GPU each, or all the CPU.

    Raises:
        UserError: one device is named for several processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks(None, device)
    if device not in ("auto", "cpu"):
        raise UserError(
            f"--device is {device!r} for {os.environ['WORLD_SIZE']} processes; "
            "use auto, which gives each its own GPU, or cpu."
        )
    from accelerate import Accelerator, InitProcessGroupKwargs

    accelerator = Accelerator(
        cpu=device == "cpu", kwargs_handlers=[InitProcessGroupKwargs(timeout=WAIT)]
    )
    return Ranks(accelerator, str(accelerator.device))


class Follower:
    """A run directory as the other processes see it: checkpoints are read, nothing is written."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"

    def log(self, step: int, **scalars: float) -> None:
        """Nothing: the first process logs."""

    def truncate(self, step: int) -> None:
        """Nothing: the first process does."""
