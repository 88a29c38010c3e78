"""Training the rows of a table: for a number of epochs, or as many steps as fit into a time.

Several rows can be trained together, a CUDA graph each on a stream of its own: single steps of
these networks are many small kernels, which leave most of a GPU idle.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from weightshare.equivariant import RotatedUpdate
from weightshare.training import (
    Captured,
    EpochBatches,
    LoopConfig,
    Task,
    keep_freed_memory,
    reseed,
    same_streams_after,
)

TRIAL = 60
"""Steps on a GPU that tell how long one takes."""


@dataclass
class Row:
    """One network to train; ``config`` without the number of steps."""

    task: Task
    batches: EpochBatches
    update: Mapping[str, Any]
    config: dict[str, Any]
    evaluate: Callable[[], float] | None = None
    """Watched error: the weights with the lowest are kept; without, the averaged last ones."""
    best: dict[str, Tensor] = field(default_factory=dict)
    lowest: float = float("inf")


def fit(
    rows: Sequence[Row], seconds: float, epochs: int, evaluations: int = 40
) -> list[dict[str, float]]:
    """Train all rows together, each as ``training.Loop`` would; what it took.

    Without ``epochs``, a trial says how many steps will fit, and what it changes is undone. The
    learning rate then follows the time and not the step: whatever else comes to use the machine,
    training ends when the seconds are over, with the rate at zero.
    """
    keep_freed_memory()
    epoch = max(rows[0].batches.size // rows[0].batches.batch_size, 1)
    begun, steps, end = time.monotonic(), epochs * epoch, None
    if not epochs:
        kept = [{k: v.clone() for k, v in row.task.state_dict().items()} for row in rows]
        each = trial(rows)
        for row, state in zip(rows, kept, strict=True):
            row.task.load_state_dict(state)
        end = begun + 0.98 * seconds
        steps = max(int((end - time.monotonic()) / each), 20)
    processor = time.process_time()
    done = train(rows, steps, evaluations, end)
    taken = time.monotonic() - begun
    return [
        {
            "parameters": sum(p.numel() for p in row.task.parameters()),
            "steps": done,
            "epochs": done / epoch,
            "trained_together": len(rows),
            "seconds": taken,
            "processor_seconds": time.process_time() - processor,
            "ms_per_step": 1000 * taken / done,
        }
        for row in rows
    ]


def train(rows: Sequence[Row], steps: int, evaluations: int, end: float | None) -> int:
    """Step by step, one row after another on its own stream; the number of steps. With an ``end``,
    the place in the schedule of ``steps`` is the share of the time that is over."""
    updates, streams = zip(*(start(row, steps) for row in rows), strict=True)
    begun, step, place, seen = time.monotonic(), 0, 0, 0
    with same_streams_after():
        while place < steps:
            for row, update, stream in zip(rows, updates, streams, strict=True):
                reseed(row.config["seed"], step)
                with stream():
                    update.apply(update.prepare(row.batches[step], place))
            step += 1
            if step % 50 == 0:
                wait(updates[0])  # the host must not run ahead of the clock
            share = step / steps
            if end is not None:
                share = (time.monotonic() - begun) / (end - begun)
            place = int(share * steps)
            if int(share * evaluations) > seen:
                seen = int(share * evaluations)
                for row, update in zip(rows, updates, strict=True):
                    if row.evaluate is not None:
                        wait(update)
                        watch(row, update)
    for row, update in zip(rows, updates, strict=True):
        wait(update)
        if row.best:
            row.task.load_state_dict(row.best)
        else:
            update.keep_average()
    return step


def start(row: Row, steps: int) -> tuple[Captured, Callable[[], Any]]:
    """A fresh update, and the context its steps run in."""
    config = LoopConfig(steps=steps, **row.config)
    update = Captured(RotatedUpdate.from_config(row.task, config, **row.update))
    if update.device.type != "cuda":
        return update, nullcontext
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    return update, lambda: torch.cuda.stream(stream)


def watch(row: Row, update: Captured) -> None:
    """Keep the averaged weights where they are the best so far."""
    assert row.evaluate is not None
    with update.averaged():
        error = row.evaluate()
        if error < row.lowest:
            row.lowest = error
            row.best = {k: v.clone() for k, v in row.task.state_dict().items()}
        wait(update)


def wait(update: Captured) -> None:
    if update.device.type == "cuda":
        torch.cuda.synchronize()


def trial(rows: Sequence[Row]) -> float:
    """Seconds of a step of all rows, steps queued one behind another."""
    cuda = next(rows[0].task.parameters()).is_cuda
    updates, streams = zip(*(start(row, 1000) for row in rows), strict=True)
    warm, count = (6, TRIAL) if cuda else (1, 5)
    begun = 0.0
    for step in range(warm + count):
        if step == warm:
            wait(updates[0])
            begun = time.perf_counter()
        for row, update, stream in zip(rows, updates, streams, strict=True):
            with stream():
                update.apply(update.prepare(row.batches[step], step))
    wait(updates[0])
    return (time.perf_counter() - begun) / count
