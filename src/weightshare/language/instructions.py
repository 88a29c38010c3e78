"""Instruction files: a prompt to read, a response to learn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightshare.errors import UserError
from weightshare.language.text import IGNORED, read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Instruction:
    """``prompt`` with its reference text, if any, already below it; the wanted ``response``."""

    prompt: str
    response: str


def read_instructions(path: str | Path) -> list[Instruction]:
    """Rows of a ``.jsonl`` (or ``.jsonl.gz``) file in the form of databricks-dolly-15k.

    The prompt is ``"prompt"`` or ``"instruction"``; ``"context"``, where there is one, follows it
    after a blank line; the answer is ``"response"``. Rows with an empty prompt or response are
    left out, as nothing could be learnt from them.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"No instruction file at {path}; give a .jsonl or .jsonl.gz file.")
    wanted = 'a JSON object with "prompt" (or "instruction") and "response"; correct the line.'
    rows = read_rows(path, _instruction, wanted)
    kept = [row for row in rows if row.prompt and row.response]
    if not kept:
        raise UserError(f"{path} holds no instruction; give rows with a prompt and a response.")
    return kept


def encode_instructions(
    tokenizer: PreTrainedTokenizerBase, rows: Iterable[Instruction], length: int
) -> list[tuple[list[int], list[int]]]:
    """(input ids, labels) of each row, for ``pad``; labels are -100 over the prompt.

    The prompt is written with the tokenizer's chat template where it has one, else as
    "prompt, blank line, response, end of text". Rows are cut at ``length`` tokens; a row whose
    prompt leaves no room for any of its response is dropped.
    """
    if length < 2:
        raise UserError(f"The sequence length is {length}; it must be at least 2.")
    encoded = []
    for row in rows:
        prompt, response = _written(tokenizer, row)
        ids = (prompt + response)[:length]
        if len(ids) > len(prompt):
            encoded.append((ids, [IGNORED] * len(prompt) + ids[len(prompt) :]))
    if not encoded:
        raise UserError(
            f"No response fits into {length} tokens after its prompt; give a longer length."
        )
    return encoded


def _written(tokenizer: PreTrainedTokenizerBase, row: Instruction) -> tuple[list[int], list[int]]:
    """Ids of prompt and response, encoded apart: encoded together, a token could straddle both."""

    def ids(text: str, special: bool = False) -> list[int]:
        # Longer texts than the model takes are cut by the caller; no need for a warning.
        return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    if not tokenizer.chat_template:
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        return ids(f"{row.prompt}\n\n", special=True), ids(row.response) + end
    question: list[dict[str, Any]] = [{"role": "user", "content": row.prompt}]
    answer = [*question, {"role": "assistant", "content": row.response}]
    opened = str(
        tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    )
    whole = str(tokenizer.apply_chat_template(answer, tokenize=False))
    if not whole.startswith(opened):
        raise UserError(
            "The tokenizer's chat template writes an answered conversation differently from an "
            "open one, so the response cannot be told from the prompt; use another template."
        )
    return ids(opened), ids(whole[len(opened) :])


def _instruction(row: Any, where: str) -> Instruction:
    prompt = row["prompt"] if "prompt" in row else row["instruction"]
    parts: Sequence[Any] = (prompt, row.get("context") or "", row["response"])
    if not all(isinstance(part, str) for part in parts):
        raise UserError(f"A field on {where} is not a string; correct the line.")
    prompt, context, response = (part.strip() for part in parts)
    return Instruction(f"{prompt}\n\n{context}" if context else prompt, response)
