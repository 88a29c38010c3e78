"""Train a PEFT model on text or instructions: data, task, loop."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from weightshare.errors import UserError
from weightshare.language import (
    encode_instructions,
    holds_instructions,
    next_token_loss,
    pad,
    read_documents,
    read_instructions,
    split_documents,
    windows,
)
from weightshare.language.text import IGNORED
from weightshare.training import (
    EpochBatches,
    Fit,
    GradientUpdate,
    Loop,
    LoopConfig,
    Losses,
    RunLike,
    Task,
    Term,
    held_out,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELDOUT_BATCH = 8
"""Sequences per batch of the held-out evaluation."""
HELD_OUT_ROW = 10
"""Every so many-th row of an instruction file is held out where no other file is given."""

OPEN_SEQUENCES = 32
"""Packed sequences that may still take a row: enough to fill 95 % of dolly-15k at 512 tokens, where
the last one alone leaves a fifth empty, and few enough to keep the order of the file roughly."""

Columns = dict[str, Tensor]


@dataclass(frozen=True)
class TuneData:
    """Columns ``input_ids``, ``attention_mask``, ``labels``, each (n, length), and their origin."""

    train: Columns
    heldout: Columns
    kind: str
    prompts: list[str]

    @property
    def targets(self) -> int:
        """Tokens of the training set that are learnt from."""
        return int((self.train["labels"] != IGNORED).sum())


class TuneTask(Task):
    """Next-token loss of a causal language model; tokens labelled -100 are read, not learnt."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Mapping[str, Tensor]) -> Losses:
        logits = self.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).logits
        # Prompts of virtual tokens come in front of the text.
        logits = logits[:, -batch["labels"].shape[1] :]
        loss, count = next_token_loss(logits, batch["labels"])
        return {"cross_entropy": Term(loss, count)}


def read_data(
    tokenizer: "PreTrainedTokenizerBase",
    data: str,
    heldout: str | None = None,
    *,
    kind: str = "auto",
    length: int = 512,
    packing: bool = False,
    limit: int | None = None,
    heldout_limit: int = 64,
) -> TuneData:
    """Text or instructions, cut to ``length`` tokens, and the part that is held out.

    Of a text the last tenth of the documents is held out, of instructions every tenth row, unless
    ``heldout`` names other data. ``kind`` is text, instructions, or auto, which takes a .jsonl file
    whose first row has a response or messages for instructions. ``packing`` puts several
    instructions into one sequence: faster, but later ones see the earlier. ``limit`` keeps the
    first sequences.

    Raises:
        UserError: no data, too little of it, or rows that cannot be read.
    """
    if kind == "auto":
        lines = data.endswith((".jsonl", ".jsonl.gz")) and Path(data).expanduser().is_file()
        kind = "instructions" if lines and holds_instructions(data) else "text"
        if data.endswith(".json"):
            raise UserError(
                f"{data} is one JSON document, not a text; write one row a line into a .jsonl file "
                "(jq -c '.[]' does it), or learn it as it stands with kind text."
            )
    if kind == "text":
        splits = split_documents(read_documents(data))
        training = [*splits.train, *splits.calibration]
        held = splits.heldout
        if heldout is not None:
            training, held = [*training, *held], read_documents(heldout)
        parts = {}
        for name, documents, most in (("train", training, limit), ("held", held, heldout_limit)):
            cut = windows(tokenizer, documents, length, limit=most)
            mask = torch.ones_like(cut.input_ids)
            parts[name] = {"input_ids": cut.input_ids, "attention_mask": mask, "labels": cut.labels}
        prompts = [
            tokenizer.decode(row[:24], skip_special_tokens=True)
            for row in parts["held"]["input_ids"][:3]
        ]
        return TuneData(parts["train"], parts["held"], kind, prompts)
    rows = read_instructions(data)
    other = read_instructions(heldout) if heldout is not None else rows[::HELD_OUT_ROW]
    if heldout is None:
        rows = [row for i, row in enumerate(rows) if i % HELD_OUT_ROW]
    if not rows:
        raise UserError(f"{data} holds a single instruction; give at least two.")
    encoded = encode_instructions(tokenizer, rows, length)
    encoded = _packed(encoded, length) if packing else encoded
    held_rows = encode_instructions(tokenizer, other[:heldout_limit], length)
    fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    made = [
        pad([ids for ids, _ in part], [labels for _, labels in part], pad_id=fill)
        for part in (encoded[:limit], held_rows)
    ]
    prompts = [
        tokenizer.decode([i for i, t in zip(ids, labels, strict=True) if t == IGNORED])
        for ids, labels in held_rows[:3]
    ]
    return TuneData(made[0], made[1], kind, prompts)


def evaluate_loss(model: nn.Module, heldout: Columns) -> float:
    """Held-out nats per learnt token."""
    task = TuneTask(model)
    count = len(heldout["input_ids"])
    batches = (
        {name: column[start : start + HELDOUT_BATCH] for name, column in heldout.items()}
        for start in range(0, count, HELDOUT_BATCH)
    )
    with torch.no_grad():
        return held_out(task, batches)["loss"]


def tune(
    model: nn.Module,
    data: TuneData,
    config: LoopConfig,
    batch_size: int = 8,
    *,
    run: RunLike | None = None,
    accelerator: Any = None,
    progress: bool = True,
) -> Fit:
    """Train what requires a gradient in ``model``, watching the held-out loss; ends in eval mode.

    ``Fit.evaluation["loss"]`` is the held-out loss of the weights that were kept.

    Raises:
        UserError: nothing to train, or a loss that is not finite.
    """
    model.train()
    rank, world = 0, 1
    if accelerator is not None:
        rank, world = accelerator.process_index, accelerator.num_processes
    batches = EpochBatches(data.train, batch_size, config.seed, rank, world)
    update = GradientUpdate.from_config(TuneTask(model), config)
    evaluate: Callable[[], Mapping[str, float]] = lambda: {  # noqa: E731
        "loss": evaluate_loss(model, data.heldout)
    }
    fit = Loop(
        update, batches, config, run, accelerator, evaluate=evaluate, progress=progress
    ).fit()
    model.eval()
    return fit


def _packed(
    rows: list[tuple[list[int], list[int]]], length: int
) -> list[tuple[list[int], list[int]]]:
    """Rows joined into sequences of at most ``length`` tokens: each to the first with room for it
    among the last few."""
    packed: list[tuple[list[int], list[int]]] = []
    for ids, labels in rows:
        # Nothing predicts the first token of a row from the row before.
        labels = [IGNORED, *labels[1:]]
        for joined_ids, joined_labels in packed[-OPEN_SEQUENCES:]:
            if len(joined_ids) + len(ids) <= length:
                joined_ids.extend(ids)
                joined_labels.extend(labels)
                break
        else:
            packed.append((list(ids), labels))
    return packed
