"""The three texts of a fold: what it ranks on, what it cures on, what it is measured on."""

from collections.abc import Sequence
from typing import Any

from weightshare.errors import UserError
from weightshare.folding.config import FoldConfig
from weightshare.language import (
    LanguageModel,
    Windows,
    continue_prompts,
    read_documents,
    split_documents,
    windows,
)

LONGEST = 512
"""Tokens per sequence unless more are asked for: memory grows with the length."""
HELDOUT_WINDOWS = 64
"""Held-out sequences the losses are measured on."""
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 3, 24, 48


def fold_texts(
    config: FoldConfig, source: LanguageModel
) -> tuple[dict[str, Windows], dict[str, Any]]:
    """Windows ``calibration``, ``train``, ``heldout`` of disjoint documents, and which those are.

    Raises:
        UserError: no text, too little of it, or sequences longer than the model can take.
    """
    splits = split_documents(read_documents(config.text))
    train, heldout = splits.train, splits.heldout
    documents: dict[str, Any] = {"text": config.text, **splits.indices}
    if config.heldout is not None:
        train = [*splits.train, *splits.heldout]
        heldout = read_documents(config.heldout)
        documents["train"] = [*splits.indices["train"], *splits.indices["heldout"]]
        documents["heldout"] = {"text": config.heldout, "documents": len(heldout)}
    longest = getattr(source.model.config, "max_position_embeddings", LONGEST)
    length = config.sequence_length or min(LONGEST, longest)
    if length > longest:
        raise UserError(
            f"The sequence length is {length}, but the model takes at most {longest} tokens."
        )

    def cut(part: Sequence[str], most: int) -> Windows:
        return windows(source.tokenizer, part, length, limit=most)

    return {
        "calibration": cut(splits.calibration, config.calibration_sequences),
        "train": cut(train, max(1, config.cure.steps) * config.cure.batch_size),
        "heldout": cut(heldout, HELDOUT_WINDOWS),
    }, documents


def continuations(
    source: LanguageModel, models: dict[str, Any], heldout: Windows
) -> list[dict[str, str]]:
    """A few held-out prompts and what each model makes of them."""
    rows = heldout.input_ids[:: max(1, len(heldout) // PROMPTS)][:PROMPTS]
    whole = source.tokenizer.batch_decode(rows[:, : 2 * PROMPT_TOKENS], skip_special_tokens=True)
    # Begin where a line begins: half a word is a bad start.
    starts = [text.partition("\n")[2].strip("\n") or text for text in whole]
    prompts = [
        source.tokenizer.decode(source.tokenizer(text)["input_ids"][:PROMPT_TOKENS])
        for text in starts
    ]
    samples = [{"prompt": prompt} for prompt in prompts]
    for name, model in models.items():
        texts = continue_prompts(model, source.tokenizer, prompts, NEW_TOKENS)
        for sample, text in zip(samples, texts, strict=True):
            sample[name] = text
    return samples
