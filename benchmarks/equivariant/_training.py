"""Training one row of a table: for a number of epochs, or as many steps as fit into a time."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from weightshare.equivariant import RotatedUpdate
from weightshare.training import (
    Captured,
    EpochBatches,
    Loop,
    LoopConfig,
    Task,
    keep_freed_memory,
)

TRIAL = 60
"""Steps on a GPU that tell how long one takes."""


def fit(
    task: Task,
    batches: EpochBatches,
    *,
    seconds: float,
    epochs: int,
    update: Mapping[str, Any],
    evaluate: Callable[[], Mapping[str, float]] | None = None,
    evaluations: int = 40,
    **options: Any,
) -> dict[str, float]:
    """Train ``task`` with rotated examples, captured where there is a GPU; what it took.

    ``options`` go to ``LoopConfig``, ``update`` to ``RotatedUpdate``. Without ``epochs`` the trial
    that measures a step counts as training time, and what it changes is undone.
    """
    keep_freed_memory()
    epoch = max(batches.size // batches.batch_size, 1)
    steps, begun = epochs * epoch, time.monotonic()

    def build(steps: int) -> tuple[Captured, LoopConfig]:
        config = LoopConfig(steps=steps, checkpoint_every=0, log_every=500, **options)
        config.evaluate_every = max(steps // evaluations, 1) if evaluate else 0
        return Captured(RotatedUpdate.from_config(task, config, **update)), config

    if not epochs:
        kept = {k: v.clone() for k, v in task.state_dict().items()}
        each = step_seconds(build(1000)[0], batches)
        task.load_state_dict(kept)
        room = seconds - (time.monotonic() - begun)
        if evaluate is not None:
            trial = time.monotonic()
            evaluate()
            room -= (evaluations + 1) * (time.monotonic() - trial)
        steps = max(int(0.97 * room / each), 20)
    change, config = build(steps)
    processor = time.process_time()
    Loop(change, batches, config, evaluate=evaluate, progress=False).fit()
    if change.device.type == "cuda":
        torch.cuda.synchronize()
    taken = time.monotonic() - begun
    return {
        "parameters": sum(p.numel() for p in task.parameters()),
        "steps": steps,
        "epochs": steps / epoch,
        "seconds": taken,
        "processor_seconds": time.process_time() - processor,
        "ms_per_step": 1000 * taken / steps,
    }


def step_seconds(update: Captured, batches: EpochBatches) -> float:
    """Time of a step once it is captured, steps queued one behind another as the loop does."""
    cuda = update.device.type == "cuda"
    for step in range(6 if cuda else 1):
        update.apply(update.prepare(batches[step], step))
    if cuda:
        torch.cuda.synchronize()
    begun, count = time.perf_counter(), TRIAL if cuda else 5
    for step in range(count):
        update.apply(update.prepare(batches[step], step))
    if cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - begun) / count
