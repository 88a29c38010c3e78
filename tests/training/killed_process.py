"""Train a tiny model in a run directory, noting every step begun: ``killed_process.py FOLDER``."""

import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_task import FakeRun, TwoCounts, seeded, tokens

from weightshare.training import EpochBatches, GradientUpdate, Loop, LoopConfig

EVERY, STEPS = 5, 60


class Noted(EpochBatches):
    """Batches that write down each step they are asked for."""

    def __init__(self, file: Path, *arguments: object) -> None:
        super().__init__(*arguments)
        self.file = file.open("a", buffering=1)

    def __getitem__(self, step: int) -> object:
        self.file.write(f"{step}\n")
        time.sleep(0.004)
        return super().__getitem__(step)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    config = LoopConfig(
        steps=STEPS, learning_rate=0.01, checkpoint_every=EVERY, log_every=3, ema_decay=0.9
    )
    task = seeded(TwoCounts, dropout=0.3)
    update = GradientUpdate.from_config(task, config)
    run = FakeRun(folder)
    Loop(update, Noted(folder / "steps", tokens(40), 8), config, run, progress=False).fit()
    save_file(dict(task.state_dict()), folder / "final.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
