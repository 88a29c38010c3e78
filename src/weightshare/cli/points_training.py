"""What the stories of ``weightshare points`` share: sizes, training, saving, the dry run."""

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightshare.equivariant.config import PointsConfig


CHECKED = 100
"""Test examples that are rotated to measure equivariance."""


def rounded(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Four digits are enough for a terminal."""
    return [
        {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
        for row in rows
    ]


def sizes(config: "PointsConfig") -> dict[str, int]:
    """The network's sizes."""
    return {name: config.size(name) for name in ("orientations", "hidden", "basis", "layers")}


def train(
    config: "PointsConfig",
    run: Any,
    task: Any,
    data: Any,
    vectors: tuple[str, ...],
    watch: str,
    evaluate: Any,
    capture: bool = True,
    signs: tuple[str, ...] = (),
    rescaled: bool = False,
    **options: Any,
) -> float:
    """Train with warm-up, cosine, clipping, averaged weights; seconds of training."""
    import torch

    from weightshare.equivariant import RotatedUpdate
    from weightshare.equivariant.dynamics import Rescaled
    from weightshare.equivariant.frames import FrameBatches, Frames
    from weightshare.training import (
        Captured,
        EpochBatches,
        GradientUpdate,
        Loop,
        LoopConfig,
        Update,
        keep_freed_memory,
    )

    keep_freed_memory()

    frames = isinstance(data, Frames)
    count = len(data) if frames else len(data[vectors[0]])
    size = config.size("batch_size")
    batches: Any = EpochBatches(torch.arange(count) if frames else data, size, config.seed)
    if frames:
        batches = FrameBatches(data, batches)
    if rescaled:
        batches = Rescaled(batches)
    steps = max(config.size("epochs") * count // size, 1)
    warmup = min(config.size("warmup_epochs") / config.size("epochs"), 0.1)
    loop_config = LoopConfig(
        steps=steps, learning_rate=config.size("learning_rate"), warmup_fraction=warmup,
        weight_decay=config.size("weight_decay"), clip=config.clip,
        ema_decay=config.size("ema") or None, seed=config.seed,
        log_every=max(steps // 200, 1), evaluate_every=max(steps // 20, 1), watch=watch,
        keep_best=True, checkpoint_every=max(steps // 20, 1),
    )  # fmt: skip
    update: Update
    if config.augment:
        update = RotatedUpdate.from_config(
            task, loop_config, vectors=vectors, signs=signs, **options
        )
    else:
        update = GradientUpdate.from_config(task, loop_config)
    if capture:
        update = Captured(update)
    return Loop(update, batches, loop_config, run, evaluate=evaluate).fit().seconds


def save(run: Any, model: Any) -> None:
    """The trained weights under the name every run uses."""
    from safetensors.torch import save_file

    def write(path: Any) -> None:
        if hasattr(model, "save"):
            model.save(path)
        else:
            save_file({k: v.contiguous() for k, v in model.state_dict().items()}, str(path))

    run.save("checkpoint.safetensors", write)


def estimate(config: "PointsConfig", task: Any, examples: int, batch: dict[str, Any]) -> None:
    """What would be trained, and how long one step of such a batch takes here."""
    from weightshare.cli.console import say, show_table
    from weightshare.training import total

    steps = max(config.size("epochs") * examples // config.size("batch_size"), 1)
    rows = [
        {"": "parameters", "value": sum(p.numel() for p in task.parameters())},
        {"": "training examples", "value": examples},
        {"": "steps", "value": steps},
    ]
    show_table("dry run", rows)
    for _ in range(2):  # the first one also warms up
        begun = time.perf_counter()
        total(task(batch)).backward()
        each = time.perf_counter() - begun
    say(f"time: about {each * steps:.0f} s of training, {1000 * each:.0f} ms a step")
    say("nothing was written")
