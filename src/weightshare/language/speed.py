"""How fast a model writes: tokens per second of cached greedy decoding."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from weightshare.errors import UserError
from weightshare.language.score import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPT = "The weights of a network can serve more than one use."


@dataclass(frozen=True)
class TokensPerSecond:
    """``median`` over ``repeats`` of new tokens per second, all sequences of the batch together."""

    median: float
    repeats: tuple[float, ...]
    batch: int
    prompt_tokens: int
    new_tokens: int


def decode_speed(
    model: "PreTrainedModel",
    prompt: "PreTrainedTokenizerBase | Tensor | Sequence[int]",
    new_tokens: int = 64,
    batch: int = 1,
    *,
    repeats: int = 5,
) -> TokensPerSecond:
    """Time ``new_tokens`` steps of greedy decoding with a key/value cache.

    ``prompt``: token ids of one sequence, or a tokenizer, which then encodes a sentence. Every
    repeat reads the prompt first, untimed, into a fresh cache; the first repeat is a warm-up and
    does not count. What is timed is the model alone, called one token at a time, not the
    bookkeeping of ``generate``. Nothing stops at an end-of-text token: every repeat does the same
    work. Other load on the machine lowers the figure; compare only figures of one run.
    """
    for name, value in (("new_tokens", new_tokens), ("batch", batch), ("repeats", repeats)):
        if value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1.")
    tokens = prompt(PROMPT)["input_ids"] if callable(prompt) else prompt
    ids = torch.as_tensor(tokens, device=model.device).reshape(1, -1).expand(batch, -1)
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and ids.shape[1] + new_tokens > limit:
        raise UserError(
            f"{ids.shape[1]} prompt tokens and {new_tokens} new ones exceed the model's "
            f"{limit} positions; ask for fewer new tokens."
        )
    with evaluating(model):
        seconds = [_decode(model, ids, new_tokens) for _ in range(repeats + 1)][1:]
    speeds = tuple(batch * new_tokens / one for one in seconds)
    return TokensPerSecond(statistics.median(speeds), speeds, batch, ids.shape[1], new_tokens)


def _decode(model: "PreTrainedModel", ids: Tensor, new_tokens: int) -> float:
    output = model(input_ids=ids, use_cache=True)
    token = output.logits[:, -1:].argmax(-1)
    _synchronize(ids.device)
    started = time.perf_counter()
    for _ in range(new_tokens):
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        token = output.logits[:, -1:].argmax(-1)
    _synchronize(ids.device)
    return time.perf_counter() - started


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
