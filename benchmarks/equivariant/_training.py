"""Training the rows of a table for a number of epochs, in a limited time, across several calls.

Several rows can be trained together, a CUDA graph each on a stream of its own: single steps of
these networks are many small kernels, which leave most of a GPU idle.
"""

import argparse
import math
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from _table import Table

from weightshare.equivariant import RotatedUpdate
from weightshare.training import (
    Captured,
    EpochBatches,
    LoopConfig,
    State,
    Task,
    checkpoint,
    join,
    keep_freed_memory,
    part,
    reseed,
    same_streams_after,
)

TRIAL = 60
"""Steps on a GPU that tell how long one takes."""
PAUSE = 60
"""Seconds between two checkpoints."""


@dataclass
class Row:
    """One network to train; ``config`` without the number of steps."""

    task: Task
    batches: EpochBatches
    update: Mapping[str, Any]
    config: dict[str, Any]
    evaluate: Callable[[], float] | None = None
    """Watched error: the weights with the lowest are kept; without, the averaged last ones."""
    evaluations: int = 40
    best: dict[str, Tensor] = field(default_factory=dict)
    lowest: float = float("inf")


@dataclass
class Course:
    """How far training is; ``place`` is the step of the schedule, ``seen`` counts evaluations."""

    steps: int
    step: int = 0
    place: int = 0
    seen: int = 0
    seconds: float = 0.0
    processor_seconds: float = 0.0


def add_options(parser: argparse.ArgumentParser, seconds: int) -> None:
    """The options that ``fill`` reads."""
    parser.add_argument("--seeds", default="0", help="of networks without their own, as in pnita:3")
    parser.add_argument("--epochs", type=int, default=0, help="0: as many as fit into --seconds")
    parser.add_argument(
        "--seconds", type=float, help=f"longest training time, {seconds} without --epochs"
    )
    parser.add_argument("--together", action="store_true", help="train all rows at once")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.set_defaults(usual_seconds=seconds)


def fill(
    table: Table,
    names: Sequence[str],
    build: Callable[[str, int], Row],
    test: Callable[[str, int, Row], Mapping[str, float]],
) -> None:
    """Train a network of every name and seed, and write what ``test`` says of it as a row."""
    options = table.options
    seconds = options.seconds or (1e6 if options.epochs else options.usual_seconds)
    wanted = []
    for name, own in (name.partition(":")[::2] for name in names):
        wanted += [(name, int(seed)) for seed in (own or options.seeds).split(",")]
    wanted = [pair for pair in wanted if "{}, seed {}".format(*pair) not in table.rows]
    end, table.end = table.end, math.inf  # what has been trained is tested, however late it is
    for group in [wanted] if options.together and wanted else [[pair] for pair in wanted]:
        stop = end - 5 - 3 * len(group)
        rows = [build(*pair) for pair in group] if time.monotonic() < stop else []
        folder = table.file.with_name("{},{},{}".format(table.file.stem, *group[0]))
        took = fit(rows, folder, options.epochs, seconds, stop) if rows else None
        if took is None:
            print("not finished in time; the same command goes on")
            return
        for pair, row, about in zip(group, rows, took, strict=True):
            figures = partial(test, *pair, row)
            table.row("{}, seed {}".format(*pair), lambda f=figures, a=about: {**a, **f()})


