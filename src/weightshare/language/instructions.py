"""Instruction files: a prompt to read, a response to learn."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightshare.errors import UserError
from weightshare.language.text import IGNORED, read_rows, read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


RESPONSES = ("response", "output", "completion")
CONTEXTS = ("context", "input")
PROMPTS = ("prompt", "instruction")
WANTED = (
    'a JSON object with "prompt" (or "instruction") and "response" (or "output", "completion"), or '
    'with "messages" that end with the assistant\'s; correct the line.'
)


@dataclass(frozen=True)
class Instruction:
    """``prompt`` with its reference text, if any, already below it; the wanted ``response``.

    ``earlier`` holds the role ("system", "user", "assistant") and text of what was said before.
    """

    prompt: str
    response: str
    earlier: tuple[tuple[str, str], ...] = ()


def read_instructions(path: str | Path) -> list[Instruction]:
    """Rows of a ``.jsonl`` (or ``.jsonl.gz``) file in one of the forms that people keep them in.

    The prompt is ``"prompt"`` or ``"instruction"``; ``"context"`` or ``"input"``, where there is
    one, follows it after a blank line; the answer is ``"response"``, ``"output"`` or
    ``"completion"``. Or a conversation: ``"messages"`` of ``"role"`` and ``"content"``, of which
    the last, the assistant's, is the answer. Rows with an empty prompt or response are left out,
    as nothing could be learnt from them.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"No instruction file at {path}; give a .jsonl or .jsonl.gz file.")
    rows = read_rows(path, _instruction, WANTED)
    kept = [row for row in rows if row.prompt and row.response]
    if not kept:
        raise UserError(f"{path} holds no instruction; give rows with a prompt and a response.")
    return kept


def holds_instructions(path: str | Path) -> bool:
    """Whether the first row of a file of JSON lines has a response, or messages."""
    lines = read_text(Path(path).expanduser()).split("\n")
    try:
        first = json.loads(next(line for line in lines if line.strip()))
    except (StopIteration, ValueError):
        return False
    return isinstance(first, dict) and any(key in first for key in ("messages", *RESPONSES))


def encode_instructions(
    tokenizer: PreTrainedTokenizerBase, rows: Iterable[Instruction], length: int
) -> list[tuple[list[int], list[int]]]:
    """(input ids, labels) of each row, for ``pad``; labels are -100 over the prompt.

    The prompt is written with the tokenizer's chat template where it has one, else as
    "prompt, blank line, response, end of text", with what was said earlier in front of it. Rows are
    cut at ``length`` tokens; a row whose prompt leaves no room for any of its response is dropped.
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

    said = [*row.earlier, ("user", row.prompt)]
    if not tokenizer.chat_template:
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        prompt = "".join(f"{text}\n\n" for _, text in said)
        return ids(prompt, special=True), ids(row.response) + end
    question: list[dict[str, Any]] = [{"role": role, "content": text} for role, text in said]
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
    if "messages" in row:
        said = [(message["role"], message["content"]) for message in row["messages"]]
        if [role for role, _ in said[-2:]] != ["user", "assistant"]:
            raise UserError(
                f"The messages on {where} do not end with one of the user and one of the "
                "assistant; correct the line."
            )
    else:
        prompt, response = (
            row[next((name for name in names if name in row), names[0])]
            for names in (PROMPTS, RESPONSES)
        )
        context = next((row[name] for name in CONTEXTS if row.get(name)), "")
        said = [("context", context), ("user", prompt), ("assistant", response)]
    if not all(isinstance(part, str) for message in said for part in message):
        raise UserError(f"A field on {where} is not a string; correct the line.")
    *earlier, (_, prompt), (_, response) = ((role, text.strip()) for role, text in said)
    if "messages" in row:
        return Instruction(prompt, response, tuple(earlier))
    ((_, context),) = earlier
    return Instruction(f"{prompt}\n\n{context}" if context else prompt, response)
