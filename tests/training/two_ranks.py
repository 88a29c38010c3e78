"""One of two gloo processes that train together: ``two_ranks.py RESULT PARTS`` under torchrun."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from tiny_task import FakeRun, TwoCounts, seeded, tokens
from torch import Tensor

from weightshare.training import (
    EpochBatches,
    GradientUpdate,
    Loop,
    LoopConfig,
    Losses,
    Place,
    Term,
    held_out,
)


class OddPath(TwoCounts):
    """One layer is used for labelled rows of rank 1 only, another never."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self.sometimes = torch.nn.Linear(6, 1, dtype=torch.float64)
        self.never = torch.nn.Linear(6, 1, dtype=torch.float64)

    def forward(self, batch: dict[str, Tensor]) -> Losses:
        losses = super().forward(batch)
        chosen = batch["inputs"][batch["labels"][:, -1] != -100]
        extra = self.sometimes(self.frozen(chosen)).square().sum() if len(chosen) else None
        value = losses["size"].sum * 0 if extra is None else extra
        return losses | {"odd": Term(value, chosen.numel(), 0.5)}


def train(parts: int, accelerator: Accelerator | None, run: FakeRun | None = None) -> dict:
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    config = LoopConfig(steps=9, learning_rate=0.01, accumulate=parts, weight_decay=0.1)
    task = seeded(OddPath)
    if rank:  # rank 0's weights are the ones that count
        for parameter in task.parameters():
            parameter.data.add_(1.0)
    update = GradientUpdate.from_config(task, config)
    batches = EpochBatches(tokens(15), 7, 0, rank, world)
    place = Place.of(accelerator, "fp32") if accelerator else None
    share = {name: tensor[rank::world] for name, tensor in tokens(9, seed=5).items()}

    def evaluate() -> dict[str, float]:
        return held_out(task, [share], place)

    loop = Loop(update, batches, config, run, accelerator, evaluate=evaluate, progress=False)
    fitted = loop.fit()
    numbers = fitted.metrics | {f"held_out.{k}": v for k, v in fitted.evaluation.items()}
    scalars = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
    return dict(task.state_dict()) | scalars


def main(result: Path, parts: int) -> None:
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    run = FakeRun(result / "run")
    save_file(train(parts, accelerator, run), result / f"rank{accelerator.process_index}")
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