def fit(
    rows: Sequence[Row], folder: Path, epochs: int, seconds: float, stop: float
) -> list[dict[str, float]] | None:
    """Train all rows together, each as ``training.Loop`` would; what it took, or None.

    For so many epochs, or without as many as fit into the seconds: then a trial says how many steps
    that is, and what it changes is undone. Where the seconds turn out too short, because of
    whatever else came to use the machine, the schedule follows the clock: training ends in time,
    with the learning rate at zero, and all rows with the same number of steps.

    When the clock (``time.monotonic``) shows ``stop`` before that, training is left: ``folder``
    holds a checkpoint, and the next call with these rows goes on from there.
    """
    keep_freed_memory()
    epoch = max(rows[0].batches.size // rows[0].batches.batch_size, 1)
    found = checkpoint.checkpoints(folder)
    steps = epochs * epoch
    if not steps and not found:
        begun = time.monotonic()
        kept = [{k: v.clone() for k, v in row.task.state_dict().items()} for row in rows]
        each = trial(rows)
        for row, state in zip(rows, kept, strict=True):
            row.task.load_state_dict(state)
        seconds -= time.monotonic() - begun
        steps = max(int(0.98 * seconds / each), 20)
    course = Course(**checkpoint.load(found[-1])[1]["course"]) if found else Course(steps)
    updates, streams = zip(*(start(row, course.steps) for row in rows), strict=True)
    if found:
        go_on(found[-1], rows, updates)
    if not train(rows, updates, streams, course, folder, 0.98 * seconds, stop):
        return None
    shutil.rmtree(folder, ignore_errors=True)
    return [
        {
            "parameters": sum(p.numel() for p in row.task.parameters()),
            "steps": course.step,
            "epochs": course.step / epoch,
            "trained_together": len(rows),
            "seconds": course.seconds,
            "processor_seconds": course.processor_seconds,
            "ms_per_step": 1000 * course.seconds / course.step,
        }
        for row in rows
    ]


def train(
    rows: Sequence[Row],
    updates: Sequence[Captured],
    streams: Sequence[Callable[[], Any]],
    course: Course,
    folder: Path,
    seconds: float,
    stop: float,
) -> bool:
    """Step by step, one row after another on its own stream; whether the course was finished. The
    place in the schedule is the step, or the share of the time that is over where that is more."""
    begun = time.monotonic() - course.seconds
    processor = time.process_time() - course.processor_seconds
    saved = time.monotonic()
    with same_streams_after():
        while course.place < course.steps:
            for row, update, stream in zip(rows, updates, streams, strict=True):
                reseed(row.config["seed"], course.step)
                with stream():
                    update.apply(update.prepare(row.batches[course.step], course.place))
            course.step += 1
            if course.step % 50 == 0:
                wait()  # the host must not run ahead of the clock
            now = time.monotonic()
            course.seconds = now - begun
            course.processor_seconds = time.process_time() - processor
            over = int(course.seconds / seconds * course.steps)
            course.place = min(max(course.step, over), course.steps)
            seen = course.place * rows[0].evaluations // course.steps
            if seen > course.seen:
                course.seen = seen
                wait()
                for row, update in zip(rows, updates, strict=True):
                    if row.evaluate is not None:
                        watch(row, update)
                wait()
                done = course.place / course.steps
                print(f"step {course.step}, {done:.0%}", file=sys.stderr, flush=True)
            if course.place < course.steps and now > min(saved + PAUSE, stop):
                wait()
                keep(folder, rows, updates, course)
                saved = time.monotonic()
                if now > stop:
                    return False
    wait()
    for row, update in zip(rows, updates, strict=True):
        if row.best:
            row.task.load_state_dict(row.best)
        else:
            update.keep_average()
    return True


def start(row: Row, steps: int) -> tuple[Captured, Callable[[], Any]]:
    """A fresh update, and the context its steps run in."""
    config = LoopConfig(steps=steps, **row.config)
    update = Captured(RotatedUpdate.from_config(row.task, config, **row.update))
    if update.device.type != "cuda":
        return update, nullcontext
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    return update, lambda: torch.cuda.stream(stream)


def keep(folder: Path, rows: Sequence[Row], updates: Sequence[Captured], course: Course) -> None:
    states = {}
    for k, (row, update) in enumerate(zip(rows, updates, strict=True)):
        best = State(row.best, {"lowest": row.lowest if row.best else None})
        states[str(k)] = join({"update": update.state(), "best": best})
    state = join(states)
    values = {"states": state.values, "course": vars(course)}
    checkpoint.save(folder, course.step, state.tensors, values, keep=1)


def go_on(path: Path, rows: Sequence[Row], updates: Sequence[Captured]) -> None:
    tensors, values = checkpoint.load(path)
    for k, (row, update) in enumerate(zip(rows, updates, strict=True)):
        state = part(State(tensors, values["states"]), str(k))
        update.load(part(state, "update"))
        best = part(state, "best")
        if best.tensors:
            row.best, row.lowest = best.tensors, best.values["lowest"]
    wait()


def watch(row: Row, update: Captured) -> None:
    """Keep the averaged weights where they are the best so far."""
    assert row.evaluate is not None
    with update.averaged():
        error = row.evaluate()
        if error < row.lowest:
            row.lowest = error
            row.best = {k: v.clone() for k, v in row.task.state_dict().items()}


def wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def trial(rows: Sequence[Row]) -> float:
    """Seconds of a step of all rows, steps queued one behind another."""
    cuda = next(rows[0].task.parameters()).is_cuda
    updates, streams = zip(*(start(row, 1000) for row in rows), strict=True)
    warm, count = (6, TRIAL) if cuda else (1, 5)
    begun = 0.0
    for step in range(warm + count):
        if step == warm:
            wait()
            begun = time.perf_counter()
        for row, update, stream in zip(rows, updates, streams, strict=True):
            with stream():
                update.apply(update.prepare(row.batches[step], step))
    wait()
    return (time.perf_counter() - begun) / count
