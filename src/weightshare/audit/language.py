"""Batches and loss for causal language models."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from weightshare.errors import UserError
from weightshare.language import Windows, next_token_loss

Batch = Mapping[str, Tensor]


def language_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean next-token loss of one batch, in nats; works for any Transformers causal LM."""
    ids, mask = batch["input_ids"], batch["mask"]
    logits: Any = model(input_ids=ids, use_cache=False).logits
    total, count = next_token_loss(logits, ids, mask)
    return total / count.clamp(min=1)


def text_batches(
    windows: Windows, count: int, size: int, device: str | torch.device = "cpu"
) -> list[Batch]:
    """``count`` batches of ``size`` windows, evenly spread over the text.

    Raises:
        UserError: the text has too few windows for two batches.
    """
    if len(windows) < 2 * size:
        raise UserError(
            f"the text gives {len(windows)} sequences, but an audit compares at least two batches "
            f"of {size}; give more text, shorter sequences or a smaller batch."
        )
    count = min(count, len(windows) // size)
    chosen = torch.linspace(0, len(windows) - 1, count * size).round().long()
    return [
        {
            "input_ids": windows.input_ids[rows].to(device),
            "mask": windows.mask[rows].to(device),
        }
        for rows in chosen.view(size, count).T
    ]
