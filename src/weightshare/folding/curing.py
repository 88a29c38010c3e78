r"""Cure: fine-tune a folded model towards the model it was made from.

.. math:: L = a\,L_\mathrm{CE} + b\,\tau^2\,\mathrm{KL}(p_T^\tau \,\|\, p_S^\tau)
              + \frac{c}{m}\sum_j \frac{\mathrm{MSE}(h^S_j, h^T_{\pi(j)})}{\mathrm{mean}((h^T)^2)}

over the last m blocks j of the student, where pi(j) is the block of the teacher it was made from.
Only the tail is aligned: inner states of a shorter network need not match, and holding all of them
costs memory. Padding and prompts are left out of all three terms.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from weightshare.errors import UserError
from weightshare.folding.config import CureConfig
from weightshare.folding.families import blocks_of
from weightshare.folding.lora import SharedLora
from weightshare.folding.modeling_folded import FoldedModelMixin
from weightshare.language import Windows, cast, distillation_loss, hidden_mse, next_token_loss
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

HELDOUT_BATCH = 8
"""Sequences per batch of the held-out evaluation."""


class CureTask(Task):
    """Student and frozen teacher on one batch.

    A batch is a mapping with ``input_ids`` (b, t), ``mask`` (b, t: which tokens are targets) and,
    where it is padded, ``attention_mask`` (b, t).
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        config: CureConfig,
        depths: list[int],
    ) -> None:
        super().__init__()
        self.student, self.teacher, self.config = student, teacher, config
        self.tail = depths[max(0, len(depths) - config.tail_blocks) :] if config.tail else []
        self.lora: SharedLora | None = None

    def forward(self, batch: Mapping[str, Tensor]) -> Losses:
        ids, mask = batch["input_ids"], batch["mask"].bool()
        inputs = {"input_ids": ids, "attention_mask": batch.get("attention_mask")}
        first = len(blocks_of(self.student)) - len(self.tail)
        with _outputs(self.student, range(first, first + len(self.tail))) as mine:
            logits = self.student(**inputs, use_cache=False).logits
        cross_entropy, count = next_token_loss(logits, ids, mask)
        config = self.config
        losses = {"cross_entropy": Term(cross_entropy, count, config.cross_entropy)}
        if not config.distillation and not self.tail:
            return losses
        with torch.no_grad(), _outputs(self.teacher, self.tail) as theirs:
            target = self.teacher(**inputs, use_cache=False).logits
        divergence, _ = distillation_loss(logits, target, mask, config.temperature)
        losses["kl"] = Term(divergence, count, config.distillation)
        # The state that predicts a target stands one place before it.
        keep = torch.zeros_like(mask)
        keep[:, :-1] = mask[:, 1:]
        for student, teacher in zip(mine, theirs, strict=True):
            distance, square = hidden_mse(student, teacher, keep)
            losses[f"tail{len(losses) - 1}"] = Term(distance, square, config.tail / len(self.tail))
        return losses


