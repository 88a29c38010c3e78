"""Pictures of a fold. Plain data in, matplotlib figures out."""

from collections.abc import Mapping, Sequence
from string import ascii_lowercase
from typing import TYPE_CHECKING

from weightshare.report import figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from weightshare.folding.plans import FoldPlan


def plan_strip(plan: "FoldPlan") -> "Figure":
    """The blocks in a row: kept, removed, or shared; one letter, one set of weights."""
    shared = {block: group for group in plan.shared_groups for block in group}
    letters = {
        group: ascii_lowercase[number % 26] * (1 + number // 26)
        for number, group in enumerate(plan.shared_groups)
    }
    blocks = []
    for block in range(plan.blocks):
        if block in plan.removed:
            blocks.append((str(block), "removed", f"block {block}: removed"))
        elif block in shared:
            others = ", ".join(map(str, shared[block]))
            label = f"{block}\n{letters[shared[block]]}"
            blocks.append((label, "shared", f"block {block}: one set of weights for {others}"))
        else:
            blocks.append((str(block), "kept", f"block {block}: its own weights"))
    return figures.strip(blocks)


def similarity_map(cosines: Sequence[Sequence[float]]) -> "Figure":
    """Mean cosine between the hidden states at every two depths."""
    return figures.heatmap(
        cosines, x="hidden state before block", y="hidden state before block", numbers=False
    )


def scores_bars(scores: Sequence[float], removed: Sequence[int], label: str) -> "Figure":
    """The importance of every block; removed ones stand out."""
    values = {f"block {block}": score for block, score in enumerate(scores)}
    return figures.bars(values, highlight=[f"block {block}" for block in removed], x=label)


def gate_course(history: Sequence[Sequence[float]], removed: Sequence[int]) -> "Figure":
    """The gates of one seed over training; one line per block."""
    steps = list(range(len(history)))
    return figures.lines(
        {
            f"{block}{' (removed)' if block in removed else ''}": (
                steps,
                [row[block] for row in history],
            )
            for block in range(len(history[0]))
        },
        x="step",
        y="gate",
    )


def loss_steps(losses: Mapping[str, float]) -> "Figure":
    """Held-out loss after each step of the fold."""
    return figures.bars(losses, x="held-out loss (nats per token)")


def cure_course(
    train: Sequence[tuple[int, float]], heldout: Sequence[tuple[int, float]]
) -> "Figure":
    """Training loss and held-out divergence during the cure."""
    series = {}
    if train:
        series["training cross entropy"] = ([s for s, _ in train], [v for _, v in train])
    if heldout:
        series["held-out KL to the original"] = ([s for s, _ in heldout], [v for _, v in heldout])
    return figures.lines(series, x="step", y="nats per token")


def size_and_loss(points: Sequence[tuple[float, float, str]]) -> "Figure":
    """Bytes against held-out loss, one named point per model."""
    return figures.scatter(points, x="bytes of the weights", y="held-out loss (nats per token)")
