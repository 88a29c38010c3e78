"""Run a language model block by block: what every ranking needs.

Removing a block changes nothing before it, so the hidden states in front of it can be kept and a
subset's loss costs only the blocks behind the change.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from weightshare.folding.families import blocks_of
from weightshare.language import evaluating, next_token_loss

Memo = Callable[[str, Callable[[], Any]], Any]
"""``memo(key, compute)``: the value kept under ``key``, computed if there is none."""


def no_memo(key: str, compute: Callable[[], Any]) -> Any:
    """Compute every time."""
    return compute()


class _Recorder(nn.Module):
    """Stands in for a block: notes how it is called and passes the hidden states through."""

    def __init__(self) -> None:
        super().__init__()
        self.kwargs: dict[str, Any] = {}

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        self.kwargs = kwargs
        return hidden


class Batch:
    """One batch of token ids (b, t) at the door of the first block."""

    def __init__(self, model: PreTrainedModel, ids: Tensor) -> None:
        self.model, self.ids = model, ids
        layers = blocks_of(model)
        recorders = [_Recorder() for _ in layers]
        norm = model.model.norm
        door: list[Tensor] = []
        try:
            # The model's own forward prepares masks and positions, so this holds for every family.
            model.model.layers = nn.ModuleList(recorders)
            model.model.norm = nn.Identity()
            door.append(model.model(input_ids=ids, use_cache=False).last_hidden_state)
        finally:
            model.model.layers = layers
            model.model.norm = norm
        self.start = door[0]
        """Embedded tokens (b, t, d)."""
        self.calls = [recorder.kwargs for recorder in recorders]

    def block(self, index: int, hidden: Tensor, at: int | None = None) -> Tensor:
        """Block ``index`` applied to hidden states (b, t, d), standing where block ``at`` stood.

        The kind of attention (full or sliding) belongs to the place, not to the weights.
        """
        return blocks_of(self.model)[index](hidden, **self.calls[index if at is None else at])

    def run(self, hidden: Tensor, blocks: Sequence[int], at: Sequence[int] | None = None) -> Tensor:
        """Several blocks, one after another."""
        for index, place in zip(blocks, blocks if at is None else at, strict=True):
            hidden = self.block(index, hidden, place)
        return hidden

    def loss(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Next-token cross entropy from the last hidden states: (sum in nats, number of tokens)."""
        logits = self.model.lm_head(self.model.model.norm(hidden))
        return next_token_loss(logits, self.ids)


class BlockLosses:
    """Losses of a model with some of its blocks, on one calibration tensor.

    Args:
        model: the causal language model; left as it is.
        calibration: token ids (n, length) without padding.
        batch_size: sequences per batch.
        memo: keeps what was computed, so that a killed ranking goes on where it was.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        calibration: Tensor,
        batch_size: int = 8,
        memo: Memo = no_memo,
    ) -> None:
        self.model, self.memo = model, memo
        self.batches = calibration.split(batch_size)
        self.blocks = len(blocks_of(model))
        self.block_runs = 0
        """Blocks run so far, summed over batches: the cost of a ranking."""

    def mean(self, key: str, compute: Callable[[Batch], list[float]]) -> list[float]:
        """Per-token means of what ``compute`` sums over a batch; the last entry is the count."""
        totals: list[float] = []
        for number, ids in enumerate(self.batches):

            def once(ids: Tensor = ids) -> list[float]:
                with evaluating(self.model):
                    return compute(Batch(self.model, ids.to(self.model.device)))

            sums = self.memo(f"{key}/{number}", once)
            totals = [a + b for a, b in zip(totals, sums, strict=True)] if totals else list(sums)
        return [value / totals[-1] for value in totals[:-1]]

    def of(self, blocks: Sequence[int], at: Sequence[int] | None = None) -> float:
        """Loss of the model that runs ``blocks`` in the given order, at the places ``at``."""

        def compute(batch: Batch) -> list[float]:
            self.block_runs += len(blocks)
            total, count = batch.loss(batch.run(batch.start, blocks, at))
            return [float(total), float(count)]

        return self.mean(f"of {list(blocks)}" + (f" at {list(at)}" if at else ""), compute)[0]

    def without_each(self, blocks: Sequence[int], candidates: Sequence[int]) -> dict[int, float]:
        """Loss of ``blocks`` without each candidate, which costs only the blocks behind it."""

        def compute(batch: Batch) -> list[float]:
            hidden, sums, count = batch.start, [], 0.0
            for place, block in enumerate(blocks):
                if block in candidates:
                    rest = blocks[place + 1 :]
                    total, tokens = batch.loss(batch.run(hidden, rest))
                    self.block_runs += len(rest)
                    sums.append(float(total))
                    count = float(tokens)
                if len(sums) == len(candidates):
                    break
                hidden = batch.block(block, hidden)
                self.block_runs += 1
            return [*sums, count]

        means = self.mean(f"without {list(candidates)} of {list(blocks)}", compute)
        return dict(zip((b for b in blocks if b in candidates), means, strict=True))
