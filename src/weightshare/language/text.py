"""Text on disk -> documents -> splits -> windows of tokens with an exact count of their bytes."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from weightshare.data.lookup import locate
from weightshare.data.stdlib import SEPARATOR, gather_sources, split_sources
from weightshare.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = TypeVar("Row")

IGNORED = -100
"""The label of a position that is no target (the convention of torch and transformers)."""

TEXT_SUFFIXES = (".txt", ".md", ".py", ".rst", ".jsonl", ".txt.gz", ".jsonl.gz")


def read_documents(source: str | Path, *, allow_hub: bool = False) -> list[str]:
    """The documents of a text file, of a folder of text files, or of a named text, in order.

    A name is looked up by ``data.locate`` (``pystdlib`` is the held-out sample that ships);
    ``stdlib`` is the running Python's standard library without that sample.

    - ``.txt``, ``.md``, ``.py`` (or any other name): documents are separated by a line holding a
      form feed, with blank lines around it. A text without one is a single document, and is cut at
      paragraph ends into about a hundred pieces, so that it can be split; joined, the pieces give
      the text back.
    - ``.jsonl``: one JSON object a line, its document under ``"text"``.
    - any of them with ``.gz``; a folder: the text files in it and below, each one document
      (more, where it has separators), sorted by path.

    Raises ``UserError`` for a missing or empty text, a broken archive and bytes that are not UTF-8.
    """
    if source == "stdlib" and not Path(source).exists():
        return [file.text for file in split_sources(gather_sources())[0]]
    path = locate(source, allow_hub=allow_hub)
    if path.is_dir():
        files = [p for p in sorted(path.rglob("*")) if p.name.endswith(TEXT_SUFFIXES)]
        documents = [document for file in files for document in _documents(file)]
    else:
        documents = _documents(path)
        if len(documents) == 1 and not path.name.endswith((".jsonl", ".jsonl.gz")):
            documents = _pieces(documents[0])
    if not documents:
        raise UserError(f"{path} holds no text; give a file or a folder with text in it.")
    return documents


@dataclass(frozen=True)
class Splits:
    """Three disjoint sets of documents; ``indices`` says which ones, for the run's config."""

    calibration: list[str]
    train: list[str]
    heldout: list[str]
    indices: dict[str, list[int]]


def split_documents(
    documents: Sequence[str], heldout_fraction: float = 0.1, calibration_fraction: float = 0.1
) -> Splits:
    """Split into calibration, training and held-out documents, the same way every time.

    Held out are the *last* documents, as many as hold ``heldout_fraction`` of the characters;
    calibration takes whole documents spread evenly over the rest, ``calibration_fraction`` of
    them. Each set gets at least one document.
    """
    for name, value in (
        ("heldout_fraction", heldout_fraction),
        ("calibration_fraction", calibration_fraction),
    ):
        if not 0 < value < 1:
            raise UserError(f"{name} is {value}; it must lie between 0 and 1.")
    if len(documents) < 3:
        raise UserError(
            f"The text has {len(documents)} document(s), but calibration, training and held-out "
            "text need one each; give more text, or separate its documents by form feeds."
        )
    sizes = np.array([len(document) for document in documents])
    from_end = np.cumsum(sizes[::-1])
    held = int(np.searchsorted(from_end, heldout_fraction * sizes.sum())) + 1
    first_held = max(2, len(documents) - held)
    wanted = min(max(1, round(calibration_fraction * first_held)), first_held - 1)
    chosen = set(((np.arange(wanted) + 0.5) * first_held / wanted).astype(int).tolist())
    indices = {
        "calibration": sorted(chosen),
        "train": [i for i in range(first_held) if i not in chosen],
        "heldout": list(range(first_held, len(documents))),
    }
    parts = {name: [documents[i] for i in where] for name, where in indices.items()}
    return Splits(**parts, indices=indices)


@dataclass(frozen=True)
class Windows:
    """Token windows of one length.

    - ``input_ids`` (n, length) int64.
    - ``mask`` (n, length) bool: the token is a target, that is, it is predicted from the tokens
      before it in its window and no other window counts it. False in column 0.
    - ``bytes`` (n,) int64: UTF-8 bytes that the window's targets stand for.
    """

    input_ids: torch.Tensor
    mask: torch.Tensor
    bytes: torch.Tensor

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: slice | Sequence[int] | torch.Tensor) -> Windows:
        return Windows(self.input_ids[index], self.mask[index], self.bytes[index])

    @property
    def tokens(self) -> int:
        """How many targets there are."""
        return int(self.mask.sum())

    @property
    def labels(self) -> torch.Tensor:
        """``input_ids`` with -100 where the token is no target, as transformers takes labels."""
        return self.input_ids.masked_fill(~self.mask, IGNORED)


