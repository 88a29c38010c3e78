"""Continue prompts."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from weightshare.errors import UserError
from weightshare.language.score import evaluating
from weightshare.language.text import pad

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def continue_prompts(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str],
    max_new_tokens: int = 64,
    *,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """What the model writes after each prompt, without the prompt, up to its end-of-text token.

    ``temperature`` 0 is greedy; above, tokens are sampled with ``seed``. Prompts are padded on the
    left in one batch; the model and the random streams are left as they were.
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    if empty := [prompt for prompt, tokens in zip(prompts, ids, strict=True) if not tokens]:
        raise UserError(f"The prompt {empty[0]!r} has no tokens; give at least one character.")
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    batch = pad(ids, side="left", pad_id=pad_id or 0)
    sampling = {"temperature": temperature, "top_k": 0} if temperature else {}
    with evaluating(model):
        torch.manual_seed(seed)
        written = model.generate(  # type: ignore[operator]
            input_ids=batch["input_ids"].to(model.device),
            attention_mask=batch["attention_mask"].to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=bool(temperature),
            pad_token_id=pad_id or 0,
            **sampling,
        )
    new = written[:, batch["input_ids"].shape[1] :]
    return tokenizer.batch_decode(new, skip_special_tokens=True)
