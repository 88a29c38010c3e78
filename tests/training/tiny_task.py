"""One small task with unequal token counts, and a run directory that remembers."""

import json
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from weightshare.training import Losses, Task, Term

VOCABULARY = 11


class Tokens(Task):
    """Cross-entropy of every labelled token (-100: not labelled), counted in tokens."""

    def __init__(self, dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> None:
        super().__init__()
        self.frozen = nn.Embedding(VOCABULARY, 6, dtype=dtype).requires_grad_(False)
        self.net = nn.Sequential(
            nn.Linear(6, 8, dtype=dtype),
            nn.Tanh(),
            nn.Dropout(dropout),
            nn.Linear(8, VOCABULARY, dtype=dtype),
        )

    def forward(self, batch: dict[str, Tensor]) -> Losses:
        logits = self.net(self.frozen(batch["inputs"]))
        loss = cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
        return {"cross_entropy": Term(loss, (batch["labels"] != -100).sum())}


class TwoCounts(Tokens):
    """A second term with another unit (examples), its own weight, and a metric of weight 0."""

    def forward(self, batch: dict[str, Tensor]) -> Losses:
        logits = self.net(self.frozen(batch["inputs"]))
        labelled = batch["labels"] != -100
        size = (logits.mean(1).square().sum(1) * labelled.any(1)).sum()
        correct = ((logits.argmax(-1) == batch["labels"]) & labelled).sum()
        return super().forward(batch) | {
            "size": Term(size, int(labelled.any(1).sum()), weight=0.3),
            "accuracy": Term(correct, labelled.sum(), weight=0.0),
        }


def tokens(rows: int = 12, length: int = 7, seed: int = 0) -> dict[str, Tensor]:
    """Rows with 1 to ``length`` labelled tokens, so that parts of a batch count differently."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randint(VOCABULARY, (rows, length), generator=generator)
    labels = torch.randint(VOCABULARY, (rows, length), generator=generator)
    lengths = torch.arange(rows) % length + 1
    labels[torch.arange(length)[None] >= lengths[:, None]] = -100
    return {"inputs": inputs, "labels": labels}


class FakeRun:
    """The part of a run directory that the loop uses."""

    def __init__(self, path: Path) -> None:
        self.path, self.checkpoints = path, path / "checkpoints"
        self.file = path / "metrics.jsonl"
        path.mkdir(parents=True, exist_ok=True)
        self.file.touch()

    def log(self, step: int, **scalars: float) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps({"step": step, **scalars}) + "\n")

    def truncate(self, step: int) -> None:
        rows = [row for row in self.rows() if row["step"] <= step]
        self.file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def rows(self) -> list[dict[str, float]]:
        return [json.loads(line) for line in self.file.read_text().splitlines()]


def seeded(task: type[Task], **options: object) -> Task:
    torch.manual_seed(0)
    return task(**options)
