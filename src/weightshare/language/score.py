"""The loss of a model on text: nats, perplexity, bits per byte, with a standard error."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from weightshare.errors import UserError
from weightshare.language.losses import next_token_loss
from weightshare.language.text import Windows
from weightshare.sharing.preserve import preserved

LOGIT_ELEMENTS = 2**28
"""Most logits held at once (1 GB in float32); larger batches are cut."""


@dataclass(frozen=True)
class Score:
    """Loss on a text.

    - ``loss``: mean of -log p over the ``tokens`` targets, in nats; ``perplexity`` its exponential.
    - ``bits_per_byte``: summed loss / ln 2 / ``bytes``, where ``bytes`` is what those targets stand
      for in UTF-8: comparable across tokenizers and with compressors.
    - ``stderr``: standard error of ``loss`` over windows (text is correlated within a window).
    - ``window_losses`` (n,) float64 sums and ``window_tokens`` (n,): what ``compare`` pairs.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int
    stderr: float
    window_losses: Tensor = field(repr=False, compare=False)
    window_tokens: Tensor = field(repr=False, compare=False)


def evaluate(model: nn.Module, windows: Windows, batch_size: int = 8) -> Score:
    """Score ``model`` (logits from ``model(input_ids=...)``) on every target of ``windows``.

    The model's mode, the random streams and autograd's state are left as they were, also after an
    exception. The result does not depend on ``batch_size`` but for rounding.
    """
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; it must be at least 1.")
    if windows.tokens == 0:
        raise UserError("The windows hold no target to score; give text of at least two tokens.")
    device = next(model.parameters()).device
    sums: list[Tensor] = []
    with evaluating(model):
        start, batch = 0, 1  # the first window alone says how large the vocabulary is
        while start < len(windows):
            part = windows[start : start + batch]
            ids, mask = part.input_ids.to(device), part.mask.to(device)
            logits = model(input_ids=ids, use_cache=False).logits
            sums += [
                next_token_loss(row[None], one[None], keep[None])[0]
                for row, one, keep in zip(logits, ids, mask, strict=True)
            ]
            start += batch
            batch = max(1, min(batch_size, LOGIT_ELEMENTS // logits[0].numel()))
    losses = torch.stack(sums).double().cpu()
    counts = windows.mask.sum(1).double()
    loss = (losses.sum() / counts.sum()).item()
    size = int(windows.bytes.sum())
    return Score(
        loss=loss,
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        bits_per_byte=losses.sum().item() / math.log(2) / size if size else math.nan,
        tokens=int(counts.sum()),
        bytes=size,
        stderr=_ratio_stderr(losses, counts),
        window_losses=losses,
        window_tokens=counts,
    )


def compare(one: Score, other: Score) -> tuple[float, float]:
    """``other.loss - one.loss`` on the same windows, and its paired standard error.

    Much narrower than the two single errors suggest: what makes a window hard is hard for both.
    """
    if not torch.equal(one.window_tokens, other.window_tokens):
        raise UserError(
            "The two scores are of different windows; score both models on the same text."
        )
    difference = other.window_losses - one.window_losses
    return other.loss - one.loss, _ratio_stderr(difference, one.window_tokens)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside: eval mode, no gradients. After: every module's mode and buffers, the random streams
    and autograd's state as they were, also after an exception."""
    with preserved(model), torch.no_grad():
        model.eval()
        yield


def _ratio_stderr(sums: Tensor, counts: Tensor) -> float:
    """Standard error of sums.sum() / counts.sum() over independent windows (delta method)."""
    n = len(sums)
    if n < 2:
        return math.nan
    residual = sums - counts * (sums.sum() / counts.sum())
    return (residual.square().sum() * n / (n - 1)).sqrt().item() / counts.sum().item()
