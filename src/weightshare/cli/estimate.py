"""``weightshare fold --dry-run``: size, memory and time of a fold without doing it."""

import math
import time
from typing import TYPE_CHECKING

from weightshare.cli.console import say, show_table

if TYPE_CHECKING:
    from weightshare.folding.config import FoldConfig
    from weightshare.folding.plans import FoldPlan
    from weightshare.language import LanguageModel, Windows

BACKWARD = 4.0
"""Forward passes that a step of the cure costs: its own, two for the gradient, the teacher's."""


def show_estimate(
    config: "FoldConfig",
    source: "LanguageModel",
    given: "FoldPlan | None",
    protect: list[int],
    texts: "dict[str, Windows]",
) -> None:
    """Print blocks, unique parameters, bytes, memory and time."""
    from weightshare.folding import plan
    from weightshare.folding.blocks import BlockLosses
    from weightshare.folding.families import block_sizes

    sizes = block_sizes(source.model)
    # Which blocks go only the ranking knows; how many go decides the size.
    middle_first = sorted(range(sizes.blocks), key=lambda b: abs(b - sizes.blocks / 2))
    example = given or plan(
        source.model,
        middle_first,
        remove=config.remove,
        share=config.share,
        target_params=config.target_params,
        protect=protect,
    )
    begun = time.perf_counter()
    BlockLosses(source.model, texts["calibration"].input_ids[:2]).of(list(range(sizes.blocks)))
    forward = (time.perf_counter() - begun) / 2

    width = source.stored_dtype.itemsize
    before, after = sizes.total(), sizes.total(example)
    blocks = sizes.blocks * (sizes.shared + sizes.private)
    rows = [
        {"": "blocks that run", "before": sizes.blocks, "after": len(example.remaining)},
        {"": "sets of block weights", "before": sizes.blocks, "after": example.unique_blocks},
        {"": "unique parameters", "before": before, "after": after},
        {"": "of these in blocks", "before": blocks, "after": blocks - (before - after)},
        {"": "bytes as saved", "before": before * width, "after": after * width},
    ]
    show_table("dry run", rows)
    # In float32: both models, and for the cure gradients and AdamW's two moments.
    trained = after if config.cure.steps and config.cure.trainable == "all" else 0
    memory = 4 * (before + after + 3 * trained)
    passes = ranking_passes(config, sizes.blocks, len(example.removed), given is not None)
    ranking = passes * forward * config.calibration_sequences
    curing = BACKWARD * forward * config.cure.steps * config.cure.batch_size
    say(f"memory: about {memory / 1e9:.2f} GB for weights and optimizer, activations besides")
    say(f"time on {source.model.device}: ranking {ranking:.0f} s, cure {curing:.0f} s, roughly")
    if given is None:
        say("which blocks go is decided by the ranking; nothing was written")


def ranking_passes(config: "FoldConfig", blocks: int, removed: int, given: bool) -> float:
    """Forward passes per calibration sequence that the ranking costs."""
    if given or not removed:
        return 1.0
    gates, half = config.gates, blocks / 2
    costs = {
        "gates": 3.0 * gates.steps * gates.seeds * gates.sequences / config.calibration_sequences,
        "one_shot": half,
        "greedy": half * removed,
        "coupling": 2.0 * blocks,
        "exhaustive": math.comb(blocks, removed) / 3,
    }
    swaps = blocks * removed if config.refine == "swaps" else 0
    return costs.get(config.ranking, 1.0) + swaps