@contextmanager
def _outputs(model: PreTrainedModel, blocks: Any) -> Iterator[list[Tensor]]:
    """Collect the hidden states behind the named blocks."""
    found: list[Tensor] = []
    handles = [
        blocks_of(model)[block].register_forward_hook(lambda _m, _i, out: found.append(out))
        for block in blocks
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def depths_of(student: PreTrainedModel, teacher: PreTrainedModel) -> list[int]:
    """For every block of the student, the block of the teacher whose output it should have."""
    count = len(blocks_of(student))
    if isinstance(student, FoldedModelMixin):
        groups = student.config.fold_plan["groups"]
        depths = sorted(block for group in groups for block in group)
    else:
        offset = len(blocks_of(teacher)) - count
        depths = [offset + index for index in range(count)]
    # Whatever was cut off behind it, the last block should end where the teacher ends.
    return [*depths[:-1], len(blocks_of(teacher)) - 1]


def trainable_parameters(
    student: PreTrainedModel, config: CureConfig, task: CureTask, seed: int
) -> list[nn.Parameter]:
    """The parameters that a cure trains, each once; a LoRA is attached to the task."""
    if config.trainable == "all":
        return list(student.parameters())
    private = [p for name, p in student.named_parameters() if "norm" in name or ".delta_" in name]
    if config.trainable == "norms":
        return private
    task.lora = SharedLora(student, config.lora_rank, seed=seed)
    return [*private, *task.lora.parameters()]


def cure(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    train: Windows | Mapping[str, Tensor],
    heldout: Windows | Mapping[str, Tensor] | None = None,
    config: CureConfig | None = None,
    *,
    seed: int = 0,
    run: RunLike | None = None,
    accelerator: Any = None,
    precision: str = "fp32",
    progress: bool = True,
) -> Fit:
    """Fine-tune ``student`` in place; ``teacher`` stays as it is.

    Half-precision weights are trained in float32 and cast back, because steps of 1e-4 vanish in
    bfloat16.

    Args:
        student: a folded or shortened model.
        teacher: the model it was made from.
        train: training windows, or a mapping with ``input_ids``, ``mask`` and ``attention_mask``.
        heldout: windows on which the held-out KL is watched.
        config: see ``CureConfig``.
        seed: of the order of the batches and of LoRA's start.
        run: a run directory, for metrics, checkpoints and resuming.
        accelerator: an ``accelerate.Accelerator`` for several processes.
        precision: ``bf16`` runs the forward passes under autocast.
        progress: show a bar.

    Raises:
        UserError: nothing to train on, no loss term left, or a loss that is not finite.
    """
    config = config or CureConfig()
    if not (config.cross_entropy or config.distillation or config.tail):
        raise UserError("All three loss weights of the cure are 0; give at least one a weight.")
    stored = student.dtype
    cast(student, torch.float32).train()
    teacher.eval()
    asked = {parameter: parameter.requires_grad for parameter in teacher.parameters()}
    for parameter in asked:
        parameter.requires_grad_(False)
    task = CureTask(student, teacher, config, depths_of(student, teacher))
    params = trainable_parameters(student, config, task, seed)
    before = {parameter: parameter.requires_grad for parameter in student.parameters()}
    for parameter in student.parameters():
        parameter.requires_grad_(False)
    for parameter in params:
        parameter.requires_grad_(True)
    every = config.evaluate_every or max(1, config.steps // 10)
    loop = LoopConfig(
        steps=config.steps,
        learning_rate=config.rate(),
        warmup_fraction=config.warmup_fraction,
        weight_decay=0.0,
        clip=config.clip,
        accumulate=config.accumulate,
        precision="bf16" if precision == "bf16" else "fp32",
        seed=seed,
        log_every=max(1, min(10, config.steps // 20)),
        evaluate_every=every if heldout is not None else 0,
        watch="kl" if config.distillation or config.tail else "cross_entropy",
        keep_best=heldout is not None,
        patience=config.patience or None,
        checkpoint_every=config.checkpoint_every,
    )
    rank, world = (
        (0, 1)
        if accelerator is None
        else (
            accelerator.process_index,
            accelerator.num_processes,
        )
    )
    batches = EpochBatches(columns(train), config.batch_size, seed, rank, world)
    try:
        update = GradientUpdate.from_config(task, loop, params)
        watched = _evaluation(task, heldout)
        fit = Loop(
            update, batches, loop, run, accelerator, evaluate=watched, progress=progress
        ).fit()
        if task.lora is not None:
            task.lora.merge()
    finally:
        for parameter, wanted in {**asked, **before}.items():
            parameter.requires_grad_(wanted)
        cast(student, stored).eval()
    return fit


def columns(windows: Windows | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Windows as the columns of a batch."""
    if isinstance(windows, Windows):
        return {"input_ids": windows.input_ids, "mask": windows.mask}
    return dict(windows)


def _evaluation(task: CureTask, heldout: Windows | Mapping[str, Tensor] | None) -> Any:
    if heldout is None:
        return None
    data = columns(heldout)

    def evaluate() -> dict[str, float]:
        count = len(data["input_ids"])
        batches = (
            {name: value[start : start + HELDOUT_BATCH] for name, value in data.items()}
            for start in range(0, count, HELDOUT_BATCH)
        )
        with torch.no_grad():
            return held_out(task, batches)

    return evaluate