def windows(
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[str],
    length: int,
    *,
    stride: int | None = None,
    limit: int | None = None,
) -> Windows:
    """Join the documents with the end-of-text token and cut the stream into windows.

    Windows start every ``stride`` tokens (default ``length``: no overlap, so the first token of
    each window has no context and is no target; with ``stride=length - 1`` every token but the
    very first is one). The last window is moved back to end with the text; its mask leaves out
    what was counted before. ``limit`` keeps the first so many windows.

    ``bytes`` is exact: each token stands for the bytes from the end of the token before it to its
    own end in the text, so bits per byte compare across tokenizers and with a compressor.
    """
    if length < 2:
        raise UserError(f"The sequence length is {length}; it must be at least 2.")
    stride = length if stride is None else stride
    if not 1 <= stride <= length:
        raise UserError(f"stride is {stride}; it must lie between 1 and the length, {length}.")
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}; it must be at least 1.")
    documents = [document for document in documents if document]
    if not documents:
        raise UserError("The text is empty; give a text with something in it.")
    ids, sizes = encode(tokenizer, documents)
    if len(ids) < length:
        raise UserError(
            f"The text has {len(ids)} tokens, fewer than one sequence of {length}; "
            "give more text or a shorter sequence length."
        )
    starts = np.arange(0, len(ids) - length + 1, stride)
    if starts[-1] + length < len(ids):
        starts = np.append(starts, len(ids) - length)
    starts = starts[:limit]
    covered = np.concatenate([[0], starts[:-1] + length])
    where = starts[:, None] + np.arange(length)
    mask = (where >= covered[:, None]) & (where > starts[:, None])
    return Windows(
        torch.from_numpy(ids[where]),
        torch.from_numpy(mask),
        torch.from_numpy((sizes[where] * mask).sum(1)),
    )


def encode(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """One stream of token ids (int64), and the UTF-8 bytes each token stands for.

    After each document stands the end-of-text token, where the tokenizer has one.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[np.ndarray] = []
    sizes: list[np.ndarray] = []
    if tokenizer.is_fast:
        # Straight from the Rust side: BatchEncoding would build several Python lists more.
        encoded = tokenizer.backend_tokenizer.encode_batch(
            list(documents), add_special_tokens=False
        )
    else:
        encoded = [tokenizer(text, add_special_tokens=False) for text in documents]
    for text, one in zip(documents, encoded, strict=True):
        tokens = np.array([*(one.ids if tokenizer.is_fast else one["input_ids"]), *end], np.int64)
        ids.append(tokens)
        if tokenizer.is_fast:
            ends = np.array([stop for _, stop in one.offsets] + [len(text)] * len(end), np.int64)
        else:
            # No offsets: the document's total is still exact, spread evenly over its tokens.
            ends = np.linspace(0, len(text), len(tokens) + 1)[1:].astype(np.int64)
        sizes.append(_bytes_between(text, ends))
    return np.concatenate(ids), np.concatenate(sizes)


def _bytes_between(text: str, ends: np.ndarray) -> np.ndarray:
    """UTF-8 bytes from each end (in characters) to the next; several tokens may share one
    character, whose bytes then count for the first of them."""
    if not len(ends):
        return np.zeros(0, np.int64)
    ends = np.maximum.accumulate(ends)
    if not text.isascii():
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        width = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)
        ends = np.concatenate([[0], np.cumsum(width)])[ends]
    return np.diff(ends, prepend=0)


def pad(
    ids: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]] | None = None,
    *,
    pad_id: int = 0,
    side: str = "right",
) -> dict[str, torch.Tensor]:
    """A padded batch, ready for ``model(**batch)``.

    Returns ``input_ids``, ``attention_mask`` and ``labels``, each (batch, longest) int64; labels
    are the ids themselves unless given, and -100 where padded. ``pad_id`` is never seen by a model
    that respects the attention mask.
    """
    if not ids:
        raise UserError("There is no sequence to pad; give at least one.")
    labels = ids if labels is None else labels
    longest = max(map(len, ids))
    batch = {
        "input_ids": torch.full((len(ids), longest), pad_id),
        "attention_mask": torch.zeros(len(ids), longest, dtype=torch.int64),
        "labels": torch.full((len(ids), longest), IGNORED),
    }
    for row, (tokens, targets) in enumerate(zip(ids, labels, strict=True)):
        where = slice(0, len(tokens)) if side == "right" else slice(longest - len(tokens), longest)
        batch["input_ids"][row, where] = torch.tensor(tokens)
        batch["attention_mask"][row, where] = 1
        batch["labels"][row, where] = torch.tensor(targets)
    return batch


def _documents(path: Path) -> list[str]:
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        wanted = 'a JSON object with a "text" field; correct the line.'
        documents = read_rows(path, _json_text, wanted)
    else:
        documents = read_text(path).split(SEPARATOR)
    return [document for document in documents if document.strip()]


def read_text(path: Path) -> str:
    """The file's text, unpacked where its name ends in .gz; UTF-8 only."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise UserError(f"{path} cannot be read ({error}); get the file again.") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 (byte {raw[error.start]:#04x} at position {error.start}); "
            "convert it to UTF-8."
        ) from error


def read_rows(path: Path, take: Callable[[Any, str], Row], wanted: str) -> list[Row]:
    """What ``take`` makes of the JSON on each line of a file; blank lines are passed over.

    ``take`` is given the value and where it stands ("line 3 of FILE"); a value that it cannot take
    apart (``KeyError``, ``TypeError``, ``ValueError``, ``AttributeError``) is said to be none of
    what is ``wanted``.
    """
    found = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                found.append(take(json.loads(line), f"line {number} of {path}"))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"Line {number} of {path} is not {wanted}") from error
    return found


def _json_text(row: Any, where: str) -> str:
    text = row["text"]
    if not isinstance(text, str):
        raise UserError(f'"text" on {where} is not a string; correct the line.')
    return text


def _pieces(text: str) -> list[str]:
    """Cut after blank lines (after lines where there is none) into about a hundred pieces."""
    mark = "\n\n" if "\n\n" in text.strip() else "\n"
    least = len(text) // 100
    pieces: list[str] = []
    start = 0
    while True:
        cut = text.find(mark, start + least)
        if cut < 0 or not text[cut:].strip():
            return [*pieces, text[start:]]
        cut += len(mark)
        pieces.append(text[start:cut])
        start = cut
